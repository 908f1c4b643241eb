"""transformers' pipelines for classification take `task_ids=`, and answer with the labels of each input's own task.

A task goes with its input through the batches of a pipeline; its logits come out, cut to its labels, with its names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers.pipelines import (
    AudioClassificationPipeline,
    ImageClassificationPipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)

from .adapter.classifiers import active_heads, labelled
from .config import PolyConfig
from .labels import TaskLabels
from .model import tuner_of
from .tasks.ids import resolve_task

__all__ = ["PIPELINES", "STEPS"]

PIPELINES = (
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
        task_ids = kwargs.pop(IDS, None)
        tuner = tuner_of(self.model)
        heads = None if tuner is None else active_heads(tuner.model)
        widest = None if heads is None else max(heads.labels.values(), key=len)  # some limit `top_k` by it
        sorting = self if widest is None else _of_task(self, widest)
        preprocess, forward, postprocess = method(sorting, *args, **kwargs)
        return ({**preprocess, IDS: task_ids} if task_ids is not None else preprocess), forward, postprocess

    return wrapper


def _pairing(method: Callable) -> Callable:
    """A list of tasks has one for each of a list of inputs."""

    @functools.wraps(method)
    def wrapper(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tasks = kwargs.get(IDS)
        if not isinstance(tasks, (list, tuple, torch.Tensor)):
            return method(self, inputs, *args, **kwargs)
        if not isinstance(inputs, list) or len(inputs) != len(tasks):
            given = len(inputs) if isinstance(inputs, list) else f"a {type(inputs).__name__}"
            raise ValueError(
                f"`task_ids` has {len(tasks)} entries and the pipeline was given {given}. Pass a list of inputs with "
                "one task for each, or one task for all."
            )
        tasks = tasks.tolist() if isinstance(tasks, torch.Tensor) else tasks
        del kwargs[IDS]
        pairs = [_WithTask(one, task) for one, task in zip(inputs, tasks, strict=True)]
        return method(self, pairs, *args, **kwargs)

    return wrapper


def _preprocessing(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        task = kwargs.pop(IDS, None)
        if isinstance(inputs, _WithTask):
            inputs, task = inputs.inputs, inputs.task
        found: Any = method(self, inputs, *args, **kwargs)
        if task is None:
            return found
        tuner = tuner_of(self.model)
        if tuner is None:
            raise ValueError(f"`task_ids` is for models with a task-routed adapter, not {type(self.model).__name__}.")
        name = tuner.active_adapters[0]
        ids = torch.tensor([resolve_task(task, cast(PolyConfig, tuner.peft_config[name]), name)])
        if inspect.isgenerator(found):
            parts: Any = found
            return ({**part, IDS: ids} for part in parts)
        found[IDS] = ids
        return found

    return wrapper


def _computing(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self: Any, model_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tuner = tuner_of(self.model)
        if tuner is None:
            return method(self, model_inputs, *args, **kwargs)
        task_ids = model_inputs.pop(IDS, None)
        with tuner.routed((), dict(model_inputs), task_ids):
            outputs = method(self, model_inputs, *args, **kwargs)
            heads = active_heads(tuner.model)
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
        tuner = tuner_of(self.model)
        labels = list(cast(Any, active_heads(cast(Any, tuner).model)).labels.values())[int(parts[0][IDS][0])]
        for part in parts:  # in its place, for some pipelines want a dict and others an output with attributes
            part["logits"] = part["logits"][..., : len(labels)]
        return method(_of_task(self, labels), model_outputs, *args, **kwargs)

    return wrapper


def _of_task(pipeline: Any, labels: TaskLabels) -> Any:
    """The pipeline, with a model that has the labels of one task only."""
    pipeline = copy.copy(pipeline)
    pipeline.model = SimpleNamespace(config=labelled(copy.copy(pipeline.model.config), labels))
    return pipeline


STEPS: dict[str, Callable[[Callable], Callable]] = {
    "__call__": _pairing,
    "_forward": _computing,
    "_sanitize_parameters": _sorting_parameters,
    "postprocess": _naming,
    "preprocess": _preprocessing,
}
