"""vLLM serves the exported tasks over HTTP, mixed in its batches, with the greedy tokens of `model.generate`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from environments import python_of, run
from exported import NEW_TOKENS, PROMPTS, TIE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
CLIENTS = 24


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(base, loras, log):
    """`vllm serve` on this machine, until the block ends; gives its address."""
    python, port = python_of("vllm"), free_port()
    command = [python.parent / "vllm", "serve", base, "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", "float32", "--max-model-len", 256, "--max-num-seqs", CLIENTS, "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", 8, "--max-loras", len(loras), "--lora-modules"]
    command += [f"{task}={path}" for task, path in loras.items()]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **settings},
            start_new_session=True,
        )  # fmt: skip
        try:
            while "Application startup complete" not in log.read_text(errors="replace"):
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-5000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=120)


def ask(address: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever proxy is set
    with opener.open(request, timeout=3600) as response:
        return json.load(response)


def test_vllm_answers_mixed_tasks_with_our_tokens(exported, tmp_path, record_property, capsys):
    def tokens(request: dict) -> list[int]:
        body = {"model": request["task"], "prompt": request["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = ask(address, "/v1/completions", {**body, "return_token_ids": True, "skip_special_tokens": False})
        return until(answer["choices"][0]["token_ids"], exported.end)

    with serving(exported.base, exported.loras, tmp_path / "vllm.log") as address, ThreadPoolExecutor(CLIENTS) as pool:
        names = [model["id"] for model in ask(address, "/v1/models")["data"]]
        found = list(pool.map(tokens, exported.requests))
        request = exported.requests[0]
        body = {"model": request["task"], "prompt": request["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
        transcript = (body, ask(address, "/v1/completions", body))
        bare = tokens({**request, "task": names[0]})
    together = re.findall(r"Running: (\d+) reqs", (tmp_path / "vllm.log").read_text(errors="replace"))
    with capsys.disabled():
        print("\n", run(python_of("vllm"), "-c", "import vllm; print('vllm', vllm.__version__)").strip())
        print(json.dumps(transcript), "running together:", together)
        equal = exported.compare(found, "vLLM", record_property)
    assert set(exported.loras) < set(names)
    assert all(abs(tie["ours"] - tie["theirs"]) < TIE for tie in exported.ties)
    assert sum(equal.values()) + len(exported.ties) == PROMPTS * len(exported.loras)
    assert bare != exported.wanted[0]  # the LoRA matters
