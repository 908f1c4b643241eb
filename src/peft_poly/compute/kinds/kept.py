"""What a layer keeps within one `generate`: its mixed pairs, and the way straight to its products.

Nothing outlives the call, and whoever changes what the pairs were mixed from has them mixed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...tasks.grouping import Rows
from ..adapted import Adapted
from ..base_layers import PLAIN_TENSORS, is_watched
from .mixing import add_update

__all__ = ["Kept", "Shortcut"]


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
        "active", "base", "casts", "device_type", "dropout", "dtype", "each", "entry", "n_rows", "name", "one",
        "places", "rows",
    )  # fmt: skip

    @staticmethod
    def keep(kept: dict[Any, Any], layer: Adapted, x: torch.Tensor, name: str, entry: Kept, rows: Rows) -> None:
        """Keep one for `layer` if it can have one."""
        base: Any = layer._modules["base_layer"]
        plain = type(base) is nn.Linear and not is_watched(base) and base._parameters.get("weight") is not None
        if plain and layer.active_adapters == [name] and x.dim() > 1:
            kept[layer] = Shortcut(layer, x, name, base, entry, rows)

    def __init__(self, layer: Adapted, x: torch.Tensor, name: str, base: Any, entry: Kept, rows: Rows) -> None:
        modules: Any = layer._modules
        router, dropout = modules["poly_router"]._modules[name], modules["poly_dropout"]._modules[name]
        A, B, logits = (of[0] for of in entry.of)
        self.name, self.active, self.base, self.entry, self.rows = name, layer._active_adapter, base, entry, rows
        self.n_rows, self.dtype, self.device_type = x.shape[0], x.dtype, x.device.type
        self.casts = x.dtype != entry.A.dtype
        self.dropout = None if type(dropout) is nn.Identity else dropout
        self.one = entry.A.dim() == 2
        self.each = not self.one and rows.index is None and entry.A.shape[0] == self.n_rows
        self.places: list[tuple[dict[str, Any], str, Any]] = [
            (modules, "base_layer", base),
            (modules["poly_router"]._modules, name, router),
            (modules["poly_lora_A"]._parameters, name, A),
            (modules["poly_lora_B"]._parameters, name, B),
            (router._parameters, "module_logits", logits),
        ]

    def leads(self, layer: Adapted, x: torch.Tensor) -> bool:
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
            or (self.casts and not layer.cast_input_dtype_enabled)
            or (self.dropout is not None and self.dropout.training)
            or layer.task_context.current() is not self.entry.batch
            or is_watched(self.base)
        ):
            return False
        for where, key, thing in self.places:
            if where.get(key) is not thing:
                return False
        return self.entry.unchanged()

    def go(self, layer: Adapted, x: torch.Tensor) -> torch.Tensor:
        """`layer(x)`."""
        parameters, scale = self.base._parameters, layer.scaling[self.name]
        weight, bias, A, B = parameters["weight"], parameters["bias"], self.entry.A, self.entry.B
        if self.casts or x.dim() != 3 or x.shape[1] != 1 or not (self.one or self.each):
            y = nn.functional.linear(x, weight, bias)
            return add_update(y, x.to(A.dtype), A, B, scale, self.rows, True)
        tokens = x.squeeze(1)
        y = nn.functional.linear(tokens, weight, bias)
        if self.one:
            return y.addmm_(torch.mm(tokens, A), B, alpha=scale).unsqueeze(1)
        return y.unsqueeze(1).baddbmm_(torch.bmm(x, A), B, alpha=scale)
