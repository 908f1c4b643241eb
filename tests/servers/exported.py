"""What all engines are asked: the tasks of one adapter of a real chat model, and what `model.generate` answers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from environments import run

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # examples are no part of the package

from assistant_data import answer_of

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = 20
NEW_TOKENS = 32
ROWS_AT_ONCE = 20
TIE = 1e-3  # two log-probabilities so near that the last bits of a sum decide between them


@dataclass
class Exported:
    """The base model's folder, a LoRA folder for each task, and requests with the tokens that we answer."""

    rows: list[dict]  # of the data, with the right answer of each request
    tokenizer: object

    base: Path
    loras: dict[str, Path]
    requests: list[dict]  # task, prompt (token ids)
    wanted: list[list[int]]  # the new tokens of each, greedily, up to the first end
    end: int
    model: object

    def compare(self, found: list[list[int]], engine: str, record) -> dict[str, int]:
        """How many answers of each task are equal, token by token; what differs must begin with a tie.

        Returns:
            the number of equal answers by task; the figures are printed and recorded.
        """
        equal, ties = dict.fromkeys(self.loras, 0), []
        for request, wanted, got in zip(self.requests, self.wanted, found, strict=True):
            if wanted == got:
                equal[request["task"]] += 1
                continue
            place = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None)
            assert place is not None, f"{engine} stopped elsewhere: {got} for {wanted}"
            ours, theirs = self.logprobs(request, wanted, place, got[place])
            ties.append({"task": request["task"], "place": place, "ours": ours, "theirs": theirs})
        record(f"{engine}", json.dumps({"equal": equal, "of": PROMPTS, "ties": ties}))
        print(f"\n{engine}: equal answers of {PROMPTS} {equal}; others, log-probabilities of either token: {ties}")
        self.ties = ties
        return equal

    def right(self, found: list[list[int]]) -> float:
        """Per cent of the answers that are right to the letter."""
        said = self.tokenizer.batch_decode(found)
        return 100 * sum(a == answer_of(row) for a, row in zip(said, self.rows, strict=True)) / len(self.rows)

    @torch.inference_mode()
    def logprobs(self, request: dict, tokens: list[int], place: int, other: int) -> tuple[float, float]:
        """What our model gives to its own token at `place` of the answer and to another one."""
        text = torch.tensor([request["prompt"] + tokens[:place]])
        logits = self.model(input_ids=text, task_ids=request["task"]).logits[0, -1]
        chances = torch.log_softmax(logits.double(), dim=-1)
        return float(chances[tokens[place]]), float(chances[other])


def adapter_folder(root: Path) -> Path:
    """The adapter that `make demo-llm` trained, or one that the same script trains in a minute or two."""
    demo = Path(os.environ.get("ASSISTANTS", "outputs/assistants")) / "adapter"
    if (demo / "adapter_config.json").exists():
        return demo
    own = root / "assistants"
    if not (own / "adapter" / "adapter_config.json").exists():
        short = ["--rows", "24", "--epochs", "2", "--letters", "1", "--output_dir", own, "--model", root / "smollm2"]
        run(sys.executable, EXAMPLES / "assistants.py", *short)
    return own / "adapter"


@torch.inference_mode()
def greedy_of_ours(model, tokenizer, requests: list[dict]) -> list[list[int]]:
    """The new tokens of each request, in batches of mixed tasks, up to and without the end."""
    found = []
    for start in range(0, len(requests), ROWS_AT_ONCE):
        part = requests[start : start + ROWS_AT_ONCE]
        batch = tokenizer.pad({"input_ids": [one["prompt"] for one in part]}, padding_side="left", return_tensors="pt")
        made = model.generate(
            **batch, task_ids=[one["task"] for one in part], max_new_tokens=NEW_TOKENS, do_sample=False
        )
        found += [until(row.tolist(), tokenizer.eos_token_id) for row in made[:, batch["input_ids"].shape[1] :]]
    return found


def until(tokens: list[int], end: int) -> list[int]:
    """The tokens before the first `end`."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
