"""Metrics task by task: one table, task x metric, from any `compute_metrics`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
from transformers import EvalPrediction

from ..labels import UNLABELLED, TaskLabels

__all__ = ["PerTaskMetrics", "TaskPrediction"]


class TaskPrediction(EvalPrediction):
    """The predictions and labels of one task's rows.

    Where tasks have heads of their own, `predictions` are the logits `(rows, [l,] k)` of the task's `k` labels,
    `label_ids` integers for classes, `(rows, [l,] k)` for several at once, numbers else, and rows without a label are
    left out.

    Attributes:
        task: its name (its id if tasks have no names).
        labels: what its labels are, with `kind` and `names`; None where tasks have no heads.
    """

    task: Any = None
    labels: Optional[TaskLabels] = None


class PerTaskMetrics:
    """Makes a `compute_metrics` answer for each task by itself, and for all rows.

    Pass it to any `Trainer` as `compute_metrics=`. At each evaluation it calls the function once with all rows and once
    with the rows of each task that is there, as a `TaskPrediction`. The trainer then logs `eval_<metric>` and
    `eval_<task>_<metric>`, and `table` has the same by task; `str()` prints it, with the mean over tasks.

    Where tasks have heads of their own there is no call with all rows: `eval_<metric>` is then the mean over the tasks
    that have the metric.

    Args:
        compute_metrics: takes an `EvalPrediction`, returns `{metric: value}`.
        task_names: the adapter's `task_names`; None: tasks are called by their ids.

    Attributes:
        table: `{task: {metric: value}}` of the last evaluation; empty before.

    Raises:
        TypeError: `compute_metrics` cannot be called, or (when called) returns no mapping.
        ValueError: `task_names` is one string; (when called) the ids are missing, not as many as rows, or beyond the
            names; two metrics would get the same name; the trainer's `eval_do_concat_batches` is off (its
            `batch_eval_metrics` it refuses itself).

    Example:

    ```py
    >>> import numpy as np
    >>> from peft_poly import PerTaskMetrics
    >>> from transformers import EvalPrediction
    >>> accuracy = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    >>> metrics = PerTaskMetrics(accuracy, ["rte", "sst2"])
    >>> rows = EvalPrediction(predictions=np.eye(3), label_ids=np.array([0, 1, 0]))
    >>> metrics(rows, task_ids=np.array([0, 1, 1]))["sst2_accuracy"]
    0.5
    >>> print(metrics)
    task  accuracy
    rte          1
    sst2       0.5
    mean      0.75

    ```
    """

    def __init__(
        self,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]],
        task_names: Optional[Sequence[str]] = None,
    ) -> None:
        if not callable(compute_metrics):
            raise TypeError(f"compute_metrics must be a function of an EvalPrediction, got {compute_metrics!r}.")
        if isinstance(task_names, str):
            raise ValueError(f"task_names must be a list of names, got the one string {task_names!r}.")
        self.compute_metrics = compute_metrics
        self.task_names = None if task_names is None else list(task_names)
        self.table: dict[str, dict[str, Any]] = {}

    def __call__(
        self,
        prediction: EvalPrediction,
        task_ids: Optional[np.ndarray] = None,
        task_labels: Optional[Mapping[str, TaskLabels]] = None,
    ) -> dict[str, Any]:
        """Metrics of all rows, and of each task as `<task>_<metric>`.

        Args:
            prediction: what a trainer hands over.
            task_ids: the rows' tasks, `(rows,)`. A trainer of a task-routed model passes them. None: the last of
                `prediction.label_ids`, where `TrainingArguments(label_names=[..., "task_ids"])` puts them.
            task_labels: what the labels of tasks with heads are. A trainer of a task-routed model passes them.
        """
        if task_ids is None:
            prediction, task_ids = self._ids_among_labels(prediction)
        n_rows = _n_rows(prediction.predictions)
        if len(task_ids) != n_rows:
            raise ValueError(
                f"There are {len(task_ids)} task ids for {n_rows} predictions; one per row is needed. A trainer whose "
                "loss makes no logits hands over none, as some releases of TRL do: set `loss_type='nll'` there."
            )
        described = None if task_labels is None else list(task_labels.values())
        metrics = self._measured(prediction) if described is None else {}
        self.table = {}
        for task in np.unique(task_ids).tolist():
            labels = None if described is None else described[task]
            rows = self._of_task(prediction, np.flatnonzero(task_ids == task), task, labels)
            if len(_first(rows.predictions)):
                self.table[self._name(task)] = self._measured(rows)
        metrics = metrics if described is None else self._means()
        for name, row in self.table.items():
            for metric, value in row.items():
                key = f"{name}_{metric}"
                if key in metrics:
                    raise ValueError(f"The metric {key!r} of all rows has the name of {metric!r} of the task {name!r}.")
                metrics[key] = value
        return metrics

    def __str__(self) -> str:
        mean = self._means()
        names = list(mean)
        rows = [["task", *names]]
        for task, row in [*self.table.items(), ("mean", mean)]:
            rows.append([task, *(f"{row[metric]:.4g}" if metric in row else "" for metric in names)])
        first = max(len(row[0]) for row in rows)
        widths = [max(len(cell) for cell in column) for column in list(zip(*rows, strict=True))[1:]]
        lines = [
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
            for row in rows
        ]
        return "\n".join(lines)

    def _means(self) -> dict[str, Any]:
        """The mean of each metric over the tasks that have it."""
        names = dict.fromkeys(metric for row in self.table.values() for metric in row)
        values = {metric: [row[metric] for row in self.table.values() if metric in row] for metric in names}
        return {metric: float(np.mean(found)) for metric, found in values.items()}

    def check_arguments(self, args: Any) -> None:
        """Raise `ValueError` for `TrainingArguments` under which the rows do not come together in one call."""
        if not args.eval_do_concat_batches:
            raise ValueError("PerTaskMetrics needs all rows at once. Set `eval_do_concat_batches=True`.")

    def _measured(self, prediction: EvalPrediction) -> dict[str, Any]:
        found = self.compute_metrics(prediction)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"compute_metrics must return metrics by name, such as {{'accuracy': 0.5}}, got {found!r}, a "
                f"{type(found).__name__}."
            )
        for metric in [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]:
            where = f" of task {prediction.task!r}" if isinstance(prediction, TaskPrediction) else ""
            warnings.warn(f"The metric {metric!r}{where} is {found[metric]} and is left out: JSON has no such number.")
        return {k: v for k, v in found.items() if not (isinstance(v, float) and not math.isfinite(v))}

    def _of_task(
        self, prediction: EvalPrediction, index: np.ndarray, task: int, labels: Optional[TaskLabels]
    ) -> TaskPrediction:
        rows = _rows(prediction, index)
        if labels is not None:
            rows = _own(rows, labels)
        rows.task, rows.labels = self._name(task), labels
        return rows

    def _name(self, task: int) -> str:
        if self.task_names is None:
            return str(task)
        if not 0 <= task < len(self.task_names):
            raise ValueError(f"Task id {task} has no name: there are {len(self.task_names)} task_names.")
        return self.task_names[task]

    @staticmethod
    def _ids_among_labels(prediction: EvalPrediction) -> tuple[EvalPrediction, np.ndarray]:
        labels = prediction.label_ids
        if not isinstance(labels, tuple) or len(labels) < 2 or np.ndim(labels[-1]) != 1:
            raise ValueError(
                "PerTaskMetrics was given no task ids. A trainer whose model is a task-routed PeftModel passes them; "
                'with any other, set `TrainingArguments(label_names=["labels", "task_ids"])`.'
            )
        rest = labels[0] if len(labels) == 2 else labels[:-1]
        further = {"inputs": prediction.inputs, "losses": prediction.losses}
        return EvalPrediction(predictions=prediction.predictions, label_ids=rest, **further), np.asarray(labels[-1])


def _n_rows(predictions: Any) -> int:
    return len(_first(predictions))


def _first(predictions: Any) -> Any:
    while isinstance(predictions, (tuple, list)):
        predictions = predictions[0]
    return predictions


def _own(rows: TaskPrediction, labels: TaskLabels) -> TaskPrediction:
    """Predictions and labels of one task without the columns of wider heads, and without unlabelled rows."""
    logits, found = _first(rows.predictions)[..., : len(labels)], np.asarray(_first(rows.label_ids))
    n_dims = logits.ndim - 1  # 1 where rows have one label, 2 where tokens have
    if found.ndim > n_dims:
        found = found[..., : len(labels)] if labels.kind == "multi_label" else found[..., 0]
    if labels.kind != "regression":
        found = found.astype(np.int64)
    if n_dims == 1:
        used = found != UNLABELLED
        keep = np.flatnonzero(used.any(-1) if used.ndim > 1 else used)
        logits, found = logits[keep], found[keep]
    return TaskPrediction(predictions=logits, label_ids=found, inputs=rows.inputs, losses=rows.losses)


def _rows(prediction: EvalPrediction, index: np.ndarray) -> TaskPrediction:
    """The rows at `index` `(n,)` of everything that a trainer handed over."""

    def of(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: of(entry) for key, entry in value.items()}
        return type(value)(of(entry) for entry in value) if isinstance(value, (tuple, list)) else value[index]

    return TaskPrediction(
        predictions=of(prediction.predictions),
        label_ids=of(prediction.label_ids),
        inputs=of(prediction.inputs),
        losses=of(prediction.losses),
    )
