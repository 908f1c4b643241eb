"""Mixed pairs that outlive a call: what a layer keeps inside `with model.serving():`.

    task ──▶ pair (in, r), (r, out)                              the least recently used go beyond `max_tasks`
    the tasks of the rows ──▶ pairs of the rows (g, in, r), ...   stacked of those; the latest few are kept

The block is a promise that no parameter changes. A change is an error where it is made, if it is made by a verb of the
model, an optimizer or `train()`, and else at the next call of the layer whose parameter it was.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...tasks.context import TaskContext
from ...tasks.grouping import Rows
from ..adapted import Adapted
from .kept import Origin

__all__ = ["Serving", "check_not_serving", "serving"]

Pair = tuple[torch.Tensor, torch.Tensor]


class Serving:
    """What the layers of a model keep while it serves; threads share it.

    Args:
        max_tasks: most tasks that a layer keeps pairs of; None: all that come.

    Attributes:
        max_tasks: the same.
    """

    def __init__(self, max_tasks: Optional[int] = None) -> None:
        self.max_tasks = max_tasks
        self.blocks = 0
        self.shortcuts: dict[Any, Any] = {}
        self._layers: dict[Any, _LayerPairs] = {}
        self._lock = threading.RLock()

    def pairs(
        self,
        layer: Adapted,
        name: str,
        rows: Rows,
        tensors: tuple[torch.Tensor, ...],
        mix: Callable[[torch.Tensor], Pair],
    ) -> Pair:
        """The pairs of `rows`, `(g, in, r), (g, r, out)`, or `(in, r), (r, out)` if they are of one task.

        Args:
            layer: the layer.
            name: the adapter.
            rows: the rows by task, known to the host.
            tensors: what the pairs are mixed from.
            mix: makes the pairs of tasks `(g,)`.

        Raises:
            RuntimeError: a parameter has changed inside the block.
        """
        assert rows.key is not None
        with self._lock:
            held = self._layers.get((layer, name))
            if held is None:
                held = self._layers[layer, name] = _LayerPairs(self.max_tasks, Origin(tensors))
            if not held.origin.lasting:  # nothing would tell of a change, so nothing is kept
                A, B = mix(rows.tasks)
                return A, B
            if not held.origin.is_of(tensors):
                raise RuntimeError(
                    f"A parameter of adapter {name!r} in {layer.layer_name} has changed inside "
                    "`with model.serving():`, whose pairs were mixed before. Leave the block before parameters change."
                )
            return held.of(rows, mix)

    @property
    def n_tasks(self) -> int:
        """Most tasks that a layer has a pair of now."""
        with self._lock:
            return max((len(held.single) for held in self._layers.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs that are kept now."""
        with self._lock:
            return sum(
                tensor.numel() * tensor.element_size()
                for held in self._layers.values()
                for pairs in (held.single, held.stacked)
                for pair in pairs.values()
                for tensor in pair
            )

    def __repr__(self) -> str:
        return f"Serving(max_tasks={self.max_tasks}, n_tasks={self.n_tasks}, nbytes={self.nbytes})"


class _LayerPairs:
    """The pairs of one layer and adapter, the least recently used first."""

    def __init__(self, max_tasks: Optional[int], origin: Origin) -> None:
        self.max_tasks, self.origin = max_tasks, origin
        self.single: OrderedDict[int, Pair] = OrderedDict()
        self.stacked: OrderedDict[tuple[int, ...], Pair] = OrderedDict()

    def of(self, rows: Rows, mix: Callable[[torch.Tensor], Pair]) -> Pair:
        key = rows.key
        assert key is not None
        if key in self.stacked:
            self.stacked.move_to_end(key)
            return self.stacked[key]
        found = self._singles(list(dict.fromkeys(key)), rows.tasks.device, mix)
        if len(key) == 1:
            return found[key[0]]
        A = torch.stack([found[task][0].mT for task in key]).mT  # (r, in) in memory, which one token reads the fastest
        pair = A, torch.stack([found[task][1] for task in key])
        self._keep(key, pair)
        return pair

    def _singles(self, tasks: list[int], device: torch.device, mix: Callable[[torch.Tensor], Pair]) -> dict[int, Pair]:
        missing = [task for task in tasks if task not in self.single]
        if missing:
            A, B = mix(torch.tensor(missing, device=device))
            each = [(A, B)] if A.dim() == 2 else zip(A.unbind(), B.unbind(), strict=True)
            for task, (A_t, B_t) in zip(missing, each, strict=True):
                # a copy each: a part of a larger tensor would keep the whole of it
                self.single[task] = (A_t.clone(), B_t.clone()) if len(missing) > 1 else (A_t, B_t)
        found = {}
        for task in tasks:
            self.single.move_to_end(task)
            found[task] = self.single[task]
        while self.max_tasks is not None and len(self.single) > self.max_tasks:
            self.single.popitem(last=False)
        return found

    def _keep(self, key: tuple[int, ...], pair: Pair) -> None:
        """Keep a stack; all of them have no more pairs than there are (or may be) single ones."""
        most = len(self.single) if self.max_tasks is None else self.max_tasks
        self.stacked[key] = pair
        while self.stacked and sum(map(len, self.stacked)) > max(most, 1) and len(self.stacked) > 1:
            self.stacked.popitem(last=False)
        if self.max_tasks is not None and len(key) > self.max_tasks:
            del self.stacked[key]


@contextmanager
def serving(context: TaskContext, parameters: Any, max_tasks: Optional[int]) -> Iterator[Serving]:
    """See `PolyModel.serving`.

    Args:
        context: of the model.
        parameters: those that an optimizer must not step on inside.
        max_tasks: most tasks that a layer keeps.

    Raises:
        ValueError: `max_tasks` is no positive integer, or not that of the block that is open.
    """
    if max_tasks is not None and (isinstance(max_tasks, bool) or not isinstance(max_tasks, int) or max_tasks < 1):
        raise ValueError(f"`max_tasks` must be a positive integer, or None for no limit, got {max_tasks!r}.")
    store = context.serving
    if store is None:
        store = context.serving = Serving(max_tasks)
    elif store.max_tasks != max_tasks:
        raise ValueError(f"The model serves already, with max_tasks={store.max_tasks!r}, got {max_tasks!r}.")
    store.blocks += 1
    ids = {id(parameter) for parameter in parameters}

    def refuse(optimizer: Any, *args: Any) -> None:
        if any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(
                "An optimizer step inside `with model.serving():`, which promises that no parameter changes. Leave the "
                "block first."
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield store
    finally:
        hook.remove()
        store.blocks -= 1
        if not store.blocks:
            context.serving = None


def check_not_serving(context: TaskContext, what: str) -> None:
    """Raise `RuntimeError` if the model serves: `what`, such as "`add_tasks`", would change parameters."""
    if context.serving is not None:
        raise RuntimeError(
            f"{what} inside `with model.serving():`, which promises that no parameter changes. Leave the block first."
        )
