"""transformers' pipelines take `task_ids=`; those for classification answer with the labels of each input's own task.

A pipeline hands what it does not know to its tokenizer, which drops it. So every pipeline computes inside `use_task`; a
list of tasks goes with a list of inputs, batch by batch. In one for classification it goes through the batches, and the
logits come out cut to the labels of their task, with its names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import GeneratorType, SimpleNamespace
from typing import Any, Optional

import torch
from torch.utils.data import Dataset
from transformers.pipelines import (
    AudioClassificationPipeline,
    ImageClassificationPipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)
from transformers.pipelines.base import ChunkPipeline, Pipeline

from .adapter.labelled.classifiers import active_heads, labelled
from .adapter.labelled.heads import TaskHeads
from .labels import TaskLabels
from .model import tuner_of
from .tasks.choosing import routed_layers, task_contexts, use_task
from .tasks.ids import resolve_task

__all__ = ["STEPS"]

CLASSIFYING = (
    AudioClassificationPipeline,
    ImageClassificationPipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)
IDS = "task_ids"


@dataclass
class _WithTask:
    """One input of a call, and its task."""

    inputs: Any
    task: Any


def _sorting_parameters(method: Callable) -> Callable:
    """`task_ids` is an argument of a pipeline, said when it is made or when it is called."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        task_ids, heads = kwargs.pop(IDS, None), _heads_of(self)
        widest = None if heads is None else max(heads.labels.values(), key=len)  # some limit `top_k` by it
        sorting = self if widest is None else _of_task(self, widest)
        preprocess, forward, postprocess = method(sorting, *args, **kwargs)
        return ({**preprocess, IDS: task_ids} if task_ids is not None else preprocess), forward, postprocess

    return wrapper


def _entering(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        has_tasks = _has_tasks(self)
        if not has_tasks and not isinstance(self, CLASSIFYING):
            return method(self, inputs, *args, **kwargs)
        if IDS in self._preprocess_params:  # given when the pipeline was made
            self.task_ids = self._preprocess_params.pop(IDS)
        ids = kwargs.pop(IDS, getattr(self, IDS, None))
        if ids is None:
            return method(self, inputs, *args, **kwargs)
        if not has_tasks:
            raise ValueError(f"`task_ids` is for models with a task-routed adapter, not {type(self.model).__name__}.")
        if _are_several(ids):
            return _by_batch(method, self, inputs, args, _one_for_each(ids, inputs), kwargs)
        with use_task(self.model, ids):
            found = method(self, inputs, *args, **kwargs)
        return found if isinstance(found, (list, dict)) else _one_by_one(self.model, ids, iter(found))

    return wrapper


def _by_batch(method: Callable, pipeline: Any, inputs: Any, args: Any, tasks: list, kwargs: dict[str, Any]) -> Any:
    """A list of inputs, as many at a time as a batch has, with the tasks of these."""
    if not _is_list(inputs):
        with use_task(pipeline.model, tasks[0]):
            return method(pipeline, inputs, *args, **kwargs)
    in_parts = isinstance(pipeline, ChunkPipeline)  # an input has several rows
    size = 1 if in_parts else kwargs.get("batch_size") or getattr(pipeline, "_batch_size", None) or 1
    found: list[Any] = []
    for start in range(0, len(inputs), size):
        with use_task(pipeline.model, tasks[start] if in_parts else tasks[start : start + size]):
            found += method(pipeline, inputs[start : start + size], *args, **kwargs)
    return found


def _are_several(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) or (isinstance(ids, torch.Tensor) and ids.dim() > 0)


def _is_list(inputs: Any) -> bool:
    """Whether these are several inputs; the messages of a chat are one."""
    if not isinstance(inputs, list):
        return False
    return not (inputs and isinstance(inputs[0], dict) and {"role", "content"} <= inputs[0].keys())


def _one_for_each(ids: Any, inputs: Any) -> list:
    """The tasks of inputs; of one that is no list, a list of one.

    Raises:
        ValueError: there are not as many.
    """
    tasks, several = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids), _is_list(inputs)
    if len(tasks) != (len(inputs) if several else 1) or isinstance(inputs, (Dataset, GeneratorType)):
        given = len(inputs) if several else f"a {type(inputs).__name__}"
        raise ValueError(
            f"`task_ids` has {len(tasks)} entries and the pipeline was given {given}. Pass a list of inputs with "
            "one task for each, or one task for all."
        )
    return tasks


def _one_by_one(model: torch.nn.Module, ids: Any, found: Iterator) -> Iterator:
    """What a pipeline computes only when it is asked for it, each with its tasks."""
    while True:
        with use_task(model, ids):
            try:
                item = next(found)
            except StopIteration:
                return
        yield item


def _pairing(method: Callable) -> Callable:
    """A list of tasks has one for each of a list of inputs."""

    @functools.wraps(method)
    def wrapper(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get(IDS)
        if not _are_several(ids) or not _has_tasks(self):
            return method(self, inputs, *args, **kwargs)
        tasks, kwargs[IDS] = _one_for_each(ids, inputs), None
        if not _is_list(inputs):
            return method(self, _WithTask(inputs, tasks[0]), *args, **kwargs)
        pairs = [_WithTask(one, task) for one, task in zip(inputs, tasks, strict=True)]
        return method(self, pairs, *args, **kwargs)

    return wrapper


def _preprocessing(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs, _WithTask):
            return method(self, inputs, *args, **kwargs)
        found: Any = method(self, inputs.inputs, *args, **kwargs)
        ids = _id_of(inputs.task, self.model)
        if inspect.isgenerator(found):
            parts: Any = found
            return ({**part, IDS: ids} for part in parts)
        found[IDS] = ids
        return found

    return wrapper


def _id_of(task: Any, model: torch.nn.Module) -> torch.Tensor:
    """The task's id, `(1,)`: names cannot be put together to a batch."""
    layer = next(routed_layers(model))
    name = next(name for name in layer.active_adapters if name in layer.poly_lora_A)
    return torch.tensor([resolve_task(task, layer.task_context.configs[name], name)])


def _computing(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, model_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_tasks(self):
            return method(self, model_inputs, *args, **kwargs)
        task_ids = model_inputs.pop(IDS, None)
        with nullcontext() if task_ids is None else use_task(self.model, task_ids):
            outputs, heads = method(self, model_inputs, *args, **kwargs), _heads_of(self)
            if heads is not None:
                n_rows = outputs["logits"].shape[0]
                outputs[IDS] = heads.heads_of_rows(n_rows).expand(n_rows)
        return outputs

    return wrapper


def _naming(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        parts: list[Any] = (
            model_outputs if isinstance(model_outputs, list) else [model_outputs]
        )  # of a long text: several
        if not parts or IDS not in parts[0]:
            return method(self, model_outputs, *args, **kwargs)
        heads: Any = _heads_of(self)
        labels = list(heads.labels.values())[int(parts[0][IDS][0])]
        for part in parts:  # in its place, for some pipelines want a dict and others an output with attributes
            part["logits"] = part["logits"][..., : len(labels)]
        return method(_of_task(self, labels), model_outputs, *args, **kwargs)

    return wrapper


def _of_task(pipeline: Any, labels: TaskLabels) -> Any:
    """The pipeline, with a model that has the labels of one task only."""
    pipeline = copy.copy(pipeline)
    pipeline.model = SimpleNamespace(config=labelled(copy.copy(pipeline.model.config), labels))
    return pipeline


def _has_tasks(pipeline: Any) -> bool:
    model = getattr(pipeline, "model", None)
    return isinstance(model, torch.nn.Module) and bool(task_contexts(model))


def _heads_of(pipeline: Any) -> Optional[TaskHeads]:
    model = pipeline.model
    tuner = tuner_of(model)
    return active_heads(model if tuner is None else tuner.model) if isinstance(model, torch.nn.Module) else None


OF_CLASSIFIERS: dict[str, Callable[[Callable], Callable]] = {
    "__call__": _pairing,
    "_forward": _computing,
    "_sanitize_parameters": _sorting_parameters,
    "postprocess": _naming,
    "preprocess": _preprocessing,
}
STEPS: dict[type, dict[str, Callable[[Callable], Callable]]] = {
    Pipeline: {"__call__": _entering},
    **dict.fromkeys(CLASSIFYING, OF_CLASSIFIERS),
}
