"""A run that is killed in mid-epoch and resumed from the Trainer's checkpoint ends as one that was not does.

Bit for bit: order of rows, router noise, dropout, both moments of the optimizer and the schedule all go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import resume_steps
import torch
from packaging.version import Version
from transformers.trainer_utils import get_last_checkpoint

HERE = Path(__file__).parent


SAMPLINGS = ["shuffled", "uniform", "gates"]
OLD = Version(version("accelerate")) < Version("1.15") and Version(version("transformers")).major < 5


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with what each of the killed runs left."""
    folder = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, HERE / "resume_steps.py", folder, *SAMPLINGS],
        capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ends = [line.split() for line in done.stdout.splitlines() if line.split()[0] in SAMPLINGS]
    assert ends == [[name, str(int(signal.SIGKILL))] for name in SAMPLINGS], done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, killed, sampling):
    if OLD and sampling != "uniform":  # whose order of rows is ours
        pytest.skip("accelerate before 1.15 draws the rows of the first epoch again")
    whole = resume_steps.trainer(tmp_path, sampling)
    whole.train()
    checkpoint = Path(get_last_checkpoint(str(killed / sampling)))
    assert checkpoint.name == "checkpoint-8"  # step 10 was never saved
    resumed = resume_steps.trainer(killed / sampling, sampling)
    start = {name: value.clone() for name, value in resume_steps.weights(resumed.model).items()}
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 12
    expected = resume_steps.weights(whole.model)
    for name, value in resume_steps.weights(resumed.model).items():
        assert torch.equal(value, expected[name]), name
        assert not torch.equal(value, start[name]), name
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    for one, other in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
    rates = [[group["lr"] for group in run.optimizer.param_groups] for run in (whole, resumed)]
    assert rates[0] == rates[1]


def test_without_the_saved_random_state_it_would_not(tmp_path):
    """The control: the comparison above can fail."""
    whole = resume_steps.trainer(tmp_path / "whole", "shuffled")
    whole.train()
    (tmp_path / "whole" / "checkpoint-8" / "rng_state.pth").unlink()
    again = resume_steps.trainer(tmp_path / "again", "shuffled")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    expected = resume_steps.weights(whole.model)
    assert any(not torch.equal(value, expected[name]) for name, value in resume_steps.weights(again.model).items())
