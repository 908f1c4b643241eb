"""Means over tasks, with intervals of a paired bootstrap: other test rows of these tasks, other seeds.

Letters: s seeds, n test rows of a task. The tasks are the user's own and stay as they are: what is drawn anew is the
rows inside of each, and the seeds if there are several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "mean_over_tasks"]

TIMES = 10_000  # draws


@dataclass(frozen=True)
class Interval:
    """A mean, and the 2.5th and 97.5th percentile of its bootstrap.

    Attributes:
        mean: the mean.
        low, high: the ends of the interval.
    """

    mean: float
    low: float
    high: float


def mean_over_tasks(by_task: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """The mean over tasks of the means of their values, with a percentile bootstrap.

    Args:
        by_task: values `(s, n)` of each task, such as 1 for right and 0 for wrong, or differences of two methods.
        seed: of the draws: two calls with tasks of the same sizes draw the same rows.
    """
    random = np.random.default_rng(seed)
    seeds = len(by_task[0])
    shares = random.multinomial(seeds, np.full(seeds, 1 / seeds), TIMES) / seeds  # (draws, s)
    means = sum(_drawn_means(np.asarray(values, dtype=float), shares, random) for values in by_task) / len(by_task)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([values.mean() for values in by_task])), float(low), float(high))


def _drawn_means(values: np.ndarray, shares: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Means `(draws,)` of as many rows as there are, with replacement, in each a mean over seeds by `shares`.

    Rows that are alike count as one kind, and how many are drawn of each kind is multinomial: there are few kinds.
    """
    rows = values.shape[1]
    kinds, sizes = np.unique(values, axis=1, return_counts=True)  # (s, kinds), (kinds,)
    drawn = random.multinomial(rows, sizes / rows, TIMES) / rows  # (draws, kinds)
    return ((shares @ kinds) * drawn).sum(axis=1)
