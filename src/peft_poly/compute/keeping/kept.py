"""What a layer keeps within one `generate`, and the way straight to its products.

Nothing outlives the call, and whoever changes what was kept was made of has it made anew. (`serving.py` keeps longer.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn

from ...tasks.batch import kept_in_generation
from ..adapted import Adapted
from ..base_layers import PLAIN_TENSORS, is_watched

__all__ = ["Kept", "Origin", "Shortcut", "shortcut_of"]

Products = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], float], torch.Tensor]


class Origin:
    """The tensors that something was made of, and what tells whether they are as they were.

    Whoever replaces, moves, casts or writes to a parameter changes its identity, its storage or its version. The
    storage is held, so that its address is not given to another. (A write through `.data` leaves no trace.)
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.lasting = not any(tensor.is_inference() or type(tensor) not in PLAIN_TENSORS for tensor in tensors)
        self.of = [(tensor, tensor.detach(), tensor.data_ptr(), tensor._version) for tensor in tensors if self.lasting]

    def is_of(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether it is these very tensors, as they are now."""
        return self.lasting and all(now is of[0] for now, of in zip(tensors, self.of, strict=True)) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the tensors are as they were."""
        for tensor, _, pointer, version in self.of:
            if tensor.data_ptr() != pointer or tensor._version != version:
                return False
        return True


class Kept:
    """What one layer and adapter have made of a batch's tasks in one `generate`, such as mixed pairs.

    Args:
        batch: the batch.
        tasks: LongTensor `(g,)`.
        tensors: what it was made of.
        values: what was made.
    """

    def __init__(
        self, batch: Any, tasks: torch.Tensor, tensors: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]
    ) -> None:
        self.batch, self.shape, self.origin, self.values = batch, tasks.shape, Origin(tensors), values

    def holds(self, batch: Any, tasks: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether the values are those of as many tasks of `batch`, made of `tensors` as they are now."""
        return self.batch is batch and self.shape == tasks.shape and self.origin.is_of(tensors)


class Shortcut:
    """What the long way found out about a layer, for the next call with the same tasks to go straight to the products.

    It holds for one adapter on a plain `nn.Linear`, and as long as nothing that the long way looks at is another.

    Args:
        layer: the layer.
        name: the adapter.
        x: an input like those to come, `(b, ..., in)`.
        batch: the tasks.
        pattern: the same as the host knows them, where a batch of equal tasks will do; None: this very batch alone.
        origin: what the values were made of.
        values: what is kept.
        products: `(y, x, values, scale)` adds the update to `y` in place and returns it.
    """

    __slots__ = (
        "active", "base", "batch", "casts", "device", "dropout", "dtype", "n_rows", "name", "origin", "pattern",
        "places", "products", "values",
    )  # fmt: skip

    def __init__(
        self,
        layer: Adapted,
        name: str,
        x: torch.Tensor,
        batch: Any,
        pattern: Optional[tuple[int, ...]],
        origin: Origin,
        values: tuple[torch.Tensor, ...],
        products: Products,
    ) -> None:
        modules: Any = layer._modules
        router, dropout = modules["poly_router"]._modules[name], modules["poly_dropout"]._modules[name]
        self.name, self.active, self.base = name, layer._active_adapter, modules["base_layer"]
        self.batch, self.pattern, self.origin, self.values = batch, pattern, origin, values
        self.products = products
        self.n_rows, self.dtype, self.device = x.shape[0], x.dtype, x.device
        self.casts = x.dtype != values[0].dtype
        self.dropout = None if type(dropout) is nn.Identity else dropout
        self.places: list[tuple[dict[str, Any], str, Any]] = [
            (modules, "base_layer", self.base),
            (modules["poly_router"]._modules, name, router),
            *((held._parameters, key, held._parameters.get(key)) for held, key in (
                (modules["poly_lora_A"], name), (modules["poly_lora_B"], name), (router, "module_logits"),
            )),
        ]  # fmt: skip

    @staticmethod
    def fits(layer: Adapted, name: str, x: torch.Tensor) -> bool:
        """Whether `layer` can have one."""
        base: Any = layer._modules["base_layer"]
        plain = type(base) is nn.Linear and not is_watched(base) and base._parameters.get("weight") is not None
        return plain and layer.active_adapters == [name] and x.dim() > 1 and layer.row_dim == 0

    def leads(self, layer: Adapted, x: torch.Tensor) -> bool:
        """Whether `layer(x)` may go this way."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(x) not in PLAIN_TENSORS
            or x.shape[0] != self.n_rows
            or x.dtype != self.dtype
            or x.device != self.device
            or torch.is_autocast_enabled(self.device.type)
            or layer.training
            or layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter != self.active
            or layer.row_dim != 0  # the rows lie elsewhere, or are another call's
            or (self.casts and not layer.cast_input_dtype_enabled)
            or (self.dropout is not None and self.dropout.training)
            or is_watched(self.base)
        ):
            return False
        batch = layer.task_context.current()
        if batch is not self.batch:
            if self.pattern is None or batch is None or self.name not in batch.ids:
                return False
            if batch.n_rows not in (1, self.n_rows):  # each row has several entries
                return False
            if batch.grouped(self.name, self.n_rows, self.device, layer.layer_name).pattern != self.pattern:
                return False
        for where, key, thing in self.places:
            if where.get(key) is not thing:
                return False
        return self.origin.unchanged()

    def go(self, layer: Adapted, x: torch.Tensor) -> torch.Tensor:
        """`layer(x)`."""
        parameters = self.base._parameters
        y = nn.functional.linear(x, parameters["weight"], parameters["bias"])
        return self.products(y, x.to(self.values[0].dtype) if self.casts else x, self.values, layer.scaling[self.name])


def shortcut_of(layer: Adapted) -> Optional[Shortcut]:
    """The layer's shortcut in the `generate` that this thread is in, or in the block in which its model serves."""
    kept = kept_in_generation()
    if kept is None:
        serving = layer.task_context.serving
        if serving is None:
            return None
        kept = serving.shortcuts
    found: Optional[Shortcut] = kept.get(layer)
    return found
