"""What transformers' `Trainer` learns about heads per task: what their labels are, how many there are, their smoothing.

Its own counting takes each cell of several labels for one, its label smoothing reaches over the widest head, and
whether it hands the count on depends on the signature of the base model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional, cast

import torch

from ..adapter.labelled.tensors import places_labelled
from ..config import PolyConfig
from ..labels import UNLABELLED
from ..model import PolyModel
from .collator import DataCollatorWithTaskIds

__all__ = ["counting_places", "headed_config", "smoothing_by_head", "tell_labels"]


def headed_config(tuner: Optional[PolyModel]) -> Optional[PolyConfig]:
    """The config of the active adapter whose tasks have heads; None if there is none."""
    for name in () if tuner is None else tuner.active_adapters:
        config = cast(PolyConfig, tuner.peft_config[name])  # type: ignore[union-attr]
        if config.task_labels is not None:
            return config
    return None


def tell_labels(collator: Any, tuner: PolyModel) -> None:
    """Have the collator know what the labels of the model's tasks are.

    Raises:
        ValueError: it was told others.
    """
    config = headed_config(tuner)
    if config is None or not isinstance(collator, DataCollatorWithTaskIds):
        return
    labels = config.labels or {}
    for task, found in (collator.labels or {}).items():
        if labels.get(task) != found:
            raise ValueError(
                f"The task_labels of {type(collator).__name__} are not those of the model: task {task!r} has {found} "
                f"there, and {labels.get(task, 'no head')} here. Leave `task_labels` out, or pass `model.task_labels`."
            )
    known = collator.task_names or list(labels)
    collator.describe_labels({name: labels[name] for name in known}, config.task_type == "TOKEN_CLS")


def counting_places(tuner_of: Callable[[Any], Optional[PolyModel]]) -> Callable[[Callable], Callable]:
    """Of the items in an accumulated batch: a row (a token) counts once, whatever its kind."""

    def make(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self: Any, batch_samples: list[Any], *args: Any, **kwargs: Any) -> Any:
            config = headed_config(tuner_of(self))
            if config is not None:
                self.model_accepts_loss_kwargs = True  # whatever the base model does: the loss is ours
                n_dims = 2 if config.task_type == "TOKEN_CLS" else 1
                batch_samples = [_with_places(batch, n_dims) for batch in batch_samples]
            return method(self, batch_samples, *args, **kwargs)

        return wrapper

    return make


def _with_places(batch: Any, n_dims: int) -> Any:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor):
        return batch
    return {**batch, "labels": torch.where(places_labelled(labels, n_dims), 0, UNLABELLED)}


def smoothing_by_head(tuner_of: Callable[[Any], Optional[PolyModel]]) -> Callable[[Callable], Callable]:
    """`label_smoothing_factor` goes to our loss, which smooths over each task's own labels."""

    def make(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            smoother = self.label_smoother
            if smoother is None or self.compute_loss_func is not None or headed_config(tuner_of(self)) is None:
                return method(self, model, inputs, *args, **kwargs)
            self.label_smoother = None
            try:
                return method(self, model, {**inputs, "label_smoothing": smoother.epsilon}, *args, **kwargs)
            finally:
                self.label_smoother = smoother

        return wrapper

    return make
