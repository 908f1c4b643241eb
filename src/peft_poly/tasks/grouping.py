"""Rows of a batch, by task: what lets skills be mixed once per distinct task instead of once per row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch

__all__ = ["Rows", "group_rows", "ungrouped_rows"]


@dataclass(frozen=True)
class Rows:
    """How the rows of an input map to mixed pairs.

    Attributes:
        tasks: LongTensor `(g,)`, the task of each pair.
        index: LongTensor `(b,)`, the pair of each row; None if the rows lie in `g` equal runs, one per pair.
        padded: LongTensor `(g * n,)`, rows in `g` runs of the longest group's length `n`, shorter groups filled up
            with row 0; None if `index` is.
        place: LongTensor `(b,)`, where each row lies in `padded`; None if `index` is.
        key: `tasks` as the host knows them, or None.
        of_rows: the task of each row as the host knows it, if `index` is there.
    """

    tasks: torch.Tensor
    index: Optional[torch.Tensor] = None
    padded: Optional[torch.Tensor] = None
    place: Optional[torch.Tensor] = None
    key: Optional[tuple[int, ...]] = None
    of_rows: Optional[tuple[int, ...]] = None

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        if self.tasks.device == device:
            return self
        parts = {"tasks": self.tasks, "index": self.index, "padded": self.padded, "place": self.place}
        moved: dict[str, Any] = {
            name: None if part is None else part.to(device, non_blocking=True) for name, part in parts.items()
        }
        return replace(self, **moved)

    @property
    def pattern(self) -> Optional[tuple[int, ...]]:
        """What the host knows of the rows: with their number, it says the task of each of them."""
        return self.key if self.of_rows is None else self.of_rows

    def one_by_one(self) -> Rows:
        """The same rows with a pair each, of tasks that the host knows and that lie in no order."""
        assert self.index is not None
        return Rows(self.tasks.index_select(0, self.index), key=self.of_rows)


def ungrouped_rows(tasks: torch.Tensor) -> Rows:
    """A pair for each row, `(b,)`: where the rows' tasks are unknown to the host, or each row is sampled by itself."""
    return Rows(tasks)


def group_rows(tasks: list[int], ids: Optional[torch.Tensor] = None) -> Rows:
    """Group rows whose tasks the host knows; `ids` are the same as a LongTensor `(b,)`, if there is one.

    ```py
    >>> group_rows([4, 4, 4]).tasks
    tensor([4])
    >>> group_rows([7, 7, 2, 2]).index is None
    True
    >>> rows = group_rows([7, 2, 7])
    >>> rows.tasks, rows.index, rows.padded, rows.place
    (tensor([7, 2]), tensor([0, 1, 0]), tensor([0, 2, 1, 0]), tensor([0, 2, 1]))

    ```
    """
    distinct = list(dict.fromkeys(tasks))
    run = len(tasks) // len(distinct)
    if [task for task in distinct for _ in range(run)] == tasks:
        pairs = ids if ids is not None and len(ids) == len(distinct) else torch.tensor(distinct)
        return Rows(pairs, key=tuple(distinct))
    pair = {task: i for i, task in enumerate(distinct)}
    index = [pair[task] for task in tasks]
    members: list[list[int]] = [[] for _ in distinct]
    for row, i in enumerate(index):
        members[i].append(row)
    longest = max(map(len, members))
    padded = [row for group in members for row in group + [0] * (longest - len(group))]
    seen = [0] * len(distinct)
    place = []
    for i in index:
        place.append(i * longest + seen[i])
        seen[i] += 1
    pairs, places = torch.tensor(distinct), torch.tensor(place)
    return Rows(pairs, torch.tensor(index), torch.tensor(padded), places, key=tuple(distinct), of_rows=tuple(tasks))
