"""The verbs on tasks: choose, look at, add and remove, adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Optional, Union, cast

import torch

from ..adapter import adaptation, growth
from ..adapter.labelled.classifiers import freeze_shared_layers, heads_of, train_heads
from ..compute.keeping.serving import Serving, check_not_serving, serving
from ..compute.onloading import onloaded
from ..compute.states import evaluating
from ..labels import TaskLabels
from ..router import Router
from ..tasks.choosing import use_task
from ..tasks.ids import TaskIds, resolve_task
from .by_name import ByName, Task

__all__ = ["TaskVerbs"]


class TaskVerbs(ByName):
    """What can be done with the tasks of an adapter; a mixin of `PolyModel`."""

    # ------------------------------------------------------------------------------------------------------ choose
    @property
    def task_names(self) -> Optional[list[str]]:
        """Names of the active adapter's tasks, by id; None if they have none."""
        names = self._poly_config().task_names
        return None if names is None else list(names)

    @property
    def task_labels(self) -> Optional[dict[str, TaskLabels]]:
        """The labels of the active adapter's tasks, by name; None if they have no heads of their own."""
        return self._poly_config().labels

    def task_id(self, task: Task) -> int:
        """Id of a task of the active adapter: the row of its routers, from 0.

        Args:
            task: its name, or its id, which is checked and returned.

        Raises:
            ValueError: there is no such task; the message suggests the nearest name.
        """
        return resolve_task(task, self._poly_config(), self.active_adapters[0])

    def set_task(self, task: Optional[Task]) -> None:
        """Choose the task of all calls that say none, in every thread.

        Args:
            task: one name or id; None clears it.

        Raises:
            ValueError: an active adapter has no such task; it is not one name, id or None.
        """
        if task is not None:
            if not isinstance(task, (int, str)) or isinstance(task, bool):
                raise ValueError(
                    f"`set_task` takes one id, one name or None, got {task!r}. For a batch of tasks pass `task_ids=` "
                    "to the call, or use `with model.use_task(...)`."
                )
            self.task_context.resolve(task, self.active_adapters)
        self.task_context.default = task

    def use_task(self, task: Optional[TaskIds]) -> AbstractContextManager[None]:
        """Context manager: the task, or the tasks of the rows, of calls in this thread that say none.

        Args:
            task: one id or name for all rows, a list of them, or a LongTensor `(b,)`; None for none.

        Raises:
            ValueError: an active adapter has no such task.
        """
        return use_task(self, task)

    def serving(self, max_tasks: Optional[int] = None) -> AbstractContextManager[Serving]:
        """Context manager: a promise that no parameter changes inside, for services that call the model forward.

        Each task is then mixed once in each layer, and kept to the end of the block; `generate` does so by itself, for
        one call. Threads share what is kept. Adapters that mix nothing (gates) keep nothing.

        Args:
            max_tasks: most tasks that a layer keeps; the least recently used go. None: all that come.

        Returns:
            A context manager, which gives a `Serving`: its `n_tasks` and `nbytes` say what is kept. A layer keeps
            `(in + out) * r` numbers for a task, and once more as many for the latest batches of several tasks.

        Raises:
            ValueError: `max_tasks` is no positive integer; the model serves already with another.
            RuntimeError: (inside) an optimizer step, `train()`, growth, merging, loading or adding an adapter; a
                parameter has changed in another way.
        """
        return serving(self.task_context, self.model.parameters(), max_tasks)

    # ----------------------------------------------------------------------------------------------------- look at
    @torch.no_grad()
    def routing_weights(self, adapter_name: Optional[str] = None) -> dict[str, torch.Tensor]:
        """Mixing weights of every task at eval; with gates the gates.

        Args:
            adapter_name: the adapter.

        Returns:
            `{layer name: (n_tasks, n_splits, n_skills)}`, at least float32, detached; the skills of each split sum to
            1. With gates `{layer name: (n_tasks, 1, r)}`: 1 is the shared LoRA, and they may be negative. Layers that
            share a router have equal entries.

        Raises:
            ValueError: there is no such adapter.
        """
        weights = {}
        for key, layer in self._whole_layers(adapter_name, "be looked at").items():
            router = cast(Router, layer.poly_router[self._poly_name(adapter_name)])
            with evaluating(router), onloaded(self.model):
                weights[key] = router(torch.arange(router.n_tasks)).detach()
        return weights

    # ---------------------------------------------------------------------------------------------- grow and shrink
    def add_tasks(
        self,
        names: Union[Sequence[str], int],
        init: growth.Init = "mean",
        adapter_name: Optional[str] = None,
        labels: Optional[Mapping[str, Any]] = None,
        optimizer: Optional[torch.optim.Optimizer] = None,
    ) -> list[int]:
        """Append tasks: a router row each on every layer, a head each if tasks have them, and the config. What the
        model computes for the tasks it had stays bit-equal.

        The router's parameters are new objects: pass the optimizer that trains them, or make it anew.

        Args:
            names: the new tasks' names; for an adapter whose tasks have no names, how many to add.
            init: where the rows start: `"mean"` of the known tasks' logits, `"uniform"` weights, the name or id of a
                task to copy, or `{task: weight}` for a weighted mean of their logits. With gates `"mean"` is exactly
                the mean of what the known tasks compute, and `"uniform"` the shared LoRA. A head is copied from a
                task of the same labels, and drawn anew otherwise.
            adapter_name: the adapter.
            labels: the labels of each new task, as in `PolyConfig.task_labels`, where tasks have heads.
            optimizer: what trains the router: it goes on with all that it has gathered about the known tasks, and has
                gathered nothing about the new ones, whose heads it trains too if it trains the others'. A learning
                rate schedule that holds it goes on, too.

        Returns:
            The ids of the new tasks.

        Raises:
            ValueError: a name is taken, repeated or empty; `init` is unknown; labels are missing, or not wanted; the
                adapter is merged; the optimizer trains no router, or keeps what has no row for each task. Nothing has
                changed then.
        """
        check_not_serving(self.task_context, "`add_tasks`")
        name = self._poly_name(adapter_name)
        layers, heads = self._whole_layers(name, "grow").values(), heads_of(self.model, name)
        with onloaded(self.model, changed=True):
            return growth.add_tasks(self._poly_config(name), name, layers, names, init, optimizer, heads, labels)

    def remove_tasks(
        self,
        tasks: Union[Task, Sequence[Task]],
        adapter_name: Optional[str] = None,
        optimizer: Optional[torch.optim.Optimizer] = None,
    ) -> None:
        """Delete tasks. The ids of the tasks behind them move up; names keep their meaning.

        The router's parameters are new objects: pass the optimizer that trains them, or make it anew.

        Args:
            tasks: name or id of one task, or a list of them.
            adapter_name: the adapter.
            optimizer: what trains the router: it goes on with all that it has gathered about the tasks that stay.

        Raises:
            ValueError: there is no such task; none would be left; it is the set task, or its removal would move the set
                id, which other active adapters share; the adapter is merged; the optimizer is refused as by
                `add_tasks`. Nothing has changed then.
        """
        check_not_serving(self.task_context, "`remove_tasks`")
        name = self._poly_name(adapter_name)
        layers, heads = self._whole_layers(name, "shrink").values(), heads_of(self.model, name)
        with onloaded(self.model, changed=True):
            growth.remove_tasks(self._poly_config(name), name, layers, tasks, optimizer, heads)

    def rename_task(self, old: Task, new: str, adapter_name: Optional[str] = None) -> None:
        """Give a task another name; its id and what it computes stay.

        Args:
            old: its name or id.
            new: the name it gets.
            adapter_name: the adapter.

        Raises:
            ValueError: there is no such task; the new name is taken or empty; the tasks have no names; it is the set
                task of other active adapters, too. Nothing has changed then.
        """
        name = self._poly_name(adapter_name)
        config, heads = self._poly_config(name), heads_of(self.model, name)
        growth.rename_task(config, name, self.task_context, self.active_adapters, old, new, heads)

    # --------------------------------------------------------------------------------------------- few-shot regimes
    def train_router_only(self, adapter_name: Optional[str] = None) -> None:
        """MHR-z: freeze the skills, train the router rows (arXiv 2211.03831). `modules_to_save` stay as they are.

        With gates: freeze the shared LoRA, train the gates, `r` numbers a task and router. With `task_labels` the
        heads learn, and the layers before them that all tasks share are frozen with the skills. With one skill the
        heads are all that learns.

        Raises:
            ValueError: the adapter has one skill, so that there is nothing to route, and its tasks have no heads.
        """
        check_not_serving(self.task_context, "`train_router_only`")
        name = self._poly_name(adapter_name)
        has_heads = bool(heads_of(self.model, name))
        adaptation.train_router_only(self._poly_layers(name).values(), name, has_heads)
        freeze_shared_layers(self.model, self._poly_config(name), name)
        train_heads(self.model, self._poly_config(name), name, shared=False)

    def train_all(self, adapter_name: Optional[str] = None) -> None:
        """Train skills and router rows (of an adapter with one skill: the skill); undoes `train_router_only`.

        Heads of tasks and the layers before them learn, too; other `modules_to_save` stay as they are, frozen in an
        adapter that was loaded for inference.

        Raises:
            ValueError: there is no such adapter.
        """
        check_not_serving(self.task_context, "`train_all`")
        name = self._poly_name(adapter_name)
        adaptation.train_all(self._poly_layers(name).values(), name)
        train_heads(self.model, self._poly_config(name), name, shared=True)

    def average_skills(self, adapter_name: Optional[str] = None) -> None:
        """MHR-mu: in place, one skill that is the mean of the inventory; the router is flat and frozen.

        With gates: the mean gate is folded into B, and all gates are one, which is exactly the mean of what the tasks
        compute; `train_all` then trains the gates, too.

        All tasks then share one LoRA. What was frozen stays so; `train_all` then trains the mean. The parameters are
        new objects: make the optimizer afterwards.

        Raises:
            ValueError: the adapter is merged.
        """
        check_not_serving(self.task_context, "`average_skills`")
        name = self._poly_name(adapter_name)
        layers = self._whole_layers(name, "be averaged").values()
        with onloaded(self.model, changed=True):
            adaptation.average_skills(self._poly_config(name), layers, name)
