"""Operators that an adapted layer runs: exact counts, held by one table of limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import launches
from benchmarks.variants import KINDS


@pytest.fixture(scope="module")
def counts():
    return launches.counts_here()


def test_views_and_bare_memory_are_no_launches_and_a_list_as_index_is_one():
    x = torch.ones(4, 4)
    with launches.operators() as ran:
        x.view(16)[2:].t().detach()
        torch.empty(3)
    assert ran.count == 0
    with launches.operators() as ran:
        x @ x + x
    assert ran.count == 2
    with launches.operators() as ran:
        x[[0, 1]]
    assert ran.count == 2  # the index comes over, then the rows are taken


def test_operators_of_a_backward_count():
    x = torch.ones(4, 4, requires_grad=True)
    with launches.operators() as ran:
        (x.exp()).backward(torch.ones(4, 4))
    assert ran.count == 3  # exp, the ones, and their product


def test_a_lora_runs_two_products_a_scaling_and_a_sum(counts):
    assert counts[launches.DECODE]["lora"] == counts[launches.FORWARD]["lora"] == 4.0
    assert counts[launches.TRAIN]["lora"] == 9.1


def test_adapter_names_runs_ten_operators_for_each_task(counts):
    assert counts[launches.DECODE_ONE]["adapters"] == 10.0
    assert counts[launches.DECODE]["adapters"] == 80.0


@pytest.mark.parametrize(("work", "kind"), launches.LIMITS, ids=str)
def test_a_layer_runs_no_more_operators_than_its_limit(counts, work, kind):
    assert counts[work][kind] <= launches.LIMITS[work, kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_takes_the_same_operators_for_one_task_and_for_eight(counts, kind):
    assert counts[launches.DECODE_ONE][kind] == counts[launches.DECODE][kind]
