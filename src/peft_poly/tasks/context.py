"""Which task each row of the current batch has: resolved once at the door, read by every layer.

    PeftModel(..., task_ids=ids)  ─┐                               ┌─▶ layer ─ batch.rows(adapter, x) ─▶ router
    use_task(model, ids)          ─┼─▶ TaskBatch ─▶ TaskContext ───┼─▶ layer
    set_task(task)                ─┘   (checked)    (entries.py)   └─▶ layer

Three things make this more than an argument: threads, coroutines and generators (`entries.py`), rows that a layer's
input does not have in its first dimension, or not at all (`calls.py`), and recomputation in the backward
(`recomputing.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Optional, Union

import torch

from ..config import PolyConfig
from .batch import TaskBatch
from .entries import Entries, Entry
from .ids import TaskIds, no_task_message, resolve_task, resolve_tasks, unknown_message, unknown_name

__all__ = ["TaskContext", "entered_context", "living_contexts"]


class TaskContext:
    """Knows the adapters' tasks and the batch that is being computed; shared by all layers of a model.

    Args:
        configs: the adapters' configs by name, the very dict that the model keeps, so that it is always up to date.
    """

    def __init__(self, configs: dict[str, Any]) -> None:
        self.configs = configs
        self.default: Optional[Union[int, str]] = None
        self.merged: dict[str, int] = {}
        self._forget()

    def _forget(self) -> None:
        self.entries = Entries()
        self.moves = 0  # how often ids have come to mean other tasks
        self.known_calls: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()  # see `calls.py`
        self.serving: Any = None  # what layers keep inside `with model.serving():`
        self._chosen: Union[int, str, dict[str, Union[int, str]], None] = None
        ALIVE.add(self)

    # A thread's current batch is not part of a copy.
    def __getstate__(self) -> dict[str, Any]:
        return {"configs": self.configs, "default": self.default, "merged": self.merged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.configs, self.default, self.merged = state["configs"], state["default"], state["merged"]
        self._forget()

    def poly_adapters(self) -> list[str]:
        """Names of the adapters of this method (transformers can keep other methods' adapters beside them)."""
        return [name for name, config in self.configs.items() if isinstance(config, PolyConfig)]

    def resolve(self, task_ids: TaskIds, adapters: Iterable[str], n_rows: Optional[int] = None) -> TaskBatch:
        """Check `task_ids` against every adapter in `adapters`; see `resolve_tasks` for what is accepted and raised."""
        ids, uniform, unknown = {}, {}, {}
        for name in adapters:
            ids[name], uniform[name] = resolve_tasks(task_ids, self.configs[name], name, n_rows)
            if (stranger := unknown_name(task_ids, self.configs[name])) is not None:
                unknown[name] = stranger
            if name in self.merged:
                self._check_merged(name, ids[name])
        return TaskBatch(task_ids, ids, uniform, unknown, moves=self.moves)

    def check_known(self, batch: TaskBatch) -> None:
        """Raise for names that the adapters do not have, which only evaluation lets in."""
        for name, task in batch.unknown.items():
            raise ValueError(
                f"{unknown_message(task, self.configs[name], name)} `unknown_task='mean'` answers for it in eval mode; "
                "to train it, add it with `add_tasks` first."
            )

    def _check_merged(self, name: str, ids: torch.Tensor) -> None:
        task, config = self.merged[name], self.configs[name]
        label = config.task_names[task] if config.task_names else task
        message = (
            f"Task {label!r} of adapter {name!r} is merged into the base weights, so no other task can be computed. "
            "Call `unmerge_adapter()` first."
        )
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            torch._assert_async((ids == task).all(), message)
        elif not bool((ids == task).all()):
            raise ValueError(f"{message} Got the ids {ids.tolist()}.")

    def of_call(self, task_ids: Optional[TaskIds], adapters: Sequence[str], n_rows: Optional[int]) -> TaskBatch | None:
        """The batch for a call at the door: the ids passed, else those of `use_task`, else those of `set_task`.

        Returns None where an adapter has just one task, which then needs no saying.

        Raises:
            ValueError: an adapter has several tasks and none was said; tasks were removed inside of `use_task`.
        """
        if task_ids is not None:
            return self.resolve(task_ids, adapters, n_rows)
        entry = self._entry()
        if entry is not None and entry.batch is not None:
            if entry.batch.moves != self.moves:
                raise ValueError(
                    f"Tasks or adapters were removed after these were entered: {entry.batch.given!r}. Their ids are "
                    "those of other tasks by now. Leave `use_task` before, and enter it again."
                )
            anew = [name for name in adapters if name not in entry.batch.ids or name in self.merged]
            if anew or (entry.batch.unknown and not entry.batch.in_call):  # they may have been added since
                return self.resolve(entry.batch.given, adapters, n_rows)
            return entry.batch
        default = self.default if entry is None or entry.default is None else entry.default
        recomputes = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if default is not None and not (recomputes and entry is None):
            return self.resolve(default, adapters)
        for name in adapters:
            if self.configs[name].n_tasks > 1 and name not in self.merged:
                if recomputes and entry is None:
                    raise ValueError(
                        "A backward computes a layer again, and nothing tells for which forward. torch's own "
                        "`torch.utils.checkpoint` is followed; anything else must enter the tasks of its forward "
                        "again, with `peft_poly.use_task(model, ...)` inside what it computes again."
                    )
                raise ValueError(no_task_message(self.configs[name], name))
        return None

    def one_task(self, adapter_name: str, task: Optional[Union[int, str]] = None) -> int:
        """The one task that merging or exporting is about: the argument, else the set one, else the only one.

        Raises:
            ValueError: the adapter has several tasks and none was chosen.
        """
        config = self.configs[adapter_name]
        if task is None:
            task = self._chosen.get(adapter_name) if isinstance(self._chosen, dict) else self._chosen
        if task is None:
            task = self.default
        if task is None and config.n_tasks > 1:
            raise ValueError(
                f"Adapter {adapter_name!r} has {config.n_tasks} tasks, and this needs one of them. Pass `task=`, or "
                "choose one with `model.set_task(...)`."
            )
        return resolve_task(0 if task is None else task, config, adapter_name)

    @contextmanager
    def choosing(self, task: Union[int, str, dict[str, Union[int, str]], None]) -> Iterator[None]:
        """For the time of a merge: the task of each adapter, or of all, that `one_task` answers with.

        Raises:
            ValueError: a key of `task` names no adapter.
        """
        for name in task if isinstance(task, dict) else ():
            if name not in self.configs:
                raise ValueError(f"There is no adapter {name!r}. There are: {sorted(self.configs)}.")
        before, self._chosen = self._chosen, task
        try:
            yield
        finally:
            self._chosen = before

    def has_one_task(self, adapter_name: str) -> bool:
        """Whether `one_task` needs no argument."""
        return self.default is not None or self.configs[adapter_name].n_tasks == 1

    @contextmanager
    def use(
        self,
        batch: Optional[TaskBatch],
        routing: Any = None,
        owner: Optional[FrameType] = None,
        default: Union[int, str, None] = None,
    ) -> Iterator[None]:
        """Make `batch` the current one of the running code, until the block ends.

        Args:
            batch: the tasks.
            routing: of all layers, for the one call that this is for; None if it may be for several.
            owner: the coroutine or generator that the block belongs to.
            default: the task that was set when the forward ran which this computes again.
        """
        local = self.entries
        entry = Entry(batch, local.top, owner, routing, default)
        local.top = entry
        try:
            yield
        finally:
            if torch.compiler.is_compiling():
                local.top = entry.outer
            else:
                local.leave(entry)

    @property
    def routing(self) -> Any:
        """The routing of all layers of the call that the running code is in, if it is one."""
        entry = self._entry()
        return None if entry is None else entry.routing

    def current(self) -> Optional[TaskBatch]:
        """The batch that the running code has entered."""
        entry = self._entry()
        return None if entry is None else entry.batch

    def set_now(self) -> Union[int, str, None]:
        """The task that calls without one get now."""
        entry = self._entry()
        return self.default if entry is None or entry.default is None else entry.default

    def _entry(self) -> Optional[Entry]:
        if torch.compiler.is_compiling():
            top = self.entries.top
            if top is not None and top.owner is not None:
                raise ValueError(
                    "`use_task` was entered in a coroutine or a generator, which a compiled model cannot tell from "
                    "others. Pass `task_ids=` to the call."
                )
            return top
        entry = self.entries.visible()
        # What was entered outside of a running backward belongs to another forward than the one that it recomputes.
        return entry if entry is not None and entry.backward == torch._C._current_graph_task_id() else None


ALIVE: weakref.WeakSet[TaskContext] = weakref.WeakSet()


def living_contexts() -> list[TaskContext]:
    """All contexts; those that the running code has entered come last, the innermost at the very end."""
    entries = [(context, context._entry()) for context in list(ALIVE)]
    return [context for context, _ in sorted(entries, key=lambda pair: -1 if pair[1] is None else pair[1].order)]


def entered_context() -> Optional[TaskContext]:
    """The context that the running code has entered last, for modules that belong to no adapted model; None for none.

    A compiled model cannot look for it.
    """
    last = [] if torch.compiler.is_compiling() else living_contexts()[-1:]
    return last[0] if last and last[0]._entry() is not None else None
