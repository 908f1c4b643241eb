"""The example of tasks with different labels, on a tiny BERT: it trains, prints its table, and shows what comes out."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from rows import tokenizer
from tiny import bert_config
from transformers import BertModel

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data" / "labels"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("different_labels")


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("mode", ["texts", "tags"])
def test_it_trains_compares_and_shows_what_comes_out(example, encoder, tmp_path, capsys, mode):
    arguments = [
        "--mode",
        mode,
        "--model",
        encoder,
        "--epochs",
        "0.1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    example.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))[mode]
    labels = example.MODES[mode][2]
    assert results["together"].keys() == results["single"].keys() == labels.keys()
    for task, metrics in results["together"].items():
        assert metrics.keys() == results["single"][task].keys()
    printed = capsys.readouterr().out
    assert all(f"pipeline, task_ids={task!r}" in printed for task in labels)
    if mode == "texts":  # merged, and under PEFT alone, a task says the same
        said = [line for line in printed.splitlines() if "score" in line and "label" in line][-2:]
        assert len(said) == 2
        assert "ignore_mismatched_sizes=True" in printed


def test_a_label_of_a_word_stands_on_its_first_token(example, encoder):
    rows = example.load_rows(["entities"], "train", example.AutoTokenizer.from_pretrained(encoder))
    assert len(rows) == 80
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)
    assert {label for row in rows for label in row["labels"]} <= {"O", "PER", "LOC", "ORG", -100}


@pytest.mark.parametrize("file", sorted(DATA.glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_data_is_what_its_card_says(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row.get("text") or " ".join(row["tokens"]) for row in rows]
    assert len(set(texts)) == len(texts)
    assert {row["task"] for row in rows} == {file.stem}
    assert Counter(row["split"] for row in rows) == {"train": 72 if file.stem == "topic" else 80, "test": 40}
    assert all(len(row["tags"]) == len(row["tokens"]) for row in rows if "tags" in row)
