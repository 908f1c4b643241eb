"""How a comparison is run, and what came out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .data import Tasks
from .learning.training import LOOKS, Trained, commonest
from .statistics import Interval, mean_over_tasks

__all__ = ["Comparison", "Settings"]

MAJORITY = "commonest label"


@dataclass(frozen=True)
class Settings:
    """How a comparison is run; all methods alike.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a step, of all tasks together.
        rates: learning rates that are tried; each method takes the one that does best on validation rows.
        seeds: how many.
        max_length: longest text in tokens.
        blocks: how many of the encoder's last blocks are adapted; 0 for all. Few are quicker: the others are run once.
    """

    epochs: float = 8
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3
    max_length: int = 128
    blocks: int = 0

    def __post_init__(self) -> None:
        numbers = {"epochs": self.epochs, "batch_size": self.batch_size, "seeds": self.seeds}
        numbers |= {"max_length": self.max_length, "rates": min(self.rates, default=0)}
        if bad := [f"{name}={value}" for name, value in numbers.items() if not 0 < value < math.inf]:
            raise ValueError(f"These settings of a comparison must be positive numbers: {', '.join(bad)}.")

    def steps(self, tasks: Tasks) -> int:
        """Steps of a run on these tasks."""
        return max(LOOKS, math.ceil(self.epochs * len(tasks.train) / self.batch_size))


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        tasks: the data.
        settings: how it was run.
        runs: of each method, a run for each seed, at the rate that it took.
        rates: that rate.
        seconds: what this call took.
    """

    tasks: Tasks
    settings: Settings
    runs: dict[str, list[Trained]]
    rates: dict[str, float]
    seconds: float = 0.0

    def right(self, name: str) -> list[np.ndarray]:
        """For each task whether a method has its test rows right, `(seeds, rows)`; of the majority at every seed."""
        found = (
            [commonest(self.tasks)] * self.settings.seeds if name == MAJORITY else [r.right for r in self.runs[name]]
        )
        all_rows = np.array(found, dtype=float)
        places: dict[str, list[int]] = {}
        for n, row in enumerate(self.tasks.test):
            places.setdefault(row.task, []).append(n)
        return [all_rows[:, places[task]] for task in self.tasks.names]

    def accuracy(self, name: str) -> Interval:
        """Share of right answers, the mean over tasks."""
        return mean_over_tasks(self.right(name))

    def difference(self, one: str, other: str) -> Interval:
        """Accuracy of one method less that of another, paired row by row and seed by seed."""
        return mean_over_tasks([a - b for a, b in zip(self.right(one), self.right(other), strict=True)])

    def validation(self, name: str) -> float:
        """Share of right answers on validation rows, the mean over seeds."""
        return fmean(run.validation for run in self.runs[name])
