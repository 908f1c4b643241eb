"""Text tasks with options to choose from, and a ranker that one encoder makes: what `train_multitask.py` trains.

Each task is rows of `task, instruction, input, output, options, split` in a folder of JSON-lines files. The encoder
embeds the text (`instruction` and `input`) and each of the row's options; the option nearest to the text is the answer:

    text ────▶ encoder ─▶ mean over tokens ─┐
                  ▲                         ├─▶ cosine / temperature ─▶ cross-entropy over the row's options
    options ─▶ encoder ─▶ mean over tokens ─┘
                  ▲
    task ids ─▶ routers of the adapter (a LoRA has none)

So tasks need no heads of their own, rows may have options of their own, and the encoder can answer before any training.
Letters: b rows, c most options of a row, n different options of a batch, d features.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

KEYS = {"task", "instruction", "input", "output", "options", "split"}
Row = dict[str, Any]
Tokens = dict[str, torch.Tensor]


class Ranker(nn.Module):
    """Scores the options of a row by their cosine with its text."""

    def __init__(self, encoder: nn.Module, temperature: float = 0.05) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature

    @property
    def _no_split_modules(self) -> Any:
        """What FSDP takes as a unit: the encoder's blocks."""
        return self.encoder._no_split_modules

    def embed(self, tokens: Tokens, task_ids: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(b, d)` of texts: the mean over their tokens. `task_ids (b,)` are their tasks."""
        hidden = self.encoder(**tokens, task_ids=task_ids).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(
        self,
        texts: Tokens,
        task_ids: torch.Tensor,
        options: Tokens,
        option_task_ids: torch.Tensor,
        candidates: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss, and scores `(b, c)`. `candidates (b, c)` says which of the `n` options a row has; -1 fills up."""
        cosines = self.embed(texts, task_ids) @ self.embed(options, option_task_ids).T  # (b, n)
        scores = cosines.gather(1, candidates.clamp(min=0)) / self.temperature
        scores = scores.masked_fill(candidates < 0, -torch.inf)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Collator:
    """Turns rows into the arguments of `Ranker.forward`; an option that rows of a task share is embedded once."""

    def __init__(self, tokenizer: Any, task_names: Iterable[str], max_length: int = 128) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.task_id = {name: n for n, name in enumerate(task_names)}

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        pairs = list(dict.fromkeys((row["task"], option) for row in rows for option in row["options"]))
        place = {pair: n for n, pair in enumerate(pairs)}
        candidates = [torch.tensor([place[row["task"], option] for option in row["options"]]) for row in rows]
        return {
            "texts": self.tokens([f"{row['instruction']} {row['input']}" for row in rows]),
            "task_ids": torch.tensor([self.task_id[row["task"]] for row in rows]),
            "options": self.tokens([option for _, option in pairs]),
            "option_task_ids": torch.tensor([self.task_id[task] for task, _ in pairs]),
            "candidates": nn.utils.rnn.pad_sequence(candidates, batch_first=True, padding_value=-1),
            "labels": torch.tensor([row["options"].index(row["output"]) for row in rows]),
        }

    def tokens(self, texts: list[str]) -> Tokens:
        kwargs = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return dict(self.tokenizer(texts, **kwargs))


@torch.inference_mode()
def predict(ranker: Ranker, rows: list[Row], collate: Collator, batch_size: int = 64) -> list[str]:
    """The option chosen for each row."""
    ranker.eval()
    device = next(ranker.parameters()).device
    chosen: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        best = ranker(**send_to_device(collate(batch), device))["logits"].argmax(dim=1)
        chosen += [row["options"][n] for row, n in zip(batch, best.tolist(), strict=True)]
    return chosen


def majority(train_rows: list[Row], rows: list[Row]) -> list[str]:
    """For each row the option that is most often right in its task's training rows; the first one on a tie."""
    counts = Counter((row["task"], row["output"]) for row in train_rows)
    return [max(row["options"], key=lambda option: counts[row["task"], option]) for row in rows]


def load_tasks(folder: str, held_out: Sequence[str] = ()) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by task, and the names of the tasks that a ranker must skip, since their rows have no options.

    Raises:
        ValueError: a row lacks a key, an answer is not among its options, a name in `held_out` is unknown, or no task
            is left.
    """
    tasks: dict[str, list[Row]] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):  # a text may hold U+2028
            if not line.strip():
                continue
            row = json.loads(line)
            if missing := KEYS - row.keys():
                raise ValueError(f"{file.name}, line {number}: the row lacks {sorted(missing)}.")
            if row["options"] and row["output"] not in row["options"]:
                raise ValueError(f"{file.name}, line {number}: {row['output']!r} is not one of {row['options']}.")
            tasks.setdefault(row["task"], []).append(row)
    if unknown := set(held_out) - tasks.keys():
        raise ValueError(f"Unknown tasks {sorted(unknown)}; {folder} has {sorted(tasks)}.")
    tasks = {name: rows for name, rows in sorted(tasks.items()) if name not in held_out}
    skipped = [name for name, rows in tasks.items() if not all(row["options"] for row in rows)]
    left = {name: rows for name, rows in tasks.items() if name not in skipped}
    if not left:
        raise ValueError(f"No task to rank is left in the *.jsonl files of {folder}.")
    return left, skipped


def rows_of(tasks: dict[str, list[Row]], split: str, max_rows: int = 0) -> list[Row]:
    """The rows of a split, task by task, at most `max_rows` of each (0: all).

    Raises:
        ValueError: a task has none.
    """
    found = {name: [row for row in rows if row["split"] == split] for name, rows in tasks.items()}
    if empty := [name for name, rows in found.items() if not rows]:
        raise ValueError(f"These tasks have no row in the split {split!r}: {', '.join(empty)}.")
    return [row for rows in found.values() for row in rows[: max_rows or None]]
