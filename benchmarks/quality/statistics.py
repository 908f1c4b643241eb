"""Means with their errors, paired differences with a sign test, and how well a clustering fits known families."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy

__all__ = ["Difference", "Fit", "clusters", "compare", "fit_of_families", "mean_and_error", "rand_index"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (nan for a single value)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


@dataclass(frozen=True)
class Difference:
    """One method less another, task by task.

    Attributes:
        mean: mean over seeds of the mean over tasks.
        error: standard error of it over the seeds.
        better, equal, worse: numbers of tasks, by their mean over the seeds.
        p: of a two-sided sign test over the tasks that differ.
    """

    mean: float
    error: float
    better: int
    equal: int
    worse: int
    p: float


def compare(one: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]) -> Difference:
    """Paired difference of two methods, `{seed: {task: accuracy}}`, over the seeds that both have.

    Raises:
        ValueError: they have no seed in common, or their tasks differ.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise ValueError("The two methods have no seed in common.")
    if any(one[seed].keys() != other[seed].keys() for seed in seeds):
        raise ValueError("The two methods were not tested on the same tasks.")
    tasks = sorted(one[seeds[0]])
    mean, error = mean_and_error([fmean(one[seed][task] - other[seed][task] for task in tasks) for seed in seeds])
    by_task = [round(fmean(one[seed][task] - other[seed][task] for seed in seeds), 9) for task in tasks]
    better, worse = sum(d > 0 for d in by_task), sum(d < 0 for d in by_task)
    p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Difference(mean, error, better, len(tasks) - better - worse, worse, float(p))


def rand_index(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Adjusted Rand index of two partitions of the same things: 1 if they agree, 0 on average if by chance."""

    def pairs(counts: Mapping[Hashable, int]) -> int:
        return sum(math.comb(n, 2) for n in counts.values())

    both = pairs(Counter(zip(one, other, strict=True)))
    a, b, total = pairs(Counter(one)), pairs(Counter(other)), math.comb(len(one), 2)
    expected, most = a * b / total, (a + b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def clusters(linkage: np.ndarray, number: int) -> list[int]:
    """Cluster of each leaf when a tree (scipy's linkage) is cut into so many."""
    return hierarchy.fcluster(linkage, number, "maxclust").tolist()


@dataclass(frozen=True)
class Fit:
    """How well clusters fit families.

    Attributes:
        index: adjusted Rand index.
        random: mean of the index over random permutations of the families.
        high: the 95th percentile of those.
        p: share of the permutations with at least this index (itself counted in).
    """

    index: float
    random: float
    high: float
    p: float


def fit_of_families(found: Sequence[int], families: Sequence[Hashable], times: int = 10_000, seed: int = 0) -> Fit:
    """Adjusted Rand index of clusters and families, beside that of families dealt out at random."""
    codes = {family: n for n, family in enumerate(dict.fromkeys(families))}
    labels = np.array([codes[family] for family in families])
    random = np.random.default_rng(seed)
    index = rand_index(found, labels.tolist())
    drawn = np.array([rand_index(found, random.permutation(labels).tolist()) for _ in range(times)])
    p = (1 + int((drawn >= index - 1e-12).sum())) / (1 + times)
    return Fit(index, float(drawn.mean()), float(np.quantile(drawn, 0.95)), p)
