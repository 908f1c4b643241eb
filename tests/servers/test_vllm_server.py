"""vLLM serves the exported tasks over HTTP, mixed in its batches, with the greedy tokens of `model.generate`."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from environments import python_of, run
from exported import NEW_TOKENS, PROMPTS, TIE, until

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no part of the package

from benchmarks.servers import ask, vllm_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
CLIENTS = 24


def test_vllm_answers_mixed_tasks_with_our_tokens(exported, tmp_path, record_property, capsys):
    def tokens(request: dict) -> list[int]:
        body = {"model": request["task"], "prompt": request["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = ask(f"{address}/v1/completions", {**body, "return_token_ids": True, "skip_special_tokens": False})
        return until(answer["choices"][0]["token_ids"], exported.end)

    environment, log = python_of("vllm").parents[1], tmp_path / "vllm.log"
    serving = vllm_server(environment, exported.base, exported.loras, log, CLIENTS)
    with serving as (address, _), ThreadPoolExecutor(CLIENTS) as pool:
        names = [model["id"] for model in ask(f"{address}/v1/models")["data"]]
        found = list(pool.map(tokens, exported.requests))
        request = exported.requests[0]
        body = {"model": request["task"], "prompt": request["prompt"], "max_tokens": NEW_TOKENS, "temperature": 0}
        transcript = (body, ask(f"{address}/v1/completions", body))
        bare = tokens({**request, "task": names[0]})
    together = re.findall(r"Running: (\d+) reqs", log.read_text(errors="replace"))
    with capsys.disabled():
        print("\n", run(python_of("vllm"), "-c", "import vllm; print('vllm', vllm.__version__)").strip())
        print(json.dumps(transcript), "running together:", together)
        equal = exported.compare(found, "vLLM", record_property)
    assert set(exported.loras) < set(names)
    assert all(abs(tie["ours"] - tie["theirs"]) < TIE for tie in exported.ties)
    assert sum(equal.values()) + len(exported.ties) == PROMPTS * len(exported.loras)
    assert bare != exported.wanted[0]  # the LoRA matters
