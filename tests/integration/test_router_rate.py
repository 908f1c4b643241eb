"""The script behind docs/images/router-rate.png, run for a few steps: its distance against a naive loop, its table."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("router_rate")


def test_the_distance_is_the_total_variation_from_equal_weights(script):
    model = script.teacher(script.network())
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith("module_logits"):
            for row in parameter.view(-1, script.SKILLS).tolist():  # a task and a split
                used = sum(value > 0 for value in row)
                # sigmoid(5) and sigmoid(-5) are 1 and 0 to within a hundredth
                found.append(1 - used / script.SKILLS if used else 0.0)
    assert script.distance(model) == pytest.approx(sum(found) / len(found), abs=0.02)
    assert script.distance(script.with_adapter(script.network())) == pytest.approx(0, abs=1e-3)


def test_the_teacher_has_no_error_and_a_fresh_student_that_of_the_network(script):
    base = script.network()
    target = script.teacher(base)
    assert script.error(script.with_adapter(base), target) == pytest.approx(1)
    student = script.with_adapter(base)
    student.load_state_dict(target.state_dict())
    assert script.error(student, target) == pytest.approx(0, abs=1e-6)


def test_a_faster_router_gets_further_and_the_runs_are_repeatable(script):
    slow, _ = script.learn(1e-3, 1e-3, seed=0, steps=20, every=10)
    fast, error = script.learn(1e-3, 0.1, seed=0, steps=20, every=10)
    assert len(slow) == len(fast) == 3
    assert slow[0] == fast[0]
    assert fast[-1] > 10 * slow[-1]
    again, same = script.learn(1e-3, 0.1, seed=0, steps=20, every=10)
    assert (again, same) == (fast, error)


def test_the_script_prints_its_table_and_draws(script, capsys, tmp_path):
    torch.manual_seed(0)
    script.main(["--steps", "16", "--every", "2", "--seeds", "0", "--plot", str(tmp_path / "folder" / "rate.png")])
    output = capsys.readouterr().out
    for text in ("1e-3 for all", "1e-3, routers at 0.1", "step 2", "step 8", "step 16", "error left"):
        assert text in output
    assert (tmp_path / "folder" / "rate.png").read_bytes().startswith(b"\x89PNG")
