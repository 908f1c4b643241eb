"""Sampling by task: the shares are those of the formula, the draws those of seed and epoch, shards do not overlap."""

from __future__ import annotations

import itertools
from collections import Counter

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer

from peft_poly import TaskSampler, TaskSamplingMixin
from peft_poly.training.sampling import task_probabilities

SIZES = {"big": 60, "mid": 25, "small": 3}
ROWS = [task for task, size in SIZES.items() for _ in range(size)]
BALANCES = ["proportional", "uniform", 2.0, 0.5]


def epoch(sampler: TaskSampler, number: int = 0) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


# -------------------------------------------------------------------------------------------------------------- shares
@pytest.mark.parametrize(
    ("balance", "power"), [("proportional", 1), (1, 1), (2, 0.5), (0.5, 2), ("uniform", 0), (1e9, 0)]
)
def test_the_share_of_a_task_is_the_root_of_its_size(balance, power):
    roots = [size**power for size in SIZES.values()]
    shares = task_probabilities(list(SIZES.values()), balance)
    assert shares == pytest.approx([root / sum(roots) for root in roots])
    assert sum(shares) == pytest.approx(1, abs=1e-12)


def test_low_temperatures_do_not_overflow():
    assert task_probabilities([1000, 10], balance=1e-3) == pytest.approx([1, 0])


@pytest.mark.parametrize("balance", BALANCES)
def test_an_epoch_gives_each_task_its_share_rounded_up_or_down(balance):
    sampler = TaskSampler(ROWS, balance, num_samples=50)
    shares = task_probabilities(list(SIZES.values()), balance)
    total = Counter()
    for number in range(200):
        drawn = epoch(sampler, number)
        assert len(drawn) == len(sampler) == 50
        counts = Counter(ROWS[row] for row in drawn)
        for task, share in zip(SIZES, shares, strict=True):
            assert int(50 * share) <= counts[task] <= int(50 * share) + 1
        total += counts
    for task, share in zip(SIZES, shares, strict=True):
        assert total[task] / 10_000 == pytest.approx(share, abs=0.002)  # the rounding is fair: none is starved


def test_proportional_sampling_is_a_permutation():
    assert sorted(epoch(TaskSampler(ROWS))) == list(range(len(ROWS)))


@pytest.mark.parametrize("balance", BALANCES)
def test_no_row_comes_again_before_all_others_of_its_task_have_come(balance):
    for number in range(5):
        times = Counter(epoch(TaskSampler(ROWS, balance), number))
        for task in SIZES:
            of_task = [times[row] for row, other in enumerate(ROWS) if other == task]
            assert max(of_task) - min(of_task) <= 1


def test_tasks_are_mixed_over_the_epoch():
    tasks = ["a"] * 500 + ["b"] * 500
    drawn = [tasks[row] for row in TaskSampler(tasks)]
    assert 200 < drawn[:500].count("a") < 300


# -------------------------------------------------------------------------------------------------- seeds and epochs
@pytest.mark.parametrize("balance", BALANCES)
def test_the_same_seed_and_epoch_draw_the_same_and_others_do_not(balance):
    draws = {
        (seed, number): tuple(epoch(TaskSampler(ROWS, balance, seed=seed), number))
        for seed, number in itertools.product((0, 1, 7), (0, 1, 2))
    }
    assert len(set(draws.values())) == len(draws)
    for (seed, number), drawn in draws.items():
        torch.rand(3)  # the global generator has no part in it
        assert tuple(epoch(TaskSampler(ROWS, balance, seed=seed), number)) == drawn


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(TaskSampler(ROWS, "uniform"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["list", "tensor", "column", "both kinds"])
def test_tasks_may_come_as_lists_tensors_and_columns(kind):
    ids = [list(SIZES).index(task) for task in ROWS]
    tasks = {
        "list": ids,
        "tensor": torch.tensor(ids),
        "column": datasets.Dataset.from_dict({"task_ids": ids})["task_ids"],
        "both kinds": [task if task == "small" else list(SIZES).index(task) for task in ROWS],
    }[kind]
    assert list(TaskSampler(tasks, 2.0)) == list(TaskSampler(ROWS, 2.0))


# ------------------------------------------------------------------------------------------------------- many processes
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerates_shards_share_an_epoch_out_without_duplicates(processes, split_batches):
    sampler = TaskSampler(ROWS, num_samples=84)  # in batches of 6 or, split, of 12
    size = 6 * processes if split_batches else 6
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, size, True), processes, index, split_batches))
        for index in range(processes)
    ]
    drawn = [row for shard in shards for batch in shard for row in batch]
    n_rows = len(sampler) // (6 * processes) * 6 * processes
    assert len(drawn) == len(set(drawn)) == n_rows
    assert len({len(shard) for shard in shards}) == 1
    one_process = list(BatchSampler(sampler, 6 * processes, True))
    by_step = [sorted(itertools.chain(*batches)) for batches in zip(*shards, strict=True)]
    assert by_step == [sorted(batch) for batch in one_process]  # each step has the rows it has in one process


def test_the_epoch_reaches_the_sampler_through_accelerates_loader():
    sampler = TaskSampler(ROWS, "uniform")
    loader = DataLoader(list(range(len(ROWS))), batch_size=4, sampler=sampler)
    prepare_data_loader(loader, put_on_device=False).set_epoch(3)
    assert sampler.epoch == 3


# ------------------------------------------------------------------------------------------------------------ streams
def test_streams_are_mixed_by_the_probabilities():
    parts = [datasets.Dataset.from_dict({"task": [task] * 1000}).to_iterable_dataset() for task in SIZES]
    shares = task_probabilities(list(SIZES.values()), 2.0)
    mixed = datasets.interleave_datasets(parts, probabilities=shares, seed=0)
    drawn = Counter(row["task"] for row in itertools.islice(mixed, 1000))
    for task, share in zip(SIZES, shares, strict=True):
        assert drawn[task] / 1000 == pytest.approx(share, abs=0.05)


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("balance", [0, -1, float("nan"), True, None, "Uniform", [1]])
def test_a_balance_that_is_none_is_refused(balance):
    with pytest.raises(ValueError, match='must be "proportional", "uniform" or a temperature above 0'):
        TaskSampler(ROWS, balance)


def test_no_rows_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="Each task needs one row at least"):
        TaskSampler([])
    with pytest.raises(ValueError, match="Each task needs one row at least"):
        task_probabilities([3, 0])
    with pytest.raises(ValueError, match="num_samples must be 1 or more, got 0"):
        TaskSampler(ROWS, num_samples=0)


@pytest.mark.parametrize("balance", ["2", "2.0"])
def test_a_temperature_in_quotes_is_refused_with_a_hint(balance):
    with pytest.raises(ValueError, match=rf"got '{balance}', a string; a temperature is a number\. 1 is proportional"):
        task_probabilities([1, 2], balance)


def test_the_mixin_comes_before_the_trainer():
    class Logging:
        pass

    with pytest.raises(TypeError, match=r"must come before Trainer: `class Wrong\(TaskSamplingMixin, Trainer\)`\."):
        type("Wrong", (Trainer, TaskSamplingMixin), {})
    right = type("Right", (Logging, TaskSamplingMixin, Trainer), {})
    type("Further", (right, Trainer), {})
