"""Two processes see together what one sees: rows sampled by task, metrics by task, a resumed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_steps

HERE = Path(__file__).parent


@pytest.mark.transformers_5(reason="opens no optimizer's state on ranks of a CPU")
def test_two_processes_do_together_what_one_does(tmp_path):
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, HERE / "trainer_steps.py", tmp_path],
        capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = trainer_steps.steps(tmp_path / "alone", 1)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.tensor(ranks[0]["losses"]), torch.tensor(alone["losses"]), rtol=1e-3, atol=1e-4)
    for rank in ranks:
        assert rank["table"] == alone["table"]
        assert len(rank["seen"]) == len(alone["seen"]) == 12
        assert rank["rest"] == rank["seen"][8:]  # what is resumed in the second epoch goes on with its own rows
        whole, again = rank["weights"]
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        for name, weight in alone["weights"][0].items():
            torch.testing.assert_close(whole[name], weight, rtol=1e-4, atol=1e-6)
    for one, other, both in zip(ranks[0]["seen"], ranks[1]["seen"], alone["seen"], strict=True):
        assert one + other == both
