"""The verdict on made-up answers: who is ahead, who is level, and what to do then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_poly.compare import Comparison, Settings, verdict
from peft_poly.compare.data import Row, Tasks
from peft_poly.compare.learning.methods import METHODS
from peft_poly.compare.learning.training import Trained

ROWS = 400
NAMES = [method.name for method in METHODS]
GATES, POLY = NAMES[-2:]
BASE = dict.fromkeys(NAMES, 0.7)


def comparison(shares: dict[str, float], rows: int = ROWS, apart: bool = False) -> Comparison:
    """Two tasks of two labels; each method has its share of the rows right, all the same ones or each its own."""
    test = [Row(f"task {n % 2}", f"text {n}", "ab"[n // 2 % 2]) for n in range(rows)]
    runs = {}
    for number, (name, share) in enumerate(shares.items()):
        right = np.zeros(rows, dtype=bool)
        right[np.random.default_rng(number if apart else 0).permutation(rows)[: round(share * rows)]] = True
        runs[name] = [Trained(10, share, 0.5, right.tolist(), 1000)]
    tasks = Tasks({"task 0": ("a", "b"), "task 1": ("a", "b")}, test, test, test)
    return Comparison(tasks, Settings(seeds=1), runs, dict.fromkeys(shares, 1e-3))


def test_routing_pays_where_it_is_ahead_of_every_rival():
    said = verdict(comparison({**BASE, "a LoRA per task": 0.75, POLY: 0.85, GATES: 0.6}))
    assert said.startswith(
        "For these tasks routing pays: Poly, head per task is ahead of every rival, of the nearest, a LoRA per "
    )
    assert "by +10.0 (95 % interval +" in said
    assert said.endswith("So train `PolyConfig.recommended(task_labels=...)`.")


def test_the_kind_of_routing_is_chosen_on_validation_rows():
    found = comparison({**BASE, GATES: 0.9, POLY: 0.85})
    found.runs[POLY] = [Trained(10, 0.99, 0.5, found.runs[POLY][0].right, 1000)]
    assert "Poly, head per task is ahead of every rival" in verdict(found)


def test_a_shared_lora_that_is_level_is_enough():
    said = verdict(comparison({**BASE, POLY: 0.702, GATES: 0.6}, rows=20_000, apart=True))
    assert said.startswith("For these tasks one shared LoRA does as well: Poly, head per task is +0.2 (95 % interval -")
    assert said.endswith("So train one LoRA on all rows.")


def test_the_simplest_of_those_that_are_level_is_advised():
    shares = {**BASE, "one shared LoRA": 0.5, POLY: 0.7, GATES: 0.6}
    said = verdict(comparison(shares, rows=4000))
    assert said.startswith("For these tasks shared LoRA, told the task does as well")
    assert said.endswith("So train one LoRA, and put the task's name before each text.")


def test_a_rival_that_is_ahead_of_routing_is_advised():
    said = verdict(comparison({**BASE, "a LoRA per task": 0.9, POLY: 0.8, GATES: 0.6}))
    assert said.startswith(
        "For these tasks routing does not pay: a LoRA per task is ahead of Poly, head per task by +10.0"
    )
    assert said.endswith("So train a LoRA for each task.")


def test_a_rival_that_is_ahead_of_one_routed_method_and_not_of_the_other_is_not_ahead_of_routing():
    found = comparison({**BASE, "one shared LoRA": 0.9, GATES: 0.9, POLY: 0.8})
    found.runs[POLY] = [Trained(10, 0.99, 0.5, found.runs[POLY][0].right, 1000)]  # best on validation rows
    said = verdict(found)
    assert said.startswith("For these tasks one shared LoRA does as well: gates, head per task is ")
    assert said.endswith("So train one LoRA on all rows.")


def test_rows_too_few_to_tell_are_said_to_be_so():
    said = verdict(comparison({**BASE, POLY: 0.75, GATES: 0.6}, rows=40, apart=True))
    assert said.startswith("These test rows do not tell Poly, head per task from one shared LoRA")
    assert said.endswith("take the simpler: train one LoRA on all rows.")


def test_a_difference_that_is_printed_as_none_is_none(monkeypatch):
    found = comparison({**BASE, POLY: 0.9, GATES: 0.6})
    interval = type(found.accuracy(POLY))
    difference = {"commonest label": interval(0.4, 0.3, 0.5)}
    monkeypatch.setattr(Comparison, "difference", lambda self, a, b: difference.get(b, interval(0.015, 0.0004, 0.031)))
    assert "+1.5 (95 % interval +0.0 to +3.1)" in verdict(found)
    assert verdict(found).startswith("These test rows do not tell Poly, head per task from one shared LoRA")
    monkeypatch.setattr(Comparison, "difference", lambda self, a, b: difference.get(b, interval(0.015, 0.0006, 0.031)))
    assert verdict(found).startswith("For these tasks routing pays")


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_nothing_learnt_is_said_before_anything_is_advised(share):
    said = verdict(comparison(dict.fromkeys(NAMES, share)))
    assert said.startswith("Nothing was learnt that the commonest label does not say")


def test_the_guide_says_what_each_verdict_means():
    guide = (Path(__file__).parents[2] / "docs/guides/compare.md").read_text(encoding="utf-8")
    for words in ("routing pays", "does as well", "routing does not pay", "do not tell", "Nothing was learnt"):
        assert words in guide
