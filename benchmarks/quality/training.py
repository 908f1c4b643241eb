"""One trainer for all methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .data import Row
from .encoder import Features
from .methods import Adapter
from .ranker import scores
from .rates import Rates

__all__ = ["accuracy", "train"]

WARM_UP = 0.06  # share of the steps, as in the papers
CLIP = 1.0


def train(
    adapter: Adapter, features: Features, batches: Iterable[Sequence[Row]], steps: int, rates: Rates
) -> list[float]:
    """AdamW, linear warm-up and decay, gradients clipped. Returns the loss of each step."""
    adapter.model.train()
    optimizer = adapter.optimizer(rates)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        values, labels = scores(adapter.encode, features, rows, adapter.task_id)
        loss = nn.functional.cross_entropy(values, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(adapter: Adapter, features: Features, rows: Sequence[Row], batch: int = 50) -> tuple[float, float]:
    """Per cent of right answers, and mean cross-entropy."""
    adapter.model.eval()
    right, loss = 0, 0.0
    for begin in range(0, len(rows), batch):
        values, labels = scores(adapter.encode, features, rows[begin : begin + batch], adapter.task_id)
        right += int((values.argmax(1) == labels).sum())
        loss += float(nn.functional.cross_entropy(values, labels, reduction="sum"))
    return 100 * right / len(rows), loss / len(rows)
