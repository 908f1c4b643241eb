"""The calls of a task-routed model: forward and `generate`, each within the context that its layers read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional, cast

import torch

from ..compute.call_routing import CallRouting
from ..layer import Linear, PolyLayer
from ..tasks.batch import generation, how_rows_repeat, kept_in_generation
from ..tasks.context import TaskContext
from ..tasks.ids import TaskIds, rows_of_call
from ..tasks.rows.calls import follow_own_generate
from ..tasks.transforms import is_transformed
from .labelled.heads import TaskHeads

__all__ = ["PASSED", "RoutedCalls"]

PASSED = "_task_ids_of_base_model"  # PEFT's classes take `task_ids` out of a call, and hand on what they do not know

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as _Tuner
else:
    _Tuner = object


class RoutedCalls(_Tuner):
    """Mixin of `PolyModel`: what opens and closes the context of a call."""

    task_context: TaskContext
    ids_position: Optional[int]
    _adapted: Optional[list[PolyLayer]]

    def forward(self, *args: Any, task_ids: Optional[TaskIds] = None, **kwargs: Any) -> Any:
        """The base model's forward, routed.

        Args:
            args: arguments of the base model.
            task_ids: tasks of the rows, as in `PolyModel.routed`.
            kwargs: arguments of the base model.

        Returns:
            What the base model returns. One whose own `forward` takes `task_ids` gets what was passed.

        Raises:
            ValueError: as `PolyModel.routed`.
        """
        passed = kwargs.pop(PASSED, task_ids)
        if task_ids is None and self.ids_position is not None and len(args) > self.ids_position:
            task_ids = args[self.ids_position]
        with self.routed(args, kwargs, task_ids):
            if passed is not None and self.ids_position is not None:
                kwargs["task_ids"] = passed
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, task_ids: Optional[TaskIds] = None, **kwargs: Any) -> Any:
        """The base model's `generate`, routed; rows that it repeats (beams, returned sequences) keep their task.

        Args:
            args: arguments of the base model.
            task_ids: tasks of the rows, as in `PolyModel.routed`.
            kwargs: arguments of the base model.

        Returns:
            What the base model returns.

        Raises:
            ValueError: as `PolyModel.routed`.
        """
        with self.routed_generate(args, kwargs, task_ids):
            if task_ids is not None and self.ids_position is not None:
                kwargs["task_ids"] = task_ids
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def routed_generate(
        self, args: tuple, kwargs: dict[str, Any], task_ids: Optional[TaskIds] = None
    ) -> Iterator[None]:
        """As `routed`, for `generate`: transformers', or the model's own.

        Args:
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            task_ids: tasks of the rows, as in `routed`.

        Raises:
            ValueError: as `routed`.
        """
        with (
            generation(*how_rows_repeat(self.model, kwargs)),
            self.routed(args, kwargs, task_ids),
            follow_own_generate(self.model, self.task_context, args, kwargs),
        ):
            yield

    @contextmanager
    def routed(self, args: tuple, kwargs: dict[str, Any], task_ids: Optional[TaskIds] = None) -> Iterator[None]:
        """The context of one call: checks its tasks and makes them known to the layers.

        Args:
            args: positional arguments of the call, which tell the number of rows.
            kwargs: its keyword arguments.
            task_ids: a tensor `(b,)` or `(b, 1)`, a list of ids or names, one id or name for all rows; None for those
                of `use_task` or `set_task`.

        Raises:
            ValueError: the tasks are unknown, out of range, or not as many as rows; or none was said.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError("`adapter_names` is for LoRA; the rows of a task-routed adapter take `task_ids`.")
        active = [name for name in self.active_adapters if name in self.peft_config]
        if not active or not self._enabled:
            with self._base_tasks(task_ids, active):
                yield
            return
        n_rows = rows_of_call(args, kwargs)[0]
        batch = self.task_context.of_call(task_ids, active, None if task_ids is None else n_rows)
        routing = self.task_context.routing if task_ids is None else None  # of the door outside of this one
        watched = torch.compiler.is_compiling() or is_transformed() or (batch is not None and bool(batch.unknown))
        generates = kept_in_generation() is not None
        if routing is None and not watched and not (generates and torch.is_grad_enabled()):
            known = () if generates else active
            routing = CallRouting(cast(list[Linear], self._layers()), known, batch, n_rows)
        with self.task_context.use(batch, routing):
            yield

    @contextmanager
    def _base_tasks(self, task_ids: Optional[TaskIds], active: list[str]) -> Iterator[None]:
        """Without the adapter, a base model that has `TaskHeads` of its own still wants to know the tasks."""
        own = (module for module in self.model.modules() if isinstance(module, TaskHeads) and not module.adapter_name)
        if task_ids is None or not active or next(own, None) is None:
            yield
            return
        with self.task_context.use(self.task_context.resolve(task_ids, active)):
            yield

    def _layers(self) -> list[PolyLayer]:
        if self._adapted is None:
            self._adapted = [module for module in self.model.modules() if isinstance(module, PolyLayer)]
        return self._adapted

    @property
    def _enabled(self) -> bool:
        for module in self.modules():  # not `next(...)`, which the compiler of torch 2.8 cannot trace
            if isinstance(module, PolyLayer):
                return not module.disable_adapters
        return False
