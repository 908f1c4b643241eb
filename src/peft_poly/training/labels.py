"""The `labels` of a batch of tasks of different kinds, from the classes, lists, numbers and names that rows have.

One tensor: floating where a number is in it; with a column per label where tasks have several at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from ..adapter.labelled.tensors import LabelTable, check_labels, label_cells
from ..labels import UNLABELLED, TaskLabels
from ..tasks.ids import nearest_name

__all__ = ["LABEL_COLUMNS", "label_tensor", "plain_label_tensor"]

LABEL_COLUMNS = ("labels", "label", "label_ids")  # as transformers' collators have them


def label_tensor(
    values: Sequence[Any],
    tasks: Sequence[int],
    labels: Mapping[str, TaskLabels],
    length: Optional[int] = None,
    left: bool = False,
) -> torch.Tensor:
    """The labels of rows, checked against those of their tasks.

    Args:
        values: for each row a class (its index or name), a number, or a list of zeros and ones or of names, [] for
            none of them; None for unlabelled. With `length` a list of these, one for each token.
        tasks: the task id of each row.
        labels: what the labels of each task are, in the order of the ids.
        length: tokens of a row of the batch; None if rows have one label each.
        left: rows are filled up on the left.

    Returns:
        `(b, [length])`, or `(b, [length,] widest)` if some task has several labels at once.

    Raises:
        ValueError: a label is none of its task's; the message has the row, the task, the value and what is allowed.
    """
    found, names = list(labels.values()), list(labels)
    width = max(map(len, found)) if any(task.kind == "multi_label" for task in found) else 1
    rows: list[Any] = []
    for row, (value, task) in enumerate(zip(values, tasks, strict=True)):
        where = f"Row {row} of the batch, of the task {names[task]!r},"
        if length is None:
            rows.append(_cells(value, found[task], width, where))
        else:
            rows.append(_token_cells(value, found[task], width, where, length, left))
    whole = any(task.kind == "regression" for task in found) or _has_floats(rows)
    tensor = torch.tensor(rows, dtype=torch.float if whole else torch.long)
    tensor = tensor if width > 1 else tensor.squeeze(-1)
    places = tensor.shape[:1] if length is None else tensor.shape[:2]
    widest = max(map(len, found))
    ids = torch.tensor(tasks).repeat_interleave(length or 1)
    check_labels(label_cells(tensor, places, widest), ids, LabelTable(labels, widest, "cpu"), length or 1)
    return tensor


def plain_label_tensor(values: Sequence[Any]) -> Optional[torch.Tensor]:
    """Labels whose tasks nobody has described: numbers, or lists of numbers with -100 after the shorter ones.

    Returns:
        `(b,)` or `(b, longest)`; None if they are neither.

    Raises:
        ValueError: they are names.
    """
    rows = [value if isinstance(value, list) else [value] for value in values]
    for index, row in enumerate(rows):
        if row and isinstance(row[0], str):
            raise ValueError(
                f"Row {index} of the batch has the label {values[index]!r} by name, but this collator knows no labels. "
                "Make it with `DataCollatorWithTaskIds(..., task_labels=model.task_labels)`."
            )
    if not all(isinstance(cell, (bool, int, float)) for row in rows for cell in row):
        return None
    longest = max(map(len, rows))
    filled = [row + [UNLABELLED] * (longest - len(row)) for row in rows]
    tensor = torch.tensor(filled, dtype=torch.float if _has_floats(rows) else torch.long)
    return tensor if any(isinstance(value, list) for value in values) else tensor.squeeze(-1)


def _token_cells(values: Any, task: TaskLabels, width: int, where: str, length: int, left: bool) -> list[list[float]]:
    if not isinstance(values, list) or len(values) > length:
        raise ValueError(
            f"{where} must have a list with a label for each of its tokens, {length} at most, got "
            f"{len(values) if isinstance(values, list) else values!r}."
        )
    cells = [_cells(value, task, width, where) for value in values]
    empty: list[list[float]] = [[UNLABELLED] * width] * (length - len(cells))
    return empty + cells if left else cells + empty


def _cells(value: Any, task: TaskLabels, width: int, where: str) -> list[float]:
    """The label of one place, `width` cells."""
    if value is None:
        return [UNLABELLED] * width
    if task.kind == "multi_label":
        cells = _several(value, task, where)
    else:
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        cells = [_number(one, where) if task.kind == "regression" else _class(one, task, where)]
    return [*cells, *[UNLABELLED] * (width - len(cells))]


def _several(value: Any, task: TaskLabels, where: str) -> list[float]:
    if value == UNLABELLED:
        return [UNLABELLED]
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):  # none of them, if it is empty
        held = {_class(entry, task, where) for entry in value}
        return [int(index in held) for index in range(len(task))]
    numbers = isinstance(value, list) and all(isinstance(entry, (bool, int, float)) for entry in value)
    unlabelled = numbers and set(value[len(task) :]) <= {UNLABELLED}
    if not numbers or not unlabelled or len(value) < len(task):
        raise ValueError(
            f"{where} has the label {value!r}. It must be a list of {len(task)} zeros and ones, one for each of "
            f"{', '.join(task.names)}, or a list of these names, which may be empty."
        )
    return value[: len(task)]


def _class(value: Any, task: TaskLabels, where: str) -> float:
    if isinstance(value, str):
        if value not in task.names:
            raise ValueError(
                f"{where} has the unknown label {value!r}.{nearest_name(value, task.names)} Known are: "
                f"{', '.join(task.names)}."
            )
        return task.names.index(value)
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where} has the label {value!r}. It must be a class: its number, or one of the names.")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} has the label {value!r}, but the task predicts a number. Give its rows numbers.")
    return value


def _has_floats(rows: Any) -> bool:
    return any(map(_has_floats, rows)) if isinstance(rows, list) else isinstance(rows, float)
