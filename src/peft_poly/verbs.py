"""The verbs on tasks that a task-routed model has: choose, look at, add, adapt, merge, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union, cast

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from .adapter import adaptation, growth
from .adapter.labelled.classifiers import heads_of, train_shared_layers
from .checkpoints.export import export_lora
from .checkpoints.sharding import check_whole
from .compute.keeping.serving import Serving, check_not_serving, serving
from .compute.merging import merged_weight
from .compute.onloading import onloaded
from .compute.states import evaluating
from .config import PolyConfig
from .labels import TaskLabels
from .layer import Linear
from .router import Router
from .tasks.choosing import use_task
from .tasks.context import TaskContext
from .tasks.ids import TaskIds, resolve_task

__all__ = ["TaskVerbs"]

Task = Union[int, str]

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as _Tuner
else:
    _Tuner = object


class TaskVerbs(_Tuner):
    """Mixin of `PolyModel`. Where a verb takes `adapter_name`, the default is the first active adapter."""

    task_context: TaskContext

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
            ValueError: there is no such task; none would be left; it is the set task; the adapter is merged; the
                optimizer is refused as by `add_tasks`. Nothing has changed then.
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
            ValueError: there is no such task; the new name is taken or empty; the tasks have no names.
        """
        name = self._poly_name(adapter_name)
        context = self.task_context if name in self.active_adapters else None  # whose set task may be the renamed one
        growth.rename_task(self._poly_config(name), name, context, old, new, heads_of(self.model, name))

    # --------------------------------------------------------------------------------------------- few-shot regimes
    def train_router_only(self, adapter_name: Optional[str] = None) -> None:
        """MHR-z: freeze the skills, train the router rows (arXiv 2211.03831). `modules_to_save` stay as they are.

        With gates: freeze the shared LoRA, train the gates, `r` numbers a task and router. With `task_labels` the
        heads learn, and the layers before them that all tasks share are frozen with the skills.

        Raises:
            ValueError: the adapter has one skill, so that there is nothing to route.
        """
        check_not_serving(self.task_context, "`train_router_only`")
        name = self._poly_name(adapter_name)
        adaptation.train_router_only(self._poly_layers(name).values(), name)
        train_shared_layers(self.model, self._poly_config(name), name, False)

    def train_all(self, adapter_name: Optional[str] = None) -> None:
        """Train skills and router rows (of an adapter with one skill: the skill); undoes `train_router_only`.

        Raises:
            ValueError: there is no such adapter.
        """
        check_not_serving(self.task_context, "`train_all`")
        name = self._poly_name(adapter_name)
        adaptation.train_all(self._poly_layers(name).values(), name)
        train_shared_layers(self.model, self._poly_config(name), name, name in self.active_adapters)

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

    # ------------------------------------------------------------------------------------------- merge and export
    def merge_adapter(
        self,
        adapter_names: Optional[list[str]] = None,
        safe_merge: bool = False,
        task: Union[Task, dict[str, Task], None] = None,
    ) -> None:
        """Add what one task contributes to the base weights, which then run at the base model's speed.

        Args:
            adapter_names: adapters to merge; those that are merged stay so. Default: the active ones of each layer.
            safe_merge: check for NaN and infinity; if there are any, nothing is merged.
            task: the task, by name or id, or `{adapter: task}`. Default: the set one, or the only one.

        Raises:
            ValueError: no task was chosen; another task is merged already; a weight would not be finite.
        """
        check_not_serving(self.task_context, "`merge_adapter`")
        with self.task_context.choosing(task):
            self._check_can_merge(adapter_names, task, safe_merge)
            super().merge_adapter(adapter_names=adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        task: Union[Task, dict[str, Task], None] = None,
    ) -> nn.Module:
        """The base model with one task merged into it, and no adapter left.

        Args:
            progressbar: show one.
            safe_merge: check for NaN and infinity; if there are any, nothing is merged.
            adapter_names: adapters to merge; those that are merged stay so. Default: the active ones of each layer.
            task: the task, by name or id, or `{adapter: task}`. Default: the set one, or the only one.

        Returns:
            The base model, in its own dtype.

        Raises:
            ValueError: as `merge_adapter`; or another task is merged already.
        """
        check_not_serving(self.task_context, "`merge_and_unload`")
        with self.task_context.choosing(task):
            more = self._check_can_merge(adapter_names, task, safe_merge)
            unload: Any = self._unload_and_optionally_merge  # typed as returning None
            return unload(merge=more, progressbar=progressbar, adapter_names=adapter_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can be used: once the task is known, by `set_task` or as the only one."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self._poly_layers(adapter_name).values())

    def export_lora(
        self, task: Optional[Task], save_directory: Union[str, Path], **kwargs: Any
    ) -> Union[Path, dict[str, Path]]:
        """Write one task as a plain PEFT LoRA with equal outputs, or every task; see `peft_poly.export_lora`.

        Args:
            task: id or name of the task, whose folder `save_directory` becomes. None: every task, a subfolder each.
            save_directory: where to write.
            kwargs: `adapter_name` and `overwrite` of `peft_poly.export_lora`.

        Returns:
            The folder, or the folders by task.

        Raises:
            FileExistsError: `save_directory` is not empty, and `overwrite` is False.
            ValueError: there is no such task; several adapters are active and none was named.
        """
        return export_lora(self, task, save_directory, **kwargs)

    # -------------------------------------------------------------------------------------------------- small print
    def _poly_name(self, adapter_name: Optional[str] = None) -> str:
        if adapter_name is None:
            if not self.active_adapters:
                raise ValueError("No adapter is active. Choose one with `set_adapter`.")
            return self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}. There are: {sorted(self.peft_config)}.")
        return adapter_name

    def _poly_config(self, adapter_name: Optional[str] = None) -> PolyConfig:
        return cast(PolyConfig, self.peft_config[self._poly_name(adapter_name)])

    def _poly_layers(self, *adapter_names: Optional[str]) -> dict[str, Linear]:
        names = [self._poly_name(name) for name in adapter_names]
        layers = {key: m for key, m in self.model.named_modules() if isinstance(m, Linear)}
        return {key: layer for key, layer in layers.items() if any(name in layer.poly_lora_A for name in names)}

    def _whole_layers(self, adapter_name: Optional[str], to: str) -> dict[str, Linear]:
        check_whole(self.model, [self._poly_name(adapter_name)], to)
        return self._poly_layers(adapter_name)

    def _check_can_merge(self, adapter_names: Optional[list[str]], task: Any, finite: bool) -> bool:
        """Raise what a merge would, for every layer, before any of them changes; whether there is more to merge."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        layers = [module for module in self.model.modules() if isinstance(module, Linear)]
        names = dict.fromkeys(adapter_names or (name for layer in layers for name in layer.active_adapters))
        tasks: dict[str, int] = {}
        for name in names:
            merged = self.task_context.merged.get(self._poly_name(name))
            if merged is None or task is not None or self.task_context.default is not None:
                tasks[name] = self.task_context.one_task(name)
            if merged is not None and tasks.get(name, merged) != merged:
                raise ValueError(self._merged_message(name))
        check_whole(self.model, names, "be merged")
        more = False
        for layer in layers:
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            new = [name for name in wanted if name in layer.poly_lora_A and name not in layer.merged_adapters]
            more = more or bool(new)
            if new and (finite or layer.quantization_backend is not None):
                with onload_layer(layer):
                    merged_weight(layer, {name: tasks[name] for name in new}, finite)
        return more

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any) -> None:
        """Refused: a combination of adapters is no adapter of the same size, whose mix is a product of averages.

        Args:
            adapters: names of adapters, as in PEFT's LoRA.
            weights: one for each.
            adapter_name: of the combination.
            kwargs: the same.

        Raises:
            ValueError: always; the message says what gives the exact sum.
        """
        raise ValueError(
            f"Adapters that route tasks are not combined into one ({adapters} into {adapter_name!r}): the sum of their "
            "updates is no adapter of the same rank. For the exact sum activate them together with "
            "`model.base_model.set_adapter([...])`, each at its own `set_scale`, or merge them with `merge_adapter("
            "adapter_names=[...], task=...)`; for arithmetic on one task, `export_lora` each and combine the LoRAs."
        )

    def _merged_message(self, name: str) -> str:
        task, names = self.task_context.merged[name], self._poly_config(name).task_names
        return (
            f"Adapter {name!r} is merged already, with task {names[task] if names else task!r}. Call "
            "`unmerge_adapter()` first."
        )
