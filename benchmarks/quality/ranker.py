"""The ranker: the option whose vector is nearest to that of the text is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .data import Row
from .encoder import Features

__all__ = ["Encode", "embed", "scores"]

TEMPERATURE = 0.05  # divides the cosines
Encode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, mask, task ids -> hidden


def scores(
    encode: Encode, features: Features, rows: Sequence[Row], task_id: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines over temperature of each row's options `(b, c)`, -inf where a row has fewer, and the labels `(b,)`."""
    keys: dict[tuple[int, int], int] = {}  # (text, task): an option that rows of a task share is encoded once

    def place(text: str, task: str) -> int:
        return keys.setdefault((features.index[text], task_id[task]), len(keys))

    texts = torch.tensor([place(row.text, row.task) for row in rows])
    options = [torch.tensor([place(option, row.task) for option in row.options]) for row in rows]
    candidates = nn.utils.rnn.pad_sequence(options, batch_first=True, padding_value=-1)
    vectors = embed(encode, features, list(keys))
    cosines = torch.einsum("bd,bcd->bc", vectors[texts], vectors[candidates.clamp(min=0)])
    labels = torch.tensor([row.label for row in rows])
    return (cosines / TEMPERATURE).masked_fill(candidates < 0, -torch.inf), labels


def embed(encode: Encode, features: Features, keys: list[tuple[int, int]], fewest: int = 1) -> torch.Tensor:
    """Unit vectors `(n, d)` of `(text, task)` pairs: the mean over their tokens; `fewest` of them or more in a call."""
    tasks = torch.tensor([task for _, task in keys])
    found, order = [], []
    for places, hidden, mask in features.chunks([text for text, _ in keys], fewest=fewest):
        states = encode(hidden, mask, tasks[places]) * mask.unsqueeze(-1)
        found.append(nn.functional.normalize(states.sum(1), dim=-1))  # the sum points where the mean does
        order.append(places)
    return torch.cat(found)[torch.cat(order).argsort()]
