"""The parts of an adapted layer, read from the modules' own dictionaries.

Attribute look-ups of `nn.Module` and `nn.ParameterDict` would cost more than the products of a small layer.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from ..tasks.batch import TaskBatch
from .adapted import Adapted

__all__ = ["FIRST_TASK", "dropped", "ids_of_rows", "router_of", "row_tasks", "tensors_of"]

FIRST_TASK = torch.zeros(1, dtype=torch.long)  # of an adapter that has no other; one tensor, known by its identity


def router_of(layer: Adapted, name: str) -> Any:
    """The adapter's router."""
    return layer._modules["poly_router"]._modules[name]


def tensors_of(layer: Adapted, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adapter's A, B and logits."""
    modules: Any = layer._modules
    router = modules["poly_router"]._modules[name]
    A = modules["poly_lora_A"]._parameters.get(name)
    B = modules["poly_lora_B"]._parameters.get(name)
    logits = router._parameters.get("module_logits")
    if A is None or B is None or logits is None or type(router._parameters) is not dict:
        # FSDP1 keeps them elsewhere; ZeRO-3's dictionaries gather what is asked for with `[]`, not with `get`
        return layer.poly_lora_A[name], layer.poly_lora_B[name], router.module_logits
    return A, B, logits


def dropped(layer: Adapted, name: str, x: torch.Tensor) -> torch.Tensor:
    """The adapter's input after its dropout."""
    dropout: Any = layer._modules["poly_dropout"]._modules[name]
    return x if type(dropout) is nn.Identity else dropout(x)


def ids_of_rows(layer: Adapted, batch: Optional[TaskBatch], name: str, n_rows: int) -> torch.Tensor:
    """The ids of a layer's rows, `(n_rows,)`, or `(1,)` if one task serves them all."""
    return FIRST_TASK if batch is None else batch.rows(name, n_rows, layer.layer_name)


def row_tasks(layer: Adapted, name: str, ids: torch.Tensor, n_rows: int) -> torch.Tensor:
    """A task per row, or one for all rows; where the router samples, one per row, so that each has its draw."""
    if ids.shape[0] == 1 and n_rows != 1:
        return ids.expand(n_rows) if router_of(layer, name).samples else ids
    return ids
