"""One operation of torch, as a `TorchDispatchMode` sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Operation", "tensors_in"]


class Operation:
    """What runs, and what it is given.

    Args:
        func: the operator (`torch._ops.OpOverload`).
        args: by position.
        kwargs: by name.

    Attributes:
        name: its name, without namespace; the one in place has that of the other: `add` for `aten::add_`.
    """

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func._schema.name.split("::")[1].rstrip("_")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it is given, those in lists too."""
        return tensors_in((self.args, self.kwargs))

    def dims(self, n_dims: int) -> list[int]:
        """The dimensions that it is told to work on, counted from the front, in a tensor of so many."""
        for at, argument in enumerate(self.func._schema.arguments):
            if argument.name in ("dim", "dims", "dim0", "axis"):
                told = self.args[at] if at < len(self.args) else self.kwargs.get(argument.name, argument.default_value)
                told = [told] if isinstance(told, int) else told
                return [dim % n_dims for dim in told or () if isinstance(dim, int) and n_dims]
        return []


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
