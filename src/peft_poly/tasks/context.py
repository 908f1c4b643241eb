"""Which task each row of the current batch has: resolved once at the door, read by every layer.

    PeftModel(..., task_ids=ids)  ─┐                               ┌─▶ layer ─ batch.rows(adapter, x) ─▶ router
    use_task(model, ids)          ─┼─▶ TaskBatch ─▶ TaskContext ───┼─▶ layer
    set_task(task)                ─┘   (checked)    (per thread)   └─▶ layer

Three things make this more than an argument:

- **threads**: the current batch sits in a `threading.local`, the one per-thread store that `torch.compile` traces too;
- **recomputation**: gradient checkpointing runs layers again inside the backward, when the forward's context is long
  gone. A hook on the outputs of the forward notes which backward belongs to which batch;
- **generation** repeats rows (beams, returned sequences): there, and only there, the ids follow.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from torch.utils import _pytree as pytree

from ..config import PolyConfig
from .grouping import Rows, group_rows, ungrouped_rows
from .ids import TaskIds, no_task_message, resolve_task, resolve_tasks, unknown_message, unknown_name

__all__ = ["TaskBatch", "TaskContext", "generation", "kept_in_generation"]

_generating = threading.local()


@contextmanager
def generation() -> Iterator[None]:
    """Marks the calling thread as inside `generate`: rows may be repeated, and layers may keep what they mix."""
    before = getattr(_generating, "kept", None)
    _generating.kept = {} if before is None else before
    try:
        yield
    finally:
        _generating.kept = before


def kept_in_generation() -> Optional[dict[Any, Any]]:
    """What this thread's layers keep until its `generate` ends; None outside of one."""
    return getattr(_generating, "kept", None)


class TaskBatch:
    """The checked tasks of one batch.

    Args:
        given: what the caller passed.
        ids: for each adapter a LongTensor `(b,)`, or `(1,)` where one task serves all rows.
        uniform: for each adapter whether all rows are known to have the same task.
        unknown: for each adapter that does not have all the names, the first that it lacks.
    """

    def __init__(
        self,
        given: TaskIds,
        ids: dict[str, torch.Tensor],
        uniform: dict[str, bool],
        unknown: Optional[dict[str, str]] = None,
    ) -> None:
        self.given = given
        self.ids = ids
        self.uniform = uniform
        self.unknown = unknown or {}
        self._grouped: dict[Any, Rows] = {}

    def repeat(self, n_rows: Optional[int], times: int) -> TaskBatch:
        """The batch with each of its `n_rows` repeated, as a model that flattens `(b, choices, l)` does; once only."""
        ids = {
            name: ids.repeat_interleave(times) if ids.shape[0] == n_rows and not self.uniform[name] else ids
            for name, ids in self.ids.items()
        }
        return TaskBatch(self.given, ids, self.uniform, self.unknown)

    def rows(self, adapter_name: str, n_rows: int, layer: str = "layer") -> torch.Tensor:
        """The task ids of the rows of a layer's input, `(n_rows,)`, or `(1,)` if one task serves them all.

        Raises:
            ValueError: the input has another number of rows than the batch has tasks, outside of generation.
        """
        ids = self.ids[adapter_name]
        n_tasks = ids.shape[0]
        if self.uniform[adapter_name] or n_tasks == n_rows:
            return ids
        if kept_in_generation() is not None and n_rows % n_tasks == 0:
            return ids.repeat_interleave(n_rows // n_tasks)
        raise ValueError(
            f"task_ids has {n_tasks} entries but the input of {layer} has {n_rows} rows. Pass one id per row, or one "
            "id or name for all rows. (A layer that sees flattened tokens or windows can only serve one task at a "
            "time; otherwise leave it out with `exclude_modules`.)"
        )

    def grouped(self, adapter_name: str, n_rows: int, device: torch.device, layer: str = "layer") -> Rows:
        """The rows of a layer's input by task, on its device; worked out once per batch.

        Raises:
            ValueError: as `rows`.
        """
        key = (adapter_name, n_rows, device)
        if key not in self._grouped:
            ids = self.rows(adapter_name, n_rows, layer)
            known = ids.device.type == "cpu"  # else reading them would hold up the device
            self._grouped[key] = (group_rows(ids.tolist()) if known else ungrouped_rows(ids)).to(device)
        return self._grouped[key]


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
        self._local = _Local()
        self.serving: Any = None  # what layers keep inside `with model.serving():`
        self._chosen: Union[int, str, dict[str, Union[int, str]], None] = None
        self._notes: weakref.WeakValueDictionary[int, _Backward] = weakref.WeakValueDictionary()

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
        return TaskBatch(task_ids, ids, uniform, unknown)

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
            ValueError: an adapter has several tasks and none was said.
        """
        if task_ids is not None:
            return self.resolve(task_ids, adapters, n_rows)
        entered = self.current()
        if entered is not None:
            anew = [name for name in adapters if name not in entered.ids or name in self.merged]
            if anew or entered.unknown:  # which a task that was added since may have become
                return self.resolve(entered.given, adapters, n_rows)
            return entered
        if self.default is not None:
            return self.resolve(self.default, adapters)
        for name in adapters:
            if self.configs[name].n_tasks > 1 and name not in self.merged:
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
    def use(self, batch: Optional[TaskBatch], weights: Any = None) -> Iterator[None]:
        """Make `batch` the current one of this thread, and put the one before back afterwards.

        Args:
            batch: the tasks.
            weights: mixing weights for the one call that this is for; None if it may be for several.
        """
        local = self._local
        before = local.entry, local.weights
        local.entry = (batch, -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id())
        local.weights = weights
        try:
            yield
        finally:
            local.entry, local.weights = before

    @property
    def weights(self) -> Any:
        """Mixing weights of the call that this thread is in, if it is one."""
        return self._local.weights

    def current(self) -> Optional[TaskBatch]:
        """The batch being computed: the one entered in this thread, or the one whose backward is recomputing us."""
        batch, entered_in = self._local.entry or (None, -1)
        if torch.compiler.is_compiling():
            return batch
        backward = torch._C._current_graph_task_id()
        if backward == entered_in:
            return batch
        # Inside a backward (-1: not): a recomputation. What this thread entered before belongs to another forward.
        note = self._notes.get(backward)
        if note is not None:
            self._local.recomputed_in = backward
        else:  # a checkpoint inside a checkpoint has a backward of its own, inside that of the outer one
            note = self._notes.get(self._local.recomputed_in)
        return batch if note is None else note.batch

    def note_outputs(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the base model: lets the backward of `output` know the batch it belongs to.

        An object that torch cannot look into is searched by its attributes.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        batch = self.current()
        if batch is None:
            return
        for leaf in pytree.tree_leaves(output):
            known = isinstance(leaf, (torch.Tensor, torch.nn.Module))
            for tensor in [leaf] if known else pytree.tree_leaves(getattr(leaf, "__dict__", None)):
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(_Note(self, batch))

    def _take_note(self, batch: TaskBatch) -> None:
        backward = torch._C._current_graph_task_id()
        note = self._notes.get(backward)
        if note is None:
            note = self._notes[backward] = _Backward(batch)
            # The engine alone keeps the note alive: it goes when the backward ends, even if it fails.
            torch.autograd.Variable._execution_engine.queue_callback(note.keep)
        note.batch = batch


class _Local(threading.local):
    """What one thread is at; there from the start, since the compiler would guard on its absence."""

    def __init__(self) -> None:
        self.entry: Optional[tuple[Optional[TaskBatch], int]] = None
        self.recomputed_in = -1
        self.weights: Any = None


class _Backward:
    """A running backward, and the batch that it has come to."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def keep(self) -> None:
        """Called back at the end; does nothing but be held until then."""


class _Note:
    """Gradient hook: says at the start of a backward which batch it is of."""

    def __init__(self, context: TaskContext, batch: TaskBatch) -> None:
        self.context, self.batch = context, batch

    def __call__(self, grad: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.context._take_note(self.batch)
