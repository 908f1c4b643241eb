"""The loss over heads of different kinds: the mean of what each labelled row (or token) loses by itself.

one class      -sum_k q_k w_k log softmax(y)_k      q: the class, smoothed over the task's own labels; w: weights
several        mean over its labels of BCE(y, t)    true labels weighted by w
a number       w (y - t)^2
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch.nn import functional

from .heads import TaskHeads
from .tensors import LabelTable, check_labels, label_cells

__all__ = ["label_loss"]


def label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tasks: torch.Tensor,
    heads: TaskHeads,
    n_items: Union[torch.Tensor, int, None] = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of a batch whose rows are of different tasks, a scalar.

    Args:
        logits: `(b, [l,] width)`, as `TaskHeads` gives them.
        labels: `(b, [l])`, or `(b, [l,] w)` where tasks have several labels at once; -100 is unlabelled.
        tasks: LongTensor `(b,)`, the head of each row, or `(1,)` where one serves them all.
        heads: what the labels are.
        n_items: what the sum is divided by: the labelled rows (tokens) of the whole accumulated batch, over all
            processes. None: those of this batch.
        smoothing: label smoothing, as `TrainingArguments(label_smoothing_factor=...)`.

    Raises:
        ValueError: a label is none that its task has, or the shape fits no logits.
    """
    places, width = logits.shape[:-1], logits.shape[-1]
    per_row = places[1:].numel()
    cells = label_cells(labels, places, width)
    tasks = tasks.expand(places[0]).repeat_interleave(per_row)
    columns = labels.shape[-1] if labels.dim() > len(places) else 1
    check_labels(cells, tasks.to(cells.device), _table(heads, cells.device), per_row, columns)
    table, tasks = _table(heads, logits.device), tasks.to(logits.device)
    cells = cells.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    losses, labelled = _losses(logits.reshape(-1, width).to(cells.dtype), cells, tasks, table, smoothing)
    total: Any = labelled.sum() if n_items is None else torch.as_tensor(n_items, device=logits.device).reshape(-1)[0]
    return torch.where(labelled, losses, 0.0).sum() / total.clamp(min=1)


def _losses(
    logits: torch.Tensor, cells: torch.Tensor, tasks: torch.Tensor, table: LabelTable, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each place loses, `(n,)`, and whether it is labelled."""
    own, multi, number = table.own[tasks], table.multi[tasks], table.number[tasks]
    weights, used = table.weights[tasks].to(logits.dtype), own & (cells != -100)
    n_labels = own.sum(-1, keepdim=True)

    target = functional.one_hot(torch.where(used, cells, 0)[:, 0].clamp(0, own.shape[-1] - 1).long(), own.shape[-1])
    q = torch.where(own, (1 - smoothing) * target + smoothing / n_labels, 0)
    log_p = torch.where(own, logits.log_softmax(-1), 0)  # not -inf * 0
    one = -(q * weights * log_p).sum(-1)

    finite = torch.where(own, logits, 0)
    truth = torch.where(used, cells, 0) * (1 - smoothing) + smoothing / 2
    several = functional.binary_cross_entropy_with_logits(finite, truth, reduction="none", pos_weight=weights)
    several = torch.where(used, several, 0).sum(-1) / used.sum(-1).clamp(min=1)

    distance = weights[:, 0] * (finite[:, 0] - torch.where(used, cells, 0)[:, 0]) ** 2
    losses = torch.where(multi, several, torch.where(number, distance, one))
    return losses, torch.where(multi, used.any(-1), used[:, 0])


def _table(heads: TaskHeads, device: Any) -> LabelTable:
    return LabelTable(heads.labels, heads.width, device)
