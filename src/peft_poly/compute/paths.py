"""The three ways to compute an adapted layer's output; `choose_path` says when each is taken.

    plain          differentiable torch operations: what the compiler fuses and autocast casts
    for_backward   one autograd node per adapter, which keeps what a LoRA keeps
    only           no gradients: added in place, kept within `generate`

What an adapter adds is said by its kind. In training mode `for_backward` and `only` do the same arithmetic, so that a
checkpointed forward, which first runs without gradients, is bit-equal to one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch

from ..tasks.batch import TaskBatch
from ..tasks.transforms import is_transformed
from .adapted import Adapted
from .base_layers import PLAIN_TENSORS, base_output, frozen_product
from .kinds import KINDS
from .parts import dropped, ids_of_rows, row_tasks

__all__ = ["Path", "choose_path"]

Path = Callable[[Adapted, torch.Tensor, list[str], Optional[TaskBatch], int, tuple, dict[str, Any]], torch.Tensor]


def choose_path(layer: Adapted, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch] = None) -> Path:
    """The way to compute `layer(x)` with the adapters in `active`."""
    if batch is not None and batch.unknown:
        return plain  # it asks the router, which knows the mean of its rows
    if torch.compiler.is_compiling() or is_transformed() or type(x) not in PLAIN_TENSORS:
        return plain
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which refuses the meta device
        return plain
    if not layer.cast_input_dtype_enabled and any(x.dtype != layer.poly_lora_A[name].dtype for name in active):
        return plain  # the user wants no cast, and plain operations say so if they cannot do without
    return for_backward if torch.is_grad_enabled() else only


def plain(
    layer: Adapted, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """Plain differentiable operations."""
    result = layer.base_layer(x, *args, **kwargs)
    dtype = result.dtype
    for name in active:
        ids = ids_of_rows(layer, batch, name, n_rows)
        tasks = row_tasks(layer, name, ids, n_rows).to(x.device, non_blocking=True)
        adapted = layer.poly_dropout[name](layer._cast_input_dtype(x, layer.poly_lora_A[name].dtype))
        result = result + KINDS[layer.poly_type[name]].update(layer, name, adapted, tasks)
    return result.to(dtype)


def for_backward(
    layer: Adapted, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """One autograd node per adapter; the first takes the base layer's product in, where that is a plain one."""
    result: Optional[torch.Tensor] = None
    for name in active:
        adapted = dropped(layer, name, x)
        weight, bias = None, None
        if result is None:
            if adapted is x and not args and not kwargs:
                weight, bias = frozen_product(layer._modules["base_layer"])
            if weight is None:
                result = layer.base_layer(x, *args, **kwargs)
        ids = ids_of_rows(layer, batch, name, n_rows)
        result = KINDS[layer.poly_type[name]].node(layer, name, result, adapted, weight, bias, ids, n_rows)
    assert result is not None
    return result


def only(
    layer: Adapted, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """No gradients: added to the base layer's output, in place if it is ours alone."""
    result, owned = base_output(layer._modules["base_layer"], x, args, kwargs)
    for name in active:
        adapted = dropped(layer, name, x)  # drawn before the noise, as in `for_backward`
        result = KINDS[layer.poly_type[name]].add(layer, name, result, adapted, batch, n_rows, owned)
        owned = True
    return result
