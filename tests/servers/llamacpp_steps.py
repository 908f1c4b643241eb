"""llama.cpp in an environment of its own: `python llamacpp_steps.py REQUESTS.json ANSWERS.json`.

One task a request. With caches in float32 and without flash attention what is left is rounding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy


def greedy(model: llama_cpp.Llama, prompt: list[int], new: int, end: int) -> list[int]:
    model.reset()
    found: list[int] = []
    tokens = prompt
    while len(found) < new:
        model.eval(tokens)
        last = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        token = int(numpy.ctypeslib.as_array(last, shape=(model.n_vocab(),)).argmax())
        if token == end:
            break
        found.append(token)
        tokens = [token]
    return found


def main(source: Path, target: Path) -> None:
    wanted = json.loads(source.read_text(encoding="utf-8"))
    answers: list[list[int]] = [[] for _ in wanted["requests"]]
    for task, lora in wanted["loras"].items():
        model = llama_cpp.Llama(
            model_path=wanted["base"], lora_path=lora, n_ctx=256, n_threads=wanted["threads"], verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
        )  # fmt: skip
        for number, request in enumerate(wanted["requests"]):
            if request["task"] == task:
                answers[number] = greedy(model, request["prompt"], wanted["new"], wanted["end"])
        model.close()
    target.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
