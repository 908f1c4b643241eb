"""The three ways to compute an adapted layer's output; `choose_path` says when each is taken.

    plain          differentiable torch operations: what the compiler fuses and autocast casts
    for_backward   one autograd node per adapter, which keeps what a LoRA keeps (`autograd`)
    only           no gradients: pairs per distinct task, added in place, kept within `generate`

In training mode `for_backward` and `only` do the same arithmetic, so that a checkpointed forward, which first runs
without gradients, is bit-equal to one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn
from torch.nn.modules import module as module_internals
from transformers.pytorch_utils import Conv1D

from .autograd import PolyUpdate
from .grouping import Rows, ungrouped_rows
from .mixing import add_update, cheaper_together, low_rank_update
from .tasks import TaskBatch, kept_in_generation

if TYPE_CHECKING:
    from .layer import Linear

__all__ = ["choose_path"]

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)

Path = Callable[["Linear", torch.Tensor, list[str], Optional[TaskBatch], int, tuple, dict[str, Any]], torch.Tensor]


def choose_path(layer: Linear, x: torch.Tensor, active: list[str]) -> Path:
    """The way to compute `layer(x)` with the adapters in `active`."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or type(x) not in PLAIN_TENSORS:
        return plain
    if not layer.cast_input_dtype_enabled and any(x.dtype != layer.poly_lora_A[name].dtype for name in active):
        return plain  # the user wants no cast, and plain operations say so if they cannot do without
    return for_backward if torch.is_grad_enabled() else only


def plain(
    layer: Linear, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """Plain differentiable operations."""
    result = layer.base_layer(x, *args, **kwargs)
    dtype = result.dtype
    for name in active:
        A, B = layer.mixed_pair(name, row_tasks(layer, name, batch, n_rows).to(x.device, non_blocking=True))
        adapted = layer.poly_dropout[name](layer._cast_input_dtype(x, A.dtype))
        result = result + low_rank_update(adapted, A, B, layer.scaling[name])
    return result.to(dtype)


def for_backward(
    layer: Linear, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """One autograd node per adapter; the first takes the base layer's product in, where that is a plain one."""
    result: Optional[torch.Tensor] = None
    for name in active:
        adapted = layer.poly_dropout[name](x)
        weight, bias = None, None
        if result is None and adapted is x and not args and not kwargs and is_plain_and_frozen(layer.base_layer):
            weight, bias = layer.base_layer.weight, layer.base_layer.bias
        elif result is None:
            result = layer.base_layer(x, *args, **kwargs)
        router: Any = layer.poly_router[name]
        tasks = row_tasks(layer, name, batch, n_rows).to(x.device, non_blocking=True)
        result = PolyUpdate.apply(
            result,
            adapted,
            weight,
            bias,
            layer.poly_lora_A[name],
            layer.poly_lora_B[name],
            router.module_logits,
            tasks,
            router.noise_for(tasks),
            router.temperature,
            layer.scaling[name],
        )
    assert result is not None
    return result


def only(
    layer: Linear, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """No gradients: mixed pairs per distinct task, added to the base layer's output in place if it is ours alone."""
    result = layer.base_layer(x, *args, **kwargs)
    owned = type(layer.base_layer) in (nn.Linear, Conv1D) and not is_watched(layer.base_layer)
    for name in active:
        adapted = layer.poly_dropout[name](x)  # drawn before the noise, as in `for_backward`
        rows, A, B = pairs_of_rows(layer, name, batch, n_rows, x)
        result = add_update(result, adapted.to(A.dtype), A, B, layer.scaling[name], rows, owned)
        owned = True
    return result


def row_tasks(layer: Linear, name: str, batch: Optional[TaskBatch], n_rows: int) -> torch.Tensor:
    """A task per row, or one for all rows; where the router samples, one per row, so that each has its draw."""
    tasks = torch.zeros(1, dtype=torch.long) if batch is None else batch.rows(name, n_rows, layer.layer_name)
    router: Any = layer.poly_router[name]
    return tasks.expand(n_rows) if router.samples and tasks.shape[0] == 1 else tasks


def pairs_of_rows(
    layer: Linear, name: str, batch: Optional[TaskBatch], n_rows: int, x: torch.Tensor
) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """The mixed pairs, and which row has which; within `generate` they are mixed once and kept to its end."""
    kept = None if layer.training else kept_in_generation()
    rows = None
    if batch is not None and not layer.training:
        rows = batch.grouped(name, n_rows, x.device, layer.layer_name)
        if kept is None and rows.index is not None and not cheaper_together(rows, x, layer.r[name]):
            rows = None
    if rows is None:
        rows = ungrouped_rows(row_tasks(layer, name, batch, n_rows).to(x.device, non_blocking=True))
    if kept is None:
        return rows, *layer.mixed_pair(name, rows.tasks)
    stamp = stamp_of(layer, name)
    entry = kept.get((id(layer), name))
    if entry is None or entry[0] is not batch or entry[1] != stamp:
        entry = kept[id(layer), name] = (batch, stamp, *layer.mixed_pair(name, rows.tasks))
    return rows, entry[2], entry[3]


def stamp_of(layer: Linear, name: str) -> tuple[Any, ...]:
    """Changes whenever a parameter of the adapter is replaced, moved, cast or written to."""
    router: Any = layer.poly_router[name]
    parameters = (layer.poly_lora_A[name], layer.poly_lora_B[name], router.module_logits)
    return tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


def is_plain_and_frozen(base: Any) -> bool:
    """Whether a base layer does nothing but `linear` with parameters that take no gradient."""
    return (
        type(base) is nn.Linear
        and type(base.weight) in PLAIN_TENSORS
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and not is_watched(base)
    )


def is_watched(base: nn.Module) -> bool:
    """Whether a hook may see, keep or change what a layer returns, or its `forward` was replaced."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    everywhere = module_internals._global_forward_hooks or module_internals._global_forward_pre_hooks
    return bool(hooks or everywhere or "forward" in base.__dict__)
