"""The demo's data set is what its card says: ten tasks in one schema, balanced, without repeats or leaks."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
FILES = sorted(DATA.glob("*.jsonl"))
KEYS = ["task", "instruction", "input", "output", "options", "split"]
SPLITS = {"train": 100, "validation": 20, "test": 40}

per_task = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def test_there_are_ten_tasks():
    assert len(FILES) == 10


@per_task
def test_every_row_has_the_schema_in_one_order(file):
    for row in read(file):
        assert list(row) == KEYS
        assert row["task"] == file.stem
        assert all(isinstance(row[key], str) for key in KEYS if key != "options")
        assert all(row[key] == " ".join(row[key].split()) != "" for key in ("instruction", "input", "output"))


@per_task
def test_the_options_are_one_list_of_different_texts_that_holds_the_answer(file):
    rows = read(file)
    options = rows[0]["options"]
    assert len(set(options)) == len(options) >= 2
    assert all(row["options"] == options and row["output"] in options for row in rows)


@per_task
def test_a_task_has_one_instruction(file):
    assert len({row["instruction"] for row in read(file)}) == 1


@per_task
def test_every_split_has_its_rows(file):
    assert Counter(row["split"] for row in read(file)) == SPLITS


@per_task
def test_answers_are_balanced_in_every_split(file):
    rows = read(file)
    for split in SPLITS:
        counts = Counter(row["output"] for row in rows if row["split"] == split)
        assert set(counts) == set(rows[0]["options"])
        assert max(counts.values()) - min(counts.values()) <= 1


@per_task
def test_the_order_does_not_give_the_answer_away(file):
    rows = [row for row in read(file) if row["split"] == "train"]
    repeats = sum(a["output"] == b["output"] for a, b in pairwise(rows))
    assert repeats < 0.7 * len(rows)  # neither sorted by answer (about 95) ...
    assert len({row["output"] for row in rows[:20]}) > 1  # ... nor in two blocks


@per_task
def test_no_two_rows_of_a_task_are_alike(file):
    bags = [words(row["input"]) for row in read(file)]
    assert max(len(a & b) / len(a | b) for a, b in combinations(bags, 2)) <= 0.5


def test_no_text_is_in_two_rows_or_two_splits():
    texts = Counter(" ".join(re.findall(r"\w+", row["input"].lower())) for file in FILES for row in read(file))
    assert [text for text, n in texts.items() if n > 1] == []


@per_task
def test_no_text_states_its_answer(file):
    assert [row["input"] for row in read(file) if row["output"].lower() in row["input"].lower()] == []


def test_the_card_has_every_task_with_its_options():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    for file in FILES:
        row = read(file)[0]
        assert f"| {row['task']} | {row['instruction']} | {', '.join(row['options'])} |" in card
