"""Servers that a benchmark or a test starts on this machine and asks over HTTP; vLLM is one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ask", "family", "post", "started", "vllm_server"]

# a small cache, no reports home, and nothing of the caller's packages
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}


@contextmanager
def started(command: list[object], ready: str, log: Path, **environment: str) -> Iterator[tuple[str, int]]:
    """A server in a process group of its own, until the block ends; gives what `ready` found in its log, and its id.

    Raises:
        RuntimeError: it ended before it was ready; the message has the end of its log.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            while not (found := re.search(ready, log.read_text(errors="replace"))):
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                raise RuntimeError(f"The server ended: {log.read_text(errors='replace')[-5000:]}")
            yield found[0], process.pid
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process and its group, which may outlive it."""
    for sign, patience in ((signal.SIGTERM, 120), (signal.SIGKILL, 10)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


@contextmanager
def vllm_server(
    environment: Path, base: Path, loras: dict[str, Path], log: Path, rows: int = 24, **options: object
) -> Iterator[tuple[str, int]]:
    """vLLM with exported tasks, on a port of this machine; gives its address and its process.

    It is what `vllm serve` starts; that script does not find its own version in the wheel for CPUs. More can be loaded
    while it runs, and `options` are its own: `max_loras=8` is `--max-loras 8`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "model": base, "host": "127.0.0.1", "port": port, "dtype": "float32", "max_model_len": 256,
        "max_num_seqs": rows, "max_lora_rank": 8, "max_loras": max(len(loras), 1), **options,
    }  # fmt: skip
    command: list[object] = [environment / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--enforce-eager", "--enable-lora"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", value]
    if loras:
        command += ["--lora-modules", *(f"{task}={path}" for task, path in loras.items())]
    settings = {**VLLM_ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with started(command, "Application startup complete", log, **settings) as (_, process):
        yield f"http://127.0.0.1:{port}", process


def ask(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that an address of this machine answers; a body is posted."""
    return json.loads(post(address, body))


def post(address: str, body: dict[str, Any] | None = None) -> bytes:
    """What an address of this machine answers, as it is; without a body it is got."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever proxy is set
    with opener.open(request, timeout=3600) as response:
        return response.read()


def family(process: int) -> list[psutil.Process]:
    """A process and those that it started."""
    return [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
