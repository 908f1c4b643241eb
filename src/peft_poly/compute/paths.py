"""The three ways to compute an adapted layer's output; `choose_path` says when each is taken.

    plain          differentiable torch operations: what the compiler fuses and autocast casts
    for_backward   one autograd node per adapter, which keeps what a LoRA keeps (`autograd`)
    only           no gradients: pairs per distinct task, added in place, kept within `generate`

In training mode `for_backward` and `only` do the same arithmetic, so that a checkpointed forward, which first runs
without gradients, is bit-equal to one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn

from ..router import route
from ..tasks.context import TaskBatch, kept_in_generation
from ..tasks.grouping import Rows, ungrouped_rows
from .adapted import Adapted
from .base_layers import PLAIN_TENSORS, base_output, frozen_product
from .kinds.autograd import PolyUpdate
from .kinds.kept import Kept, Shortcut
from .kinds.mixing import add_update, cheaper_together, low_rank_update, mix_A, mix_B, mix_one, worth_turning

__all__ = ["choose_path"]

FIRST_TASK = torch.zeros(
    1, dtype=torch.long
)  # of an adapter that has no other; one tensor, for it is known by identity

Path = Callable[[Adapted, torch.Tensor, list[str], Optional[TaskBatch], int, tuple, dict[str, Any]], torch.Tensor]


def choose_path(layer: Adapted, x: torch.Tensor, active: list[str]) -> Path:
    """The way to compute `layer(x)` with the adapters in `active`."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        return plain
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which refuses the meta device
        return plain
    if not layer.cast_input_dtype_enabled and any(x.dtype != layer.poly_lora_A[name].dtype for name in active):
        return plain  # the user wants no cast, and plain operations say so if they cannot do without
    return for_backward if torch.is_grad_enabled() else only


def plain(
    layer: Adapted,
    x: torch.Tensor,
    active: list[str],
    batch: Optional[TaskBatch],
    n_rows: int,
    args: Any,
    kwargs: Any,
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
    layer: Adapted,
    x: torch.Tensor,
    active: list[str],
    batch: Optional[TaskBatch],
    n_rows: int,
    args: Any,
    kwargs: Any,
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
        A, B, logits = tensors_of(layer, name)
        router: Any = layer._modules["poly_router"]._modules[name]
        tasks = row_tasks(layer, name, batch, n_rows)
        if tasks.device != x.device:
            tasks = tasks.to(x.device, non_blocking=True)
        noise = router.noise_for(tasks)
        result = PolyUpdate.apply(
            result, adapted, weight, bias, A, B, logits, tasks, noise, router.temperature, layer.scaling[name]
        )
    assert result is not None
    return result


def only(
    layer: Adapted,
    x: torch.Tensor,
    active: list[str],
    batch: Optional[TaskBatch],
    n_rows: int,
    args: Any,
    kwargs: Any,
) -> torch.Tensor:
    """No gradients: mixed pairs per distinct task, added to the base layer's output in place if it is ours alone."""
    result, owned = base_output(layer._modules["base_layer"], x, args, kwargs)
    for name in active:
        adapted = dropped(layer, name, x)  # drawn before the noise, as in `for_backward`
        rows, A, B = pairs_of_rows(layer, name, batch, n_rows, x)
        if adapted.dtype != A.dtype:
            adapted = adapted.to(A.dtype)
        result = add_update(result, adapted, A, B, layer.scaling[name], rows, owned)
        owned = True
    return result


# ------------------------------------------------------------------------------------------------- parts of a layer
# They are read from the modules' own dictionaries: attribute look-ups of `nn.Module` and `nn.ParameterDict` would cost
# more than the products of a small layer.


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


# ------------------------------------------------------------------------------------------------------ mixed pairs
def row_tasks(layer: Adapted, name: str, batch: Optional[TaskBatch], n_rows: int) -> torch.Tensor:
    """A task per row, or one for all rows; where the router samples, one per row, so that each has its draw."""
    tasks = FIRST_TASK if batch is None else batch.rows(name, n_rows, layer.layer_name)
    if tasks.shape[0] == 1 and n_rows != 1:
        router: Any = layer._modules["poly_router"]._modules[name]
        return tasks.expand(n_rows) if router.samples else tasks
    return tasks


def pairs_of_rows(
    layer: Adapted, name: str, batch: Optional[TaskBatch], n_rows: int, x: torch.Tensor
) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """Which row has which mixed pair, and the pairs; within `generate` they are mixed once and kept to its end."""
    kept = None if layer.training else kept_in_generation()
    rows = None
    if batch is not None and not layer.training:
        rows = batch.grouped(name, n_rows, x.device, layer.layer_name)
        if kept is None and rows.index is not None and not cheaper_together(rows, x, layer.r[name]):
            rows = None
    if rows is None:
        rows = ungrouped_rows(row_tasks(layer, name, batch, n_rows).to(x.device, non_blocking=True))
    if kept is None:
        return rows, *mixed(layer, name, rows, x)
    entry, tensors = kept.get((layer, name)), tensors_of(layer, name)
    if entry is None or not entry.holds(batch, rows, tensors):
        entry = kept[layer, name] = Kept(batch, rows, tensors, *mixed(layer, name, rows, x))
    else:  # not the first token: there will be more
        Shortcut.keep(kept, layer, x, name, entry, rows)
    return rows, entry.A, entry.B


def mixed(layer: Adapted, name: str, rows: Rows, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`PolyLayer.mixed_pair` for the tasks of `rows`, without autograd or autocast; one is `(in, r)`, `(r, out)`."""
    A, B, logits = tensors_of(layer, name)
    router: Any = layer._modules["poly_router"]._modules[name]
    weights, w = layer.task_context.weights, None
    if weights is not None and not router.samples:
        w = weights.of(logits, name, rows.tasks)
    if w is None:
        w = route(logits, rows.tasks, router.noise_for(rows.tasks), router.temperature, A.shape[0])[0]
    if w.shape[0] == 1:
        return mix_one(w, A, B)
    return mix_A(w, A, worth_turning(x, w.shape[0])), mix_B(w, B)
