"""Intervals against SciPy's bootstrap, and against a loop that draws rows and seeds one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peft_poly.compare.statistics import mean_over_tasks


def zeros_and_ones(*sizes: int, seeds: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [(random.random((seeds, size)) < random.random()).astype(float) for size in sizes]


@pytest.mark.parametrize("sizes", [(40,), (30, 5, 80), (12,) * 9], ids=str)
def test_one_seed_is_scipys_bootstrap_of_the_mean_of_means(sizes):
    by_task = zeros_and_ones(*sizes)
    found = mean_over_tasks(by_task)

    def mean_of_means(*tasks, axis):
        return sum(task.mean(axis=axis) for task in tasks) / len(tasks)

    wanted = stats.bootstrap(
        [values[0] for values in by_task], mean_of_means, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert found.mean == pytest.approx(np.mean([values.mean() for values in by_task]))
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.012)


def test_several_seeds_are_drawn_too_all_rows_with_the_same_ones():
    by_task = [values + np.array([[0.0], [0.3], [0.9]]) for values in zeros_and_ones(20, 7, seeds=3)]
    random, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        seeds = random.integers(0, 3, 3)
        means = [values[np.ix_(seeds, random.integers(0, values.shape[1], values.shape[1]))] for values in by_task]
        drawn.append(np.mean([mean.mean() for mean in means]))
    found = mean_over_tasks(by_task)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_a_difference_that_all_rows_share_has_no_width():
    found = mean_over_tasks([np.full((2, 9), 0.25), np.full((2, 4), 0.25)])
    assert (found.low, found.mean, found.high) == pytest.approx((0.25, 0.25, 0.25))
