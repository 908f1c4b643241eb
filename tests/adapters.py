"""Adapters that do something from the start, for the tests of what LoRA users rely on."""

from __future__ import annotations

from typing import Any

import peft
import torch
from tiny import CASES
from torch import nn

from peft_poly import PolyConfig

GATES = {"poly_type": "gates", "n_skills": None, "n_splits": None}  # over the settings of an adapter that mixes


def poly(case: str, **settings: Any) -> PolyConfig:
    """Settings for a model of `tiny.CASES`: three tasks unless said otherwise, and a B that is not zero."""
    settings = {"target_modules": CASES[case].target_modules, "init_weights": False, "n_tasks": 3, **settings}
    return PolyConfig(task_type=CASES[case].task_type, **settings)


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Routers that tell their tasks apart; a fresh one hardly does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("module_logits"):
            parameter.data.normal_(std=2.0, generator=generator)
    return model


def adapt(base: nn.Module, config: PolyConfig, **kwargs: Any) -> peft.PeftModel:
    """`peft.get_peft_model` in eval mode, with routers that tell their tasks apart."""
    model = peft.get_peft_model(base, config, **kwargs).eval()
    spread(model)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
