"""Modes and flags of modules that are changed for a while and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "keep_requires_grad", "lasting"]


@contextmanager
def lasting() -> Iterator[None]:
    """No gradients, and what is made is no tensor of `inference_mode`, which could never be trained afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def keep_requires_grad(layer: Any, adapter_name: str) -> Iterator[None]:
    """Undo what re-assigning to a ParameterDict does: it makes every tensor trainable."""
    names = [name for name in layer.adapter_layer_names if adapter_name in getattr(layer, name)]
    before = {name: _first_parameter(getattr(layer, name)[adapter_name]).requires_grad for name in names}
    try:
        yield
    finally:
        for name, flag in before.items():
            getattr(layer, name)[adapter_name].requires_grad_(flag)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have `module` in eval mode, and put its mode back afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _first_parameter(item: nn.Module | nn.Parameter) -> nn.Parameter:
    return item if isinstance(item, nn.Parameter) else next(item.parameters())
