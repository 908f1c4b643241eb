"""The few-shot regimes of the MHR paper (arXiv 2211.03831): which parameters learn, and the mean of the inventory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..compute.kinds import KINDS
from ..compute.states import lasting
from ..config import PolyConfig
from ..layer import PolyLayer
from .optimizer_state import leave_behind

__all__ = ["average_skills", "is_router_only", "train_all", "train_router_only"]

SKILLS = ("poly_lora_A", "poly_lora_B")
ROUTER = ("poly_router",)


def train_router_only(layers: Iterable[PolyLayer], adapter_name: str, has_heads: bool = False) -> None:
    """MHR-z: the router learns, the skills do not, until `train_all`; `set_adapter` does not thaw them.

    With one skill nothing of the layers learns, which is for adapters whose tasks have heads to learn.
    """
    layers = list(layers)
    if not has_heads and not any(_routes(layer, adapter_name) for layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} has one skill, so its router has nothing to learn. Train it with `train_all()`."
        )
    for layer in layers:
        _train(layer, adapter_name, frozen=SKILLS if _routes(layer, adapter_name) else (*SKILLS, *ROUTER))


def is_router_only(layers: Iterable[PolyLayer], adapter_name: str) -> bool:
    """Whether `train_router_only` froze the skills of an adapter."""
    return any(layer.frozen_peft_weight_names.get(adapter_name, ())[: len(SKILLS)] == SKILLS for layer in layers)


def train_all(layers: Iterable[PolyLayer], adapter_name: str) -> None:
    """Skills and router learn, but for a router that has nothing to learn."""
    for layer in layers:
        _train(layer, adapter_name, frozen=() if _routes(layer, adapter_name) else ROUTER)


@lasting()
def average_skills(config: PolyConfig, layers: Iterable[PolyLayer], adapter_name: str) -> None:
    """MHR-mu: in place, the LoRA that all tasks share; the router says nothing and is frozen."""
    layers = list(layers)
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged. Call `unmerge_adapter()` before its skills change.")
    before = _parameters(layers, adapter_name)
    KINDS[config.poly_type].average(layers, adapter_name)
    after = _parameters(layers, adapter_name)
    for gone in before.keys() - after.keys():
        leave_behind(before[gone])
    for layer in layers:
        layer.frozen_peft_weight_names[adapter_name] = ROUTER
        layer.poly_router[adapter_name].requires_grad_(False)
    config.n_skills = 1


def _parameters(layers: list[PolyLayer], adapter_name: str) -> dict[int, nn.Parameter]:
    """Those of an adapter, by `id`."""
    held = [getattr(layer, name)[adapter_name] for layer in layers for name in SKILLS]
    held += [p for layer in layers for p in layer.poly_router[adapter_name].parameters()]
    return {id(parameter): parameter for parameter in held}


def _routes(layer: PolyLayer, adapter_name: str) -> bool:
    return KINDS[layer.poly_type[adapter_name]].routes(layer, adapter_name)


def _train(layer: PolyLayer, adapter_name: str, frozen: tuple[str, ...]) -> None:
    layer.frozen_peft_weight_names[adapter_name] = frozen
    on = adapter_name in layer.active_adapters and not layer.disable_adapters  # else once `set_adapter` turns it on
    for name in (*SKILLS, *ROUTER):
        getattr(layer, name)[adapter_name].requires_grad_(on and name not in frozen)
