"""The few-shot regimes of the MHR paper (arXiv 2211.03831): which parameters learn, and the mean of the inventory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from ..config import PolyConfig
from ..layer import PolyLayer
from ..router import PolyRouter

__all__ = ["average_skills", "train_all", "train_router_only"]

SKILLS = ("poly_lora_A", "poly_lora_B")
ROUTER = ("poly_router",)


def train_router_only(layers: Iterable[PolyLayer], adapter_name: str) -> None:
    """MHR-z: the router learns, the skills do not, until `train_all`; `set_adapter` does not thaw them."""
    layers = list(layers)
    if all(layer.n_skills[adapter_name] == 1 for layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} has one skill, so its router has nothing to learn. Train it with `train_all()`."
        )
    for layer in layers:
        _train(layer, adapter_name, frozen=SKILLS)


def train_all(layers: Iterable[PolyLayer], adapter_name: str) -> None:
    """Skills and router learn; where there is one skill, the router has nothing to learn."""
    for layer in layers:
        _train(layer, adapter_name, frozen=() if layer.n_skills[adapter_name] > 1 else ROUTER)


@torch.no_grad()
def average_skills(config: PolyConfig, layers: Iterable[PolyLayer], adapter_name: str) -> None:
    """MHR-mu: A and B become their means over the skills, each by itself: the mix of equal weights."""
    layers = list(layers)
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged. Call `unmerge_adapter()` before its skills change.")
    for layer in layers:
        for name in SKILLS:
            skills = getattr(layer, name)
            old = skills[adapter_name]
            skills[adapter_name] = nn.Parameter(old.mean(dim=1, keepdim=True), requires_grad=old.requires_grad)
        router = cast(PolyRouter, layer.poly_router[adapter_name])
        if router.n_skills > 1:  # else a shared router that another layer has made flat
            old = router.module_logits
            router.module_logits = nn.Parameter(old.new_zeros(router.n_tasks, router.n_splits), requires_grad=False)
            router.n_skills = 1
        layer.n_skills[adapter_name] = 1
        layer.frozen_peft_weight_names[adapter_name] = ROUTER
        router.requires_grad_(False)
    config.n_skills = 1


def _train(layer: PolyLayer, adapter_name: str, frozen: tuple[str, ...]) -> None:
    layer.frozen_peft_weight_names[adapter_name] = frozen
    on = adapter_name in layer.active_adapters and not layer.disable_adapters  # else once `set_adapter` turns it on
    for name in (*SKILLS, *ROUTER):
        getattr(layer, name)[adapter_name].requires_grad_(on and name not in frozen)
