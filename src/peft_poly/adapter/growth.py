"""Tasks join and leave a trained adapter: router rows are added, removed and renamed, on every layer and the config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union, cast

import torch
from torch import nn

from ..compute.states import lasting
from ..config import PolyConfig, check_task_names
from ..labels import TaskLabels, read_task_labels
from ..layer import PolyLayer
from ..router import Router
from ..tasks.context import TaskContext
from ..tasks.ids import resolve_task
from .labelled.heads import TaskHeads
from .optimizer_state import Change, carry_state, check_state, forget, leave_behind, train_beside

__all__ = ["Init", "add_tasks", "remove_tasks", "rename_task"]

Task = Union[int, str]
Init = Union[str, int, dict[Task, float]]


def add_tasks(
    config: PolyConfig,
    adapter_name: str,
    layers: Iterable[PolyLayer],
    names: Union[Sequence[str], int],
    init: Init,
    optimizer: Optional[torch.optim.Optimizer] = None,
    heads: Sequence[TaskHeads] = (),
    labels: Optional[Mapping[str, Any]] = None,
) -> list[int]:
    """See `PolyModel.add_tasks`. Everything is checked before anything changes."""
    layers = list(layers)
    _check_not_merged(layers, adapter_name)
    count = _check_new_names(config, adapter_name, names)
    weights = init_weights(init, config, adapter_name)
    found = _check_new_labels(config, adapter_name, names, heads, labels)
    first = config.n_tasks
    copied = None if init in ("mean", "uniform") or isinstance(init, dict) else resolve_task(init, config, adapter_name)
    if optimizer is not None:
        check_state(optimizer, _logits(adapter_name, layers))
    for module in heads:
        _add_heads(module, found, None if copied is None else _place(module, config, copied), optimizer)
    if config.task_labels is not None:
        config.task_labels = {**config.task_labels, **cast(Mapping[str, Any], labels)}

    def grown(logits: torch.Tensor) -> torch.Tensor:
        row = weights.to(logits) @ logits
        return torch.cat([logits, row.expand(count, -1)])

    def padded(state: torch.Tensor) -> torch.Tensor:
        return torch.cat([state, state.new_zeros(count, *state.shape[1:])])

    if config.task_names is not None:
        config.task_names = [*config.task_names, *cast(Sequence[str], names)]
    _replace_rows(config, adapter_name, layers, first + count, grown, optimizer, padded)
    return list(range(first, first + count))


def remove_tasks(
    config: PolyConfig,
    adapter_name: str,
    layers: Iterable[PolyLayer],
    tasks: Union[Task, Sequence[Task]],
    optimizer: Optional[torch.optim.Optimizer] = None,
    heads: Sequence[TaskHeads] = (),
) -> None:
    """See `PolyModel.remove_tasks`. Everything is checked before anything changes."""
    layers = list(layers)
    _check_not_merged(layers, adapter_name)
    listed = [tasks] if isinstance(tasks, (int, str)) else list(tasks)
    gone = {resolve_task(task, config, adapter_name) for task in listed}
    kept = [task for task in range(config.n_tasks) if task not in gone]
    if not kept:
        raise ValueError(
            f"Removing {listed!r} would leave adapter {adapter_name!r} without a task. Use `delete_adapter` instead."
        )
    active = [layer for layer in layers if adapter_name in layer.active_adapters]  # the set task is one of theirs
    if optimizer is not None:
        check_state(optimizer, _logits(adapter_name, layers))
    contexts = {id(layer.task_context): layer.task_context for layer in active}.values()
    together = active[0].active_adapters if active else []
    defaults = [_default_after(context, config, adapter_name, kept, together) for context in contexts]
    for context, default in zip(contexts, defaults, strict=True):
        context.default = default
    for context in {id(layer.task_context): layer.task_context for layer in layers}.values():
        context.moves += 1
    for module in heads:
        left = {_place(module, config, task) for task in gone}
        dropped = [part for head in left if head is not None for part in module.pair(head)]
        module.keep([head for head in range(len(module.labels)) if head not in left])
        if optimizer is not None:
            forget(optimizer, dropped)
    if config.task_names is not None:
        config.task_names = [config.task_names[task] for task in kept]
    if config.task_labels is not None:
        config.task_labels = {name: config.task_labels[name] for name in config.task_names or ()}
    _replace_rows(config, adapter_name, layers, len(kept), lambda rows: rows[kept].clone(), optimizer)


def rename_task(
    config: PolyConfig,
    adapter_name: str,
    context: TaskContext,
    active: Sequence[str],
    old: Task,
    new: str,
    heads: Sequence[TaskHeads] = (),
) -> None:
    """See `PolyModel.rename_task`."""
    if config.task_names is None:
        raise ValueError(f"The tasks of adapter {adapter_name!r} have no names, so none can be changed.")
    task = resolve_task(old, config, adapter_name)
    names = list(config.task_names)
    previous, names[task] = names[task], new
    check_task_names(names)
    is_set = adapter_name in active and context.default == previous
    if is_set:
        _check_set_for_one(context, active, adapter_name)
    config.task_names = names
    for module in heads:
        module.rename(previous, new)
    if config.task_labels is not None:
        config.task_labels = {new if name == previous else name: k for name, k in config.task_labels.items()}
    if is_set:
        context.default = new


def init_weights(init: Init, config: PolyConfig, adapter_name: str) -> torch.Tensor:
    """Weights `(n_tasks,)` over the known tasks' logits that make a new row; all zero is the flat row.

    Raises:
        ValueError: `init` names no task, or its weights are negative, not finite, or all zero.
    """
    weights = torch.zeros(config.n_tasks, dtype=torch.float64)
    if init == "mean":
        return weights + 1 / config.n_tasks
    if init == "uniform":
        return weights
    if not isinstance(init, (dict, str, int)) or isinstance(init, bool):
        raise ValueError(f"`init` must be 'mean', 'uniform', a task, or {{task: weight}}, got {init!r}.")
    for task, weight in (init if isinstance(init, dict) else {init: 1.0}).items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"The weight of task {task!r} in `init` must be a number from 0 up, got {weight!r}.")
        weights[resolve_task(task, config, adapter_name)] += weight
    if not weights.sum() > 0:
        raise ValueError(f"The weights in `init` must not all be zero, got {init!r}. For a flat row pass 'uniform'.")
    return weights / weights.sum()


def _check_new_names(config: PolyConfig, adapter_name: str, names: Union[Sequence[str], int]) -> int:
    if config.task_names is None:
        if isinstance(names, bool) or not isinstance(names, int) or names <= 0:
            raise ValueError(
                f"The tasks of adapter {adapter_name!r} have no names: pass how many to add, a positive integer, got "
                f"{names!r}."
            )
        return names
    if not isinstance(names, (list, tuple)):
        raise ValueError(
            f"The tasks of adapter {adapter_name!r} have names: pass a list of new ones, such as ['rte'], got "
            f"{names!r}."
        )
    check_task_names(names)
    taken = sorted(set(names) & set(config.task_names))
    if taken:
        raise ValueError(f"Adapter {adapter_name!r} has the task(s) {taken} already. Choose other names.")
    return len(names)


def _check_new_labels(
    config: PolyConfig,
    adapter_name: str,
    names: Union[Sequence[str], int],
    heads: Sequence[TaskHeads],
    labels: Optional[Mapping[str, Any]],
) -> dict[str, TaskLabels]:
    if not heads:
        if labels is not None:
            raise ValueError(f"The tasks of adapter {adapter_name!r} have no heads, so `labels` cannot be given.")
        return {}
    listed = [] if isinstance(names, int) else list(names)
    if labels is None or not listed:
        raise ValueError(
            f"Each task of adapter {adapter_name!r} has a head of its own, so new ones need names and labels: "
            "`add_tasks(['stars'], labels={'stars': 1})`."
        )
    return read_task_labels(labels, listed)


def _add_heads(
    heads: TaskHeads,
    labels: dict[str, TaskLabels],
    like: Optional[int],
    optimizer: Optional[torch.optim.Optimizer],
) -> None:
    n_known = len(heads.labels)
    with lasting():
        heads.add(labels, like)
    for head in range(n_known, len(heads.labels)) if optimizer is not None else ():
        for known, new in zip(heads.pair(0), heads.pair(head), strict=True):
            train_beside(cast(torch.optim.Optimizer, optimizer), known, new)


def _place(heads: TaskHeads, config: PolyConfig, task: int) -> Optional[int]:
    """Which of the heads is that of a task; None if it has none here."""
    name, names = (config.task_names or [])[task], list(heads.labels)
    return names.index(name) if name in names else None


def _check_not_merged(layers: list[PolyLayer], adapter_name: str) -> None:
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged. Call `unmerge_adapter()` before its tasks change.")


def _default_after(
    context: TaskContext, config: PolyConfig, adapter_name: str, kept: list[int], active: Sequence[str]
) -> Task | None:
    """What `set_task` chose, once only the tasks `kept` are there: ids move up, and a task in use cannot go."""
    if context.default is None:
        return None
    task = resolve_task(context.default, config, adapter_name)
    if task not in kept:
        raise ValueError(f"Task {context.default!r} is the set task. Call `set_task` with another one, or None, first.")
    if isinstance(context.default, str) or kept.index(task) == task:
        return context.default
    _check_set_for_one(context, active, adapter_name)
    return kept.index(task)


def _check_set_for_one(context: TaskContext, active: Sequence[str], adapter_name: str) -> None:
    """What `set_task` chose is one name or id for all active adapters, so it cannot change in one of several."""
    sharing = sorted({adapter_name} | ({*active} & {*context.poly_adapters()}))
    if len(sharing) > 1:
        raise ValueError(
            f"Task {context.default!r} is the set task, of the active adapters {' and '.join(map(repr, sharing))}. "
            "With this change no single name or id would mean the same task in all of them. Call `set_task(None)` "
            "first, and set a task again afterwards."
        )


def _routers(adapter_name: str, layers: list[PolyLayer]) -> list[Router]:
    routers = {id(layer.poly_router[adapter_name]): layer.poly_router[adapter_name] for layer in layers}
    return cast(list[Router], list(routers.values()))


def _logits(adapter_name: str, layers: list[PolyLayer]) -> list[nn.Parameter]:
    return [router.module_logits for router in _routers(adapter_name, layers)]


def _replace_rows(
    config: PolyConfig,
    adapter_name: str,
    layers: list[PolyLayer],
    n_tasks: int,
    change: Change,
    optimizer: Optional[torch.optim.Optimizer] = None,
    change_state: Optional[Change] = None,
) -> None:
    for router in _routers(adapter_name, layers):
        old = router.module_logits
        with lasting():
            router.module_logits = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
        if optimizer is not None:
            carry_state(optimizer, old, router.module_logits, change_state or change)
        leave_behind(old)
    for layer in layers:
        layer.n_tasks[adapter_name] = n_tasks
    config.n_tasks = n_tasks
