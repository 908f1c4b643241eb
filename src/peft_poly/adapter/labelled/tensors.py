"""Labels as a tensor: the places of a batch, what each of them is labelled with, and the checks before a loss.

`labels` has the shape of the logits without their last dimension, a class or number in each place, or, where tasks have
several labels at once, the shape of the logits: then their places hold a 0 or 1 for each label, all others a class or
number in column 0 and -100 after it. -100 is unlabelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch.nn import functional

from ...labels import UNLABELLED, TaskLabels

__all__ = ["LabelTable", "check_labels", "label_cells", "places_labelled"]


class LabelTable:
    """What the labels of an adapter's tasks are, as tensors of one device, by task id.

    Args:
        labels: what the labels of each task are, by name, in the order of the ids.
        width: number of labels of the widest head.
        device: where the tensors are.

    Attributes:
        own: BoolTensor `(t, width)`, which labels a task has.
        multi: BoolTensor `(t,)`, which tasks have several labels at once.
        number: BoolTensor `(t,)`, which tasks predict a number.
        weights: Tensor `(t, width)`, what the loss of a row with the label is multiplied by.
    """

    def __init__(self, labels: Mapping[str, TaskLabels], width: int, device: Any) -> None:
        found = list(labels.values())
        weights = [list(task.weights or [1.0] * len(task)) + [1.0] * (width - len(task)) for task in found]
        self.names = list(labels)
        self.labels = found
        self.own = torch.tensor([[column < len(task) for column in range(width)] for task in found], device=device)
        self.multi = torch.tensor([task.kind == "multi_label" for task in found], device=device)
        self.number = torch.tensor([task.kind == "regression" for task in found], device=device)
        self.weights = torch.tensor(weights, device=device)


def label_cells(labels: torch.Tensor, places: torch.Size, width: int) -> torch.Tensor:
    """Labels `places` or `(*places, w)` as `(n, width)`, floating, unlabelled where there were no columns.

    Raises:
        ValueError: they have another shape.
    """
    if labels.shape == places:
        labels = labels.unsqueeze(-1)
    if labels.shape[:-1] != places or labels.shape[-1] > width:
        raise ValueError(
            f"`labels` must have the shape {tuple(places)}, or {(*places, width)} where tasks have several labels at "
            f"once, got {tuple(labels.shape)}."
        )
    cells = labels.reshape(-1, labels.shape[-1])
    cells = cells if cells.is_floating_point() else cells.double()
    return functional.pad(cells, (0, width - cells.shape[-1]), value=UNLABELLED)


def places_labelled(labels: torch.Tensor, n_dims: int) -> torch.Tensor:
    """Which places of a batch are labelled, whatever their kind; a BoolTensor of `n_dims` dimensions.

    Args:
        labels: the batch's.
        n_dims: dimensions of its places: 1 for rows, 2 for tokens.
    """
    labelled = labels != UNLABELLED
    return labelled.any(-1) if labels.dim() > n_dims else labelled


def check_labels(
    cells: torch.Tensor, tasks: torch.Tensor, table: LabelTable, per_row: int = 1, columns: Optional[int] = None
) -> None:
    """Check that each label is one that its task has.

    Args:
        cells: labels `(n, width)`, as `label_cells` gives them.
        tasks: LongTensor `(n,)`, the task of each place.
        table: what the labels are.
        per_row: places of a row, such as tokens, for the message.
        columns: those that the labels came with. None: all. What lies after them is no choice of the caller, so a
            place with several labels must have as many as its task.

    Raises:
        ValueError: one is not; the message has the row, the task, the value and what is allowed. On an accelerator,
            which the host does not wait for, an assertion is made there.
    """
    own, multi, number = table.own[tasks], table.multi[tasks], table.number[tasks]
    first, used = cells[:, 0], cells != UNLABELLED
    is_class = (first >= 0) & (first < own.sum(-1)) & (first == first.floor())
    one = torch.where(number, first.isfinite(), is_class | ~used[:, 0]) & ~used[:, 1:].any(-1)
    several = (((cells >= 0) & (cells <= 1)) | ~used).all(-1) & (~used | own).all(-1)
    if columns is not None:
        several &= ~used.any(-1) | (own.sum(-1) <= columns)
    fine = torch.where(multi, several, one)
    if torch.compiler.is_compiling() or cells.device.type != "cpu":
        torch._assert_async(fine.all(), "a label lies outside of the labels of its task")
    elif not bool(fine.all()):
        place = int((~fine).nonzero()[0])
        task = int(tasks[place])
        token = f", token {place % per_row}," if per_row > 1 else ""
        raise ValueError(
            f"Row {place // per_row}{token} of the batch, of the task {table.names[task]!r}, has the label "
            f"{_shown(cells[place])}. Allowed {_allowed(table.labels[task])}, or {UNLABELLED} for none."
        )


def _shown(cells: torch.Tensor) -> Any:
    values = [int(value) if float(value).is_integer() else float(value) for value in cells.tolist()]
    while len(values) > 1 and values[-1] == UNLABELLED:
        values.pop()
    return values if len(values) > 1 else values[0]


def _allowed(labels: TaskLabels) -> str:
    if labels.kind == "regression":
        return "is a finite number"
    if labels.kind == "multi_label":
        return f"is a list of {len(labels)} zeros and ones, one for each of {', '.join(labels.names)}"
    named = ", ".join(f"{index} ({name})" for index, name in enumerate(labels.names[:20]))
    return f"are the classes {named}{', ...' if len(labels) > 20 else ''}"
