"""llama.cpp in an environment of its own: `python llamacpp_steps.py REQUESTS.json ANSWERS.json`.

One task after the other, all requests for it in one batch, as its server does with requests of one LoRA. With caches in
float32 and without flash attention what is left is rounding.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as cpp
import numpy

CELLS = 256  # of a sequence, tokens at most


class Engine:
    """The model with one LoRA, and a batch of sequences."""

    def __init__(self, base: str, lora: str, sequences: int, threads: int) -> None:
        settings = cpp.llama_model_default_params()
        settings.use_mmap = False
        settings.use_extra_bufts = False  # plain kernels: those of AMX died of an illegal instruction in a guest
        self.model = cpp.llama_model_load_from_file(base.encode(), settings)
        how = cpp.llama_context_default_params()
        how.n_seq_max, how.n_ctx, how.n_batch, how.n_ubatch = sequences, CELLS * sequences, 2048, 2048
        how.n_threads = how.n_threads_batch = threads
        how.type_k = how.type_v = cpp.GGML_TYPE_F32
        how.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = cpp.llama_init_from_model(self.model, how)
        adapters = (cpp.llama_adapter_lora_p_ctypes * 1)(cpp.llama_adapter_lora_init(self.model, lora.encode()))
        assert cpp.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        self.words = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.batch = cpp.llama_batch_init(2048, 0, 1)

    def likeliest(self, tokens: dict[int, list[int]], places: dict[int, int]) -> dict[int, int]:
        """Take the next tokens of each sequence, the first at its place; the likeliest token after the last of them."""
        last, size = {}, 0
        for sequence, new in tokens.items():
            for offset, token in enumerate(new):
                self.batch.token[size], self.batch.pos[size] = token, places[sequence] + offset
                self.batch.n_seq_id[size], self.batch.seq_id[size][0] = 1, sequence
                self.batch.logits[size] = offset == len(new) - 1
                size += 1
            last[sequence] = size - 1
        self.batch.n_tokens = size
        assert cpp.llama_decode(self.context, self.batch) == 0
        logits = {sequence: cpp.llama_get_logits_ith(self.context, index) for sequence, index in last.items()}
        return {s: int(numpy.ctypeslib.as_array(found, shape=(self.words,)).argmax()) for s, found in logits.items()}

    def greedy(self, prompts: list[list[int]], new: int, end: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        tokens, places = dict(enumerate(prompts)), dict.fromkeys(range(len(prompts)), 0)
        for _ in range(new):
            found = self.likeliest(tokens, places) if tokens else {}
            places = {sequence: places[sequence] + len(tokens[sequence]) for sequence in found}
            tokens = {sequence: [token] for sequence, token in found.items() if token != end}
            for sequence, (token,) in tokens.items():
                answers[sequence].append(token)
        return answers

    def close(self) -> None:
        cpp.llama_batch_free(self.batch)
        cpp.llama_free(self.context)
        cpp.llama_model_free(self.model)


def main(source: Path, target: Path) -> None:
    wanted = json.loads(source.read_text(encoding="utf-8"))
    answers: list[list[int]] = [[] for _ in wanted["requests"]]
    for task, lora in wanted["loras"].items():
        numbers = [number for number, request in enumerate(wanted["requests"]) if request["task"] == task]
        engine = Engine(wanted["base"], lora, len(numbers), wanted["threads"])
        prompts = [wanted["requests"][number]["prompt"] for number in numbers]
        for number, answer in zip(numbers, engine.greedy(prompts, wanted["new"], wanted["end"]), strict=True):
            answers[number] = answer
        engine.close()
    target.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
