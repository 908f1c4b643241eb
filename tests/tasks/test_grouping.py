"""Rows by task: whatever the order, gathering rows by `padded` and reading them back by `place` loses none."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from peft_poly.tasks.grouping import Rows, group_rows, ungrouped_rows

LAYOUTS = {
    "one row": [3],
    "one task": [5, 5, 5],
    "all distinct": [2, 0, 1],
    "equal runs": [4, 4, 1, 1, 0, 0],
    "equal counts, mixed": [4, 1, 4, 1],
    "unequal runs": [2, 2, 2, 7],
    "any order": [3, 1, 3, 3, 0, 1],
    "the same task twice apart": [1, 0, 1],
}


@pytest.mark.parametrize("tasks", LAYOUTS.values(), ids=LAYOUTS)
def test_there_is_one_pair_for_each_distinct_task(tasks):
    found = group_rows(tasks).tasks
    assert found.dtype == torch.long
    assert sorted(found.tolist()) == sorted(set(tasks))


@pytest.mark.parametrize("tasks", LAYOUTS.values(), ids=LAYOUTS)
def test_every_row_finds_the_pair_of_its_task(tasks):
    rows = group_rows(tasks)
    if rows.index is None:
        run = len(tasks) // len(rows.tasks)
        assert [task for task in rows.tasks.tolist() for _ in range(run)] == tasks
    else:
        assert rows.tasks[rows.index].tolist() == tasks


@pytest.mark.parametrize(
    ("layout", "runs"),
    [("one row", True), ("one task", True), ("all distinct", True), ("equal runs", True)]
    + [(layout, False) for layout in ("equal counts, mixed", "unequal runs", "any order", "the same task twice apart")],
)
def test_equal_runs_are_recognised_and_nothing_else_is_taken_for_them(layout, runs):
    rows = group_rows(LAYOUTS[layout])
    assert [part is None for part in (rows.index, rows.padded, rows.place)] == [runs] * 3


def random_batches() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(n_tasks) for _ in range(n)] for n_tasks, n in itertools.product((2, 3, 9), (2, 5, 16))]


@pytest.mark.parametrize("tasks", [*LAYOUTS.values(), *random_batches()], ids=str)
def test_rows_brought_together_lie_by_task_and_come_back_in_their_order(tasks):
    rows = group_rows(tasks)
    if rows.padded is None:
        return
    x = torch.arange(len(tasks))
    together = x[rows.padded].view(len(rows.tasks), -1)
    longest = max(tasks.count(task) for task in tasks)
    assert together.shape == (len(set(tasks)), longest)
    assert torch.equal(together.flatten()[rows.place], x)
    for pair, group in enumerate(together.tolist()):
        task = rows.tasks[pair].item()
        members = [row for row, other in enumerate(tasks) if other == task]
        assert group == members + [0] * (longest - len(members))


def test_ungrouped_rows_have_a_pair_each():
    tasks = torch.tensor([2, 0, 2])
    rows = ungrouped_rows(tasks)
    assert rows.tasks is tasks
    assert (rows.index, rows.padded, rows.place) == (None, None, None)


@pytest.mark.parametrize("tasks", [[1, 1], [2, 0, 2]], ids=str)
def test_rows_move_to_a_device_and_stay_where_they_are(tasks):
    rows = group_rows(tasks)
    assert rows.to(torch.device("cpu")) is rows
    moved = rows.to(torch.device("meta"))
    for part, before in zip(vars(moved).values(), vars(rows).values(), strict=True):
        assert (part is None) == (before is None)
        if isinstance(before, tuple):
            assert part == before  # what the host knows
            continue
        assert part is None or (part.device.type, part.shape) == ("meta", before.shape)


def test_rows_do_not_change():
    with pytest.raises(AttributeError, match="cannot assign to field 'tasks'"):
        Rows(torch.tensor([0])).tasks = torch.tensor([1])
