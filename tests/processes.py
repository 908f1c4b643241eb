"""Starting a script on two processes of this machine, as users start it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def accelerate(config: str) -> list[str]:
    options = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *options]


def launch(launcher: list[str], *command: object, timeout: int = 200, gpus: bool = False) -> str:
    """Run a script under a launcher; its output."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    env |= {} if gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, *launcher, *(str(part) for part in command)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
