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
from .mixing import add_update, cheaper_together, low_rank_update, mix_A, mix_B
from .router import route
from .tasks import TaskBatch, kept_in_generation

if TYPE_CHECKING:
    from .layer import Linear

__all__ = ["choose_path"]

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)

Path = Callable[["Linear", torch.Tensor, list[str], Optional[TaskBatch], int, tuple, dict[str, Any]], torch.Tensor]


def choose_path(layer: Linear, x: torch.Tensor, active: list[str]) -> Path:
    """The way to compute `layer(x)` with the adapters in `active`."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS or torch.is_autocast_enabled(x.device.type):
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
        adapted = dropped(layer, name, x)
        weight, bias = None, None
        if result is None:
            if adapted is x and not args and not kwargs:
                weight, bias = frozen_product(layer._modules["base_layer"])
            if weight is None:
                result = layer.base_layer(x, *args, **kwargs)
        A, B, logits = tensors_of(layer, name)
        router: Any = layer._modules["poly_router"]._modules[name]  # type: ignore[union-attr]
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
    layer: Linear, x: torch.Tensor, active: list[str], batch: Optional[TaskBatch], n_rows: int, args: Any, kwargs: Any
) -> torch.Tensor:
    """No gradients: mixed pairs per distinct task, added to the base layer's output in place if it is ours alone."""
    result, owned = base_output(layer, x, args, kwargs)
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


def tensors_of(layer: Linear, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adapter's A, B and logits."""
    modules: Any = layer._modules
    router = modules["poly_router"]._modules[name]
    A, B = (modules[kind]._parameters.get(name) for kind in ("poly_lora_A", "poly_lora_B"))
    logits = router._parameters.get("module_logits")
    if A is None or B is None or logits is None:  # a wrapper such as FSDP keeps them elsewhere
        return layer.poly_lora_A[name], layer.poly_lora_B[name], router.module_logits
    return A, B, logits


def dropped(layer: Linear, name: str, x: torch.Tensor) -> torch.Tensor:
    """The adapter's input after its dropout."""
    dropout: Any = layer._modules["poly_dropout"]._modules[name]  # type: ignore[union-attr]
    return x if type(dropout) is nn.Identity else dropout(x)


def base_output(layer: Linear, x: torch.Tensor, args: Any, kwargs: Any) -> tuple[torch.Tensor, bool]:
    """The base layer's output, and whether nobody else can hold it."""
    base: Any = layer._modules["base_layer"]
    if is_watched(base) or type(base) not in (nn.Linear, Conv1D):
        return base(x, *args, **kwargs), False
    weight = base._parameters.get("weight")
    if weight is None or args or kwargs or type(base) is Conv1D:
        return base(x, *args, **kwargs), True
    return nn.functional.linear(x, weight, base._parameters["bias"]), True


def frozen_product(base: Any) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Weight and bias of a base layer that does nothing but `linear` with tensors that take no gradient, or Nones."""
    if type(base) is not nn.Linear or is_watched(base):
        return None, None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if (
        weight is None
        or type(weight) not in PLAIN_TENSORS
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None, None
    return (None, None) if bias is None and base.bias is not None else (weight, bias)


def is_watched(base: nn.Module) -> bool:
    """Whether a hook may see, keep or change what a layer returns, or its `forward` was replaced."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
        or module_internals._global_forward_hooks
        or module_internals._global_forward_pre_hooks
        or module_internals._global_backward_hooks
        or module_internals._global_backward_pre_hooks
    )


# ------------------------------------------------------------------------------------------------------ mixed pairs
def row_tasks(layer: Linear, name: str, batch: Optional[TaskBatch], n_rows: int) -> torch.Tensor:
    """A task per row, or one for all rows; where the router samples, one per row, so that each has its draw."""
    tasks = torch.zeros(1, dtype=torch.long) if batch is None else batch.rows(name, n_rows, layer.layer_name)
    if tasks.shape[0] == 1 and n_rows != 1:
        router: Any = layer._modules["poly_router"]._modules[name]  # type: ignore[union-attr]
        return tasks.expand(n_rows) if router.samples else tasks
    return tasks


def pairs_of_rows(
    layer: Linear, name: str, batch: Optional[TaskBatch], n_rows: int, x: torch.Tensor
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
        return rows, *mixed(layer, name, rows.tasks)
    entry, tensors = kept.get((layer, name)), tensors_of(layer, name)
    if entry is None or not entry.holds(batch, rows, tensors):
        entry = kept[layer, name] = Kept(batch, rows, tensors, *mixed(layer, name, rows.tasks))
    else:  # not the first token: there will be more
        Shortcut.keep(kept, layer, x, name, entry, rows)
    return rows, entry.A, entry.B


def mixed(layer: Linear, name: str, tasks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`PolyLayer.mixed_pair`, without autograd and autocast."""
    A, B, logits = tensors_of(layer, name)
    router: Any = layer._modules["poly_router"]._modules[name]  # type: ignore[union-attr]
    w = route(logits, tasks, router.noise_for(tasks), router.temperature, A.shape[0])[0]
    return mix_A(w, A), mix_B(w, B)


class Kept:
    """The mixed pairs of one layer and adapter in one `generate`, and what they were mixed from.

    Whoever replaces, moves, casts or writes to a parameter changes its identity, its storage or its version. The
    storage is held, so that its address is not given to another. (A write through `.data` leaves no trace.)
    """

    def __init__(
        self, batch: Any, rows: Rows, tensors: tuple[torch.Tensor, ...], A: torch.Tensor, B: torch.Tensor
    ) -> None:
        self.batch, self.tasks, self.A, self.B = batch, rows.tasks, A, B
        self.lasting = not any(tensor.is_inference() or type(tensor) not in PLAIN_TENSORS for tensor in tensors)
        self.of = [(tensor, tensor.detach(), tensor.data_ptr(), tensor._version) for tensor in tensors if self.lasting]

    def holds(self, batch: Any, rows: Rows, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether the pairs are those of `rows` of `batch`, mixed from `tensors` as they are now."""
        if self.batch is not batch or not self.lasting or self.tasks.shape != rows.tasks.shape:
            return False
        return all(now is of[0] for now, of in zip(tensors, self.of, strict=True)) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the tensors that the pairs were mixed from are as they were."""
        for tensor, _, pointer, version in self.of:
            if tensor.data_ptr() != pointer or tensor._version != version:
                return False
        return True


class Shortcut:
    """What `only` found out about a layer in a `generate`, for the next token to go straight to the products.

    It holds for one adapter on a plain `nn.Linear`, and as long as nothing that `only` looks at is another.
    """

    __slots__ = (
        "active", "base", "device_type", "dropout", "dtype", "each", "entry", "n_rows", "name", "one", "places", "rows",
    )  # fmt: skip

    @staticmethod
    def keep(kept: dict[Any, Any], layer: Linear, x: torch.Tensor, name: str, entry: Kept, rows: Rows) -> None:
        """Keep one for `layer` if it can have one."""
        base: Any = layer._modules["base_layer"]
        plain = type(base) is nn.Linear and not is_watched(base) and base._parameters.get("weight") is not None
        if plain and layer.active_adapters == [name] and x.dtype == entry.A.dtype and x.dim() > 1:
            kept[layer] = Shortcut(layer, x, name, base, entry, rows)

    def __init__(self, layer: Linear, x: torch.Tensor, name: str, base: Any, entry: Kept, rows: Rows) -> None:
        modules: Any = layer._modules
        router, dropout = modules["poly_router"]._modules[name], modules["poly_dropout"]._modules[name]
        A, B, logits = (of[0] for of in entry.of)
        self.name, self.active, self.base, self.entry, self.rows = name, layer._active_adapter, base, entry, rows
        self.n_rows, self.dtype, self.device_type = x.shape[0], x.dtype, x.device.type
        self.dropout = None if type(dropout) is nn.Identity else dropout
        self.one = (entry.A[0], entry.B[0]) if entry.A.shape[0] == 1 else None
        self.each = rows.index is None and entry.A.shape[0] == self.n_rows
        self.places: list[tuple[dict[str, Any], str, Any]] = [
            (modules, "base_layer", base),
            (modules["poly_router"]._modules, name, router),
            (modules["poly_lora_A"]._parameters, name, A),
            (modules["poly_lora_B"]._parameters, name, B),
            (router._parameters, "module_logits", logits),
        ]

    def leads(self, layer: Linear, x: torch.Tensor) -> bool:
        """Whether `layer(x)` may go this way."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(self.device_type)
            or layer.training
            or layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter != self.active
            or type(x) not in PLAIN_TENSORS
            or x.shape[0] != self.n_rows
            or x.dtype != self.dtype
            or (self.dropout is not None and self.dropout.training)
            or layer.task_context.current() is not self.entry.batch
            or is_watched(self.base)
        ):
            return False
        for where, key, thing in self.places:
            if where.get(key) is not thing:
                return False
        return self.entry.unchanged()

    def go(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """`layer(x)`."""
        parameters, scale = self.base._parameters, layer.scaling[self.name]
        weight, bias, A, B = parameters["weight"], parameters["bias"], self.entry.A, self.entry.B
        if x.dim() != 3 or x.shape[1] != 1 or not (self.one or self.each):
            return add_update(nn.functional.linear(x, weight, bias), x, A, B, scale, self.rows, True)
        tokens = x.squeeze(1)
        y = nn.functional.linear(tokens, weight, bias)
        if self.one is not None:
            return y.addmm_(torch.mm(tokens, self.one[0]), self.one[1], alpha=scale).unsqueeze(1)
        return y.unsqueeze(1).baddbmm_(torch.bmm(x, A), B, alpha=scale)
