"""The record of a call: the tasks of its rows, and how the rows are repeated in `generate`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch

from .grouping import Rows, group_rows, ungrouped_rows
from .ids import TaskIds

__all__ = [
    "Generation",
    "TaskBatch",
    "current_generation",
    "generation",
    "how_rows_repeat",
    "kept_in_generation",
    "rows_left_message",
    "wrong_rows_message",
]

_generating = threading.local()


class Generation:
    """What a `generate` does to its rows, and what layers keep until it ends.

    Args:
        repeats: how often it repeats each row, one copy after the other (beams, returned sequences).
        doubled: it computes the batch twice over, one after the other (classifier-free guidance).
        outer: the `generate` that this one is part of.
    """

    def __init__(self, repeats: int = 1, doubled: bool = False, outer: Optional[Generation] = None) -> None:
        self.repeats, self.doubled = repeats, doubled
        self.kept: dict[Any, Any] = {} if outer is None else outer.kept
        self.n_rows: Optional[int] = None  # of the parts of this one, which must stay the same
        self.repeated: set[int] = set()  # modules, by id, that were called with the rows as it repeats them
        self.following: Any = None  # what has followed its rows from the start, where it is not transformers' own


def how_rows_repeat(model: Any, kwargs: dict[str, Any]) -> tuple[int, bool]:
    """What `model.generate(**kwargs)` does to its rows: `repeats` and `doubled` of `Generation`."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

    expands = (setting("num_beams"), setting("num_return_sequences"))  # to the larger of the two
    samples = getattr(getattr(model, "config", None), "num_parallel_samples", None)  # of models of time series
    prepares = getattr(model, "prepare_inputs_for_generation", None)
    doubles = prepares is not None and "guidance_scale" in inspect.signature(prepares).parameters
    return max(1, samples or 1, *(number or 1 for number in expands)), doubles and (setting("guidance_scale") or 0) > 1


@contextmanager
def generation(repeats: int = 1, doubled: bool = False) -> Iterator[Generation]:
    """Marks the calling thread as inside `generate`: rows may be repeated, and layers may keep what they mix."""
    before = current_generation()
    _generating.now = Generation(repeats, doubled, before)
    try:
        yield _generating.now
    finally:
        _generating.now = before


def current_generation() -> Optional[Generation]:
    """The `generate` that this thread is in."""
    now: Optional[Generation] = getattr(_generating, "now", None)
    return now


def kept_in_generation() -> Optional[dict[Any, Any]]:
    """What this thread's layers keep until its `generate` ends; None outside of one."""
    now = current_generation()
    return None if now is None else now.kept


class TaskBatch:
    """The checked tasks of the rows of one call.

    Args:
        given: what the caller passed.
        ids: for each adapter a LongTensor `(b,)`, or `(1,)` where one task serves all rows.
        uniform: for each adapter whether all rows are known to have the same task.
        unknown: for each adapter that does not have all the names, the first that it lacks.
        in_call: the model is being called with these very rows, so that its layers' inputs can be known to have them.
        moves: `TaskContext.moves` of the time when the ids were those of these tasks.
    """

    def __init__(
        self,
        given: TaskIds,
        ids: dict[str, torch.Tensor],
        uniform: dict[str, bool],
        unknown: Optional[dict[str, str]] = None,
        in_call: bool = False,
        moves: int = 0,
    ) -> None:
        self.given, self.ids, self.uniform, self.in_call = given, ids, uniform, in_call
        self.unknown, self.moves = unknown or {}, moves
        self.mixed = not all(uniform.values())
        self._grouped: dict[Any, Rows] = {}
        self._repeated: dict[Any, TaskBatch] = {}
        self._by_task: Optional[list[tuple[list[int], TaskBatch]]] = None

    @property
    def n_rows(self) -> int:
        """How many rows it has tasks for; 1 if one task serves any number."""
        return max(ids.shape[0] for ids in self.ids.values())

    def of_call(self, times: int = 1, doubled: bool = False) -> TaskBatch:
        """The record of a call whose rows are these, `times` each, the whole twice over if `doubled`; always the same
        object, by which layers know what they have kept.
        """
        key = (times, doubled)
        if key not in self._repeated:
            ids = {}
            for name, known in self.ids.items():
                if not self.uniform[name]:
                    known = known.repeat_interleave(times) if times > 1 else known
                    known = known.repeat(2) if doubled else known
                ids[name] = known
            self._repeated[key] = TaskBatch(self.given, ids, self.uniform, self.unknown, True, self.moves)
        return self._repeated[key]

    def by_task(self) -> list[tuple[list[int], TaskBatch]]:
        """The rows of each task, or of each combination of the adapters' tasks, and their record."""
        if self._by_task is None:
            of_row = zip(*(ids.expand(self.n_rows).tolist() for ids in self.ids.values()), strict=True)
            rows: dict[tuple[int, ...], list[int]] = {}
            for row, tasks in enumerate(of_row):
                rows.setdefault(tasks, []).append(row)
            self._by_task = []
            for tasks, members in rows.items():
                ids = {name: torch.tensor([task]) for name, task in zip(self.ids, tasks, strict=True)}
                uniform = dict.fromkeys(ids, True)
                one = TaskBatch(tasks[0], ids, uniform, self.unknown, self.in_call, self.moves)
                self._by_task.append((members, one))
        return self._by_task

    def rows(self, adapter_name: str, n_rows: int, layer: str = "layer") -> torch.Tensor:
        """The task ids of the rows of a layer's input, `(n_rows,)`, or `(1,)` if one task serves them all.

        Raises:
            ValueError: the input has another number of rows than the batch has tasks, and it is not what the running
                `generate` makes of them.
        """
        ids = self.ids[adapter_name]
        n_tasks = ids.shape[0]
        if self.uniform[adapter_name] or n_tasks == n_rows:
            return ids
        now = current_generation()
        if now is not None and not self.in_call and not now.doubled and n_rows == n_tasks * now.repeats:
            return ids.repeat_interleave(now.repeats)
        raise ValueError(wrong_rows_message(n_tasks, n_rows, layer))

    def grouped(self, adapter_name: str, n_rows: int, device: torch.device, layer: str = "layer") -> Rows:
        """The rows of a layer's input by task, on its device; worked out once per batch.

        Raises:
            ValueError: as `rows`.
        """
        key = (adapter_name, n_rows, device)
        if key not in self._grouped:
            ids = self.rows(adapter_name, n_rows, layer)
            known = ids.device.type == "cpu"  # else reading them would hold up the device
            self._grouped[key] = (group_rows(ids.tolist(), ids) if known else ungrouped_rows(ids)).to(device)
        return self._grouped[key]


def wrong_rows_message(n_tasks: int, n_rows: int, name: str) -> str:
    """The message for rows that are not those of the tasks."""
    return (
        f"task_ids has {n_tasks} entries but the input of {name} has {n_rows} rows. Pass one id per row, or one id or "
        "name for all rows. (A layer that sees flattened tokens or windows can only serve one task at a time; "
        "otherwise leave it out with `exclude_modules`.)"
    )


def rows_left_message(before: int, n_rows: int) -> str:
    """The message for a `generate` whose parts have now these rows, now those."""
    return (
        f"This `generate` computes {n_rows} of its {before} rows by themselves (as long recordings do when some have "
        "ended), and does not say which. With several tasks that cannot be followed: call it with one task, or row by "
        "row."
    )
