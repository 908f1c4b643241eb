"""What the labels of a task are: so many classes of which one holds, several that may hold at once, or a number.

As `PolyConfig.task_labels` has them, and as the rest of the package reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, cast

__all__ = ["TaskLabels", "read_labels", "read_task_labels"]

KINDS = ("single_label", "multi_label", "regression")
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
KEYS = ("labels", "kind", "weights")
UNLABELLED = -100  # in every place of `labels`, whatever the kind
ALLOWED = (
    "a list of names, a number of labels, 1 for a number to predict, or a dict such as "
    "{'labels': ['drama', 'war'], 'kind': 'multi_label'}"
)


@dataclass(frozen=True)
class TaskLabels:
    """The labels of one task.

    Attributes:
        kind: `"single_label"` (one class of several), `"multi_label"` (several at once) or `"regression"` (a number).
        names: a name for each label; of a number, one that stands for it.
        weights: what the loss of a row with the label is multiplied by, for each; None: by 1. A number has one.
    """

    kind: str
    names: tuple[str, ...]
    weights: Optional[tuple[float, ...]] = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def config(self) -> dict[str, Any]:
        """What the config of a transformers model for this task alone says of its labels."""
        id2label = dict(enumerate(self.names))
        return {
            "num_labels": len(self),
            "id2label": id2label,
            "label2id": {name: index for index, name in id2label.items()},
            "problem_type": PROBLEM_TYPES[self.kind],
        }

    def __str__(self) -> str:
        if self.kind == "regression":
            return "a number"
        listed = ", ".join(self.names[:20]) + (", ..." if len(self) > 20 else "")
        return f"several of {listed}" if self.kind == "multi_label" else f"one of {listed}"


def read_task_labels(given: Any, task_names: Sequence[str]) -> dict[str, TaskLabels]:
    """The labels of each task, in the order of the tasks.

    Args:
        given: as in `PolyConfig.task_labels`.
        task_names: the tasks, each of which must have labels.

    Raises:
        ValueError: a task has none, what has labels is no task, or labels are of no kind that there is.

    Example:

    ```py
    >>> labels = read_task_labels({"topic": 4, "stars": 1, "tone": ["bad", "good"]}, ["tone", "topic", "stars"])
    >>> [(task, found.kind, len(found)) for task, found in labels.items()]
    [('tone', 'single_label', 2), ('topic', 'single_label', 4), ('stars', 'regression', 1)]

    ```
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"`task_labels` must be a dict, the labels of each task by its name, got {given!r}.")
    unknown = [name for name in given if name not in task_names]
    if unknown:
        raise ValueError(
            f"`task_labels` has {unknown[0]!r}, which is no task. Known are: {', '.join(task_names)}. Correct the "
            "name, or add it to `task_names`."
        )
    missing = [name for name in task_names if name not in given]
    if missing:
        raise ValueError(
            f"The task {missing[0]!r} has no labels. Add it to `task_labels`: {ALLOWED}. There are labels for: "
            f"{', '.join(given)}."
        )
    return {name: read_labels(name, given[name]) for name in task_names}


def read_labels(task: str, given: Any) -> TaskLabels:
    """The labels of one task, as a list of names, their number, 1 (a number), or a dict that says the kind.

    Raises:
        ValueError: they are of no kind that there is; the message says what may be given.
    """
    if isinstance(given, TaskLabels):
        return given
    described = dict(given) if isinstance(given, Mapping) else {"labels": given}
    unknown = [key for key in described if key not in KEYS]
    if unknown or "labels" not in described:
        wrong = f"it has the key {unknown[0]!r}" if unknown else "it lacks the key 'labels'"
        raise ValueError(f"The labels of task {task!r} are {given!r}: {wrong}. Its keys may be {', '.join(KEYS)}.")
    names = _names(task, described["labels"])
    kind = described.get("kind", "regression" if described["labels"] == 1 else "single_label")
    if kind not in KINDS:
        raise ValueError(f"The labels of task {task!r} have the kind {kind!r}. It must be one of {', '.join(KINDS)}.")
    if kind == "regression" and described["labels"] != 1:
        raise ValueError(
            f"Task {task!r} predicts a number, so its labels have no names and are 1, got {described['labels']!r}. For "
            "names leave out the kind, 'regression'."
        )
    if kind == "single_label" and len(names) < 2:
        raise ValueError(
            f"Task {task!r} has the one label {names[0]!r}, of which there is nothing to choose. Give it two or more, "
            "or make it a number to predict, 1, or 'kind': 'multi_label' (the label holds or does not)."
        )
    return TaskLabels(kind, names, _weights(task, described.get("weights"), names))


def _names(task: str, labels: Any) -> tuple[str, ...]:
    if isinstance(labels, int) and not isinstance(labels, bool) and labels > 0:
        return tuple(f"LABEL_{index}" for index in range(labels))  # as transformers calls them
    if not isinstance(labels, (list, tuple)) or not labels:
        raise ValueError(f"The labels of task {task!r} must be {ALLOWED}, got {labels!r}.")
    for name in labels:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"The labels of task {task!r} must be names, got {name!r} in {list(labels)!r}.")
    repeated = sorted({name for name in labels if labels.count(name) > 1})
    if repeated:
        raise ValueError(f"The labels of task {task!r} must differ, but {repeated} occur more than once.")
    return tuple(labels)


def _weights(task: str, weights: Any, names: tuple[str, ...]) -> Optional[tuple[float, ...]]:
    if weights is None:
        return None
    numbers = [w for w in weights if _is_positive(w)] if isinstance(weights, (list, tuple)) else []
    if len(numbers) != len(names) or len(cast(Sequence, weights)) != len(names):
        raise ValueError(
            f"The weights of task {task!r} must be {len(names)} positive numbers, one for each of its labels "
            f"({', '.join(names)}), got {weights!r}."
        )
    return tuple(float(weight) for weight in numbers)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
