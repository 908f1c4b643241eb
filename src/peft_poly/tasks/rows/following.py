"""Follows the rows of a call through its operations, once, to know where in a layer's input they are.

A shape cannot tell: two images of one row, four tokens of four rows, a token that an expert got of each. So the
operations of one real call are watched (nothing is computed twice). One number is noted for each storage: how far
apart in memory the rows lie. It holds for every view of it. A dimension of that stride, with as many entries as there
are rows, is that of the rows; with `m` times as many at an `m`-th of the stride, each row has `m` of them, one after
the other (choices, windows, flattened tokens). Other operations keep the place of the first input that has one, if the
sizes say that they can. What stems from no row (a table of positions, images beside text), or was
picked by a condition (the tokens of an expert), has no place. Nor has what holds the rows in another order, and what
that is written to or computed with: the place of others there is not that of its rows.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .operations import Operation, tensors_in

__all__ = ["Following"]

Place = tuple[int, int]  # dimension of the rows, and how many entries of it each row has
Places = list[tuple[torch.Tensor, Place]]
LEFT = ("embedding",)  # operations that append dimensions; others put new ones in front
FILLED = ("zeros", "ones", "full")
MADE_ANEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
PRODUCTS = {"mm": 0, "addmm": 1, "dot": 0, "mv": 0, "bmm": 0, "baddbmm": 1}  # where the first of two factors is
TAKES = ("index_select", "gather")
WRITES = ("index_put", "index_copy", "index_add", "index_reduce", "scatter", "scatter_add", "scatter_reduce")


class Following(TorchDispatchMode):
    """Context manager that watches the operations of a call.

    Args:
        n_rows: number of rows of the call, at least 2.
        alone: all that the call was given has these rows. What is filled with one number for as many rows, such as the
            first tokens of a decoder, is then taken to be theirs, where nothing tells otherwise.
    """

    def __init__(self, n_rows: int, alone: bool = False) -> None:
        super().__init__()
        self.n_rows, self.alone = n_rows, alone
        self._steps: dict[int, tuple[StorageWeakRef, int]] = {}  # by storage: bytes from row to row
        self._filled: set[int] = set()  # those storages that stem from no row
        self._moved: set[int] = set()  # those that hold the rows in another order
        self._counted: dict[int, StorageWeakRef] = {}  # those of `arange`

    def start(self, tensor: torch.Tensor) -> None:
        """Note a tensor whose first dimension is that of the rows, or has some entries for each."""
        if tensor.dim() and tensor.shape[0] and tensor.shape[0] % self.n_rows == 0 and tensor.stride(0):
            self._note(tensor, (0, tensor.shape[0] // self.n_rows))

    def place(self, tensor: Any) -> Optional[Place]:
        """Where the rows are in a tensor; None if nowhere, or if nothing is known of it."""
        return None if self._is_moved(tensor) else self._place(tensor)

    def _is_moved(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and _storage(tensor) in self._moved

    def _place(self, tensor: Any) -> Optional[Place]:
        """Where rows are in a tensor, in whatever order."""
        found = self._steps.get(_storage(tensor)) if isinstance(tensor, torch.Tensor) else None
        if found is None:
            return None
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size and size % self.n_rows == 0 and stride * tensor.itemsize * (size // self.n_rows) == found[1]:
                return dim, size // self.n_rows
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.startswith("aten::") and func._can_decompose():
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        operation = Operation(func, args, kwargs)
        tensors = operation.tensors
        places: Places = []
        moved: Places = []
        for tensor in tensors:
            if (place := self._place(tensor)) is not None:
                (moved if self._is_moved(tensor) else places).append((tensor, place))
        made = func(*args, **kwargs)
        if not tensors:
            self._note_constant(operation, made)
        elif not (places or moved) and operation.name in ("cat", "stack"):
            self._note_joined(operation, made)
        elif not self._note_moved(operation, places, moved, made) and places:
            self._note_made(operation, places, made)
        return made

    def _note_constant(self, operation: Operation, made: torch.Tensor) -> None:
        if self.alone and operation.name in FILLED and made.dim() > 1 and made.shape[0] == self.n_rows:
            self._note(made, (0, 1), filled=True)
        elif operation.name == "arange":
            self._counted[_storage(made)] = StorageWeakRef(made.untyped_storage())

    def _note_moved(self, operation: Operation, places: Places, moved: Places, made: Any) -> bool:
        """Whether an operation gives the rows in another order, its own or that of an input."""
        name, found = operation.name, [*places, *moved]
        asks = name in PRODUCTS or "attention" in name  # the row that asks is the row, whatever it gets
        if name.startswith("new_") or name.endswith("_like") or (asks and places):
            moved = []
        any_moved = False
        for out in tensors_in(made):
            place = self._place_after(operation, moved, out)
            for tensor, own in found:
                if place is None and self._reorders(operation, tensor, own, made):
                    place = own if out.dim() == tensor.dim() and out.shape[own[0]] == tensor.shape[own[0]] else None
            if place is not None:
                self._note(out, place, moved=True)
                any_moved = True
        return any_moved

    def _note_made(self, operation: Operation, places: Places, made: Any) -> None:
        certain = [(tensor, place) for tensor, place in places if _storage(tensor) not in self._filled]
        places, filled = certain or places, not certain
        if operation.name == "index":
            self._note_indexed(operation.args[0], operation.args[1], made)
        elif (written := self._written(operation)) is not None:
            (dim, each), order = written
            self._steps.pop(_storage(made), None)
            if self._crosses(order, min(dim, order.dim() - 1), each):
                self._note(made, (dim, each), moved=True)
        elif torch.Tag.dynamic_output_shape not in operation.func.tags:
            for tensor in tensors_in(made):
                place = self._place_after(operation, places, tensor) if self._is_new(tensor, filled) else None
                if place is not None:
                    self._note(tensor, place, filled)

    def _is_new(self, tensor: torch.Tensor, filled: bool) -> bool:
        key = _storage(tensor)
        return key not in self._steps or (key in self._filled and not filled)

    def _note(self, tensor: torch.Tensor, place: Place, filled: bool = False, moved: bool = False) -> None:
        dim, each = place
        key, step = _storage(tensor), tensor.stride(dim) * tensor.itemsize * each
        if key and step:
            self._steps[key] = (StorageWeakRef(tensor.untyped_storage()), step)
            (self._filled.add if filled else self._filled.discard)(key)
            (self._moved.add if moved else self._moved.discard)(key)

    def _place_after(self, operation: Operation, places: Places, out: torch.Tensor) -> Optional[Place]:
        name = operation.name
        for tensor, (dim, each) in places:
            if name in MADE_ANEW and out.shape != tensor.shape:
                continue
            if name in PRODUCTS:
                first, second = operation.args[PRODUCTS[name] : PRODUCTS[name] + 2]
                kept = (tensor is first and dim != tensor.dim() - 1) or (tensor is second and dim != tensor.dim() - 2)
                if kept and dim < out.dim() and out.shape[dim] == tensor.shape[dim]:
                    return dim, each
                continue
            reduced = operation.dims(tensor.dim())
            if name == "stack":
                new = reduced[0] if reduced else 0
                after = [dim if dim < new else dim + 1]
            elif dim in reduced:
                continue
            elif out.dim() < tensor.dim():
                after = [dim - sum(other < dim for other in reduced)]
            else:
                after = [dim + out.dim() - tensor.dim(), dim]
                after = after[::-1] if name in LEFT else after
            for new in after:
                if 0 <= new < out.dim() and out.shape[new] == tensor.shape[dim]:
                    return new, each
        return None

    def _reorders(self, operation: Operation, tensor: torch.Tensor, place: Place, made: Any) -> bool:
        """Whether an operation takes the rows of a tensor in another order, in this call."""
        name, args, dims, (dim, each) = operation.name, operation.args, operation.dims(tensor.dim()), place
        if name in ("flip", "roll"):
            return dim in dims or not dims
        if name == "index":
            given = [(at, index) for at, index in enumerate(args[1]) if index is not None]
            return tensor is args[0] and [at for at, _ in given] == [dim] and self._crosses(given[0][1], 0, each)
        if dim not in dims or name not in (*TAKES, "sort") or tensor is not args[0]:
            return False
        order = made[1] if name == "sort" else args[2]
        return self._crosses(order, min(dim, order.dim() - 1), each)

    def _note_joined(self, operation: Operation, made: torch.Tensor) -> None:
        """Parts of one tensor, none of which has all rows, put together in their order or in another one."""
        name, parts, (dim, *_) = operation.name, operation.args[0], operation.dims(made.dim())
        (key, *others) = {_storage(part) for part in parts}
        if others or key not in self._steps or key in self._moved:
            return
        step, strides = self._steps[key][1], {part.stride(dim) * part.itemsize for part in parts if name == "cat"}
        each = step // max(strides) if len(strides) == 1 and 0 < max(strides) <= step else 1
        if made.shape[dim] != self.n_rows * each or (strides and strides != {step // each}):
            return
        starts = [part.storage_offset() * part.itemsize for part in parts]
        if name == "cat" or len({start % step for start in starts}) == 1:
            self._note(made, (dim, each), moved=starts != sorted(set(starts)))

    def _crosses(self, order: torch.Tensor, dim: int, each: int) -> bool:
        """Whether numbers of entries, in an order, are those of other rows."""
        size = self.n_rows * each
        if order.is_meta or order.dim() == 0 or order.dtype == torch.bool or order.shape[dim] != size:
            return False
        rows = torch.arange(size, device=order.device).view(-1, *[1] * (order.dim() - 1)) // each
        return bool((order.movedim(dim, 0) % size // each != rows).any())

    def _written(self, operation: Operation) -> Optional[tuple[Place, torch.Tensor]]:
        """Where rows are written to other places than their own, and to which: `y[order] = x`."""
        name, args = operation.name, operation.args
        if name not in WRITES:
            return None
        place = self.place(args[2] if name == "index_put" else args[3])
        if place is None:
            return None
        into = self.place(args[0]) or place
        if name == "index_put":
            order = args[1][into[0]] if into[0] < len(args[1]) else None
        else:
            order = args[2] if args[1] % args[0].dim() == into[0] else None
        return None if order is None or _storage(order) in self._counted else (into, order)

    def _note_indexed(self, tensor: torch.Tensor, indices: list[Optional[torch.Tensor]], out: torch.Tensor) -> None:
        """`x[:, i, j]`: the rows stay where no index picks among them; `x[arange(b), i]` has those of `i`."""
        given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        if not given or any(index.dtype in (torch.bool, torch.uint8) for _, index in given):
            return
        first, last = given[0][0], given[-1][0]
        width = max(index.dim() for _, index in given)
        place = self.place(tensor)
        picked = [dim for dim, _ in given]
        if place is not None and place[0] not in picked:
            if last - first + 1 == len(given) and place[0] > last:
                self._note(out, (place[0] - len(given) + width, place[1]))
            elif last - first + 1 == len(given):
                self._note(out, place)
            return
        for dim, index in given:
            found = self.place(index)
            if found is None or (place is not None and dim == place[0]):
                continue
            to = found[0] + width - index.dim() + (first if last - first + 1 == len(given) else 0)
            if out.shape[to] == index.shape[found[0]]:
                self._note(out, (to, found[1]))
                return


def _storage(tensor: torch.Tensor) -> int:
    """What tells a tensor's storage from others; 0 if it has none that could be told."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0
