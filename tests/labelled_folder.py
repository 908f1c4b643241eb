"""A folder of labelled texts and a tiny encoder, for tests of comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny import bert_config
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "is", "it", "red", "blue", "green", "one", "two", "three", "cat", "dog",
    "sun", "moon", "big", "small", "which", "the", "near", "far", "count",
]  # fmt: skip
MEANING = {"near": ["red", "blue"], "far": ["blue", "red"], "count": ["one", "two", "three"]}  # labels by first word


def rows_of(task: str, number: int = 16, split: str = "train", **keys: Any) -> list[dict[str, Any]]:
    """Texts whose second word is the label of the task `near`, another one in `far`, a third kind in `count`."""
    rows = []
    for n in range(number):
        shown, labels = n % len(MEANING[task]), MEANING[task]
        words = ["is", MEANING["count" if task == "count" else "near"][shown], WORDS[8 + n % 8], WORDS[8 + n * 3 % 8]]
        rows.append({"task": task, "input": " ".join(words), "output": labels[shown], "split": split, **keys})
    return rows


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    """A file of JSON lines in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tasks(folder: Path, tasks: tuple[str, ...] = ("near", "far", "count"), rows: int = 16) -> Path:
    """A file for each task, with all three splits."""
    for task in tasks:
        parts = [*rows_of(task, rows), *rows_of(task, 4, "validation"), *rows_of(task, 8, "test")]
        write_rows(folder, parts, f"{task}.jsonl")
    return folder


def write_tokenizer(folder: Path, **tokens: str) -> Path:
    """A tokenizer that knows `WORDS`."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = tokens or {"pad_token": "[PAD]"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **tokens).save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> Path:
    """A random BERT of two blocks, with its tokenizer."""
    torch.manual_seed(0)
    tf.BertModel(bert_config()).save_pretrained(folder)
    return write_tokenizer(folder)
