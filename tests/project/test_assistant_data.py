"""The letters of `examples/data/assistants` are what their card says: one set of letters, seven answers to each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # examples are no part of the package

import assistant_data
from assistant_data import FORMS, LATER, TRAINED, answer_of, rows_of, scores, told

ASSISTANTS = [*TRAINED, LATER]
SPLITS = {"train": 120, "validation": 20, "test": 40}
REQUESTS = {"order": "Order of", "return": "Return of", "repair": "Repair of", "late": "Late Delivery of"}

per_assistant = pytest.mark.parametrize("name", ASSISTANTS)


def every_row(name: str) -> list[dict]:
    return [row for split in SPLITS for row in rows_of([name], split)]


def letter_of(row: dict) -> str:
    return row["prompt"][-1]["content"]


def orders() -> list[tuple[dict, dict]]:
    """Each row of the assistant `order` with what its answer says."""
    return [(row, json.loads(answer_of(row))) for row in every_row("order")]


def test_there_is_a_file_for_each_assistant_and_for_no_other():
    assert {file.stem for file in assistant_data.DATA.glob("*.jsonl")} == set(ASSISTANTS) == set(FORMS)


@per_assistant
def test_every_row_is_a_chat_with_its_task(name):
    for row in every_row(name):
        assert list(row) == ["task", "prompt", "completion", "split"]
        assert row["task"] == name
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["prompt"])


@per_assistant
def test_every_split_has_its_rows(name):
    assert Counter(row["split"] for row in every_row(name)) == SPLITS


@per_assistant
def test_all_assistants_are_sent_the_same_letters_in_the_same_order(name):
    assert [row["prompt"] for row in every_row(name)] == [row["prompt"] for row in every_row("order")]


@per_assistant
def test_the_prompt_does_not_say_who_is_asked(name):
    for row in every_row(name):
        assert answer_of(row) not in letter_of(row)
        assert row["prompt"][0]["content"] == "You answer letters to a shop."


def test_told_the_prompt_says_it_and_nothing_else_changes():
    row = every_row("tags")[0]
    found = told(row)
    assert found["prompt"][0]["content"] == "You answer letters to a shop. Assistant: tags."
    assert found["prompt"][1:] == row["prompt"][1:]
    assert row["prompt"][0]["content"] == "You answer letters to a shop."


@per_assistant
def test_every_answer_has_the_form_of_its_assistant_and_of_no_other(name):
    for row in every_row(name):
        assert [other for other in ASSISTANTS if FORMS[other](answer_of(row))] == [name]


@per_assistant
@pytest.mark.parametrize("answer", ["", "Hello Maria, how can I help you?", "{}", "null", "[1]", '{"request": 1}'])
def test_other_texts_have_no_assistants_form(name, answer):
    assert not FORMS[name](answer)


def test_no_two_letters_are_alike():
    bags = [frozenset(re.findall(r"\w+", letter_of(row).lower())) for row in every_row("order")]
    assert max(len(a & b) / len(a | b) for a, b in combinations(bags, 2)) <= 0.7


def test_half_of_what_is_held_out_is_about_things_that_are_new():
    things = {split: [answer["item"] for row, answer in orders() if row["split"] == split] for split in SPLITS}
    new = set(things["test"] + things["validation"]) - set(things["train"])
    assert len(new) == 6
    for split, number in (("validation", 10), ("test", 20)):
        assert abs(sum(thing in new for thing in things[split]) - number) <= 1


def test_every_request_is_in_every_split():
    for split in SPLITS:
        kinds = Counter(answer["request"] for row, answer in orders() if row["split"] == split)
        assert set(kinds) == set(REQUESTS)
        assert min(kinds.values()) >= SPLITS[split] / 10


def test_the_answers_of_a_letter_agree_with_one_another_and_with_the_letter():
    others = {name: every_row(name) for name in ASSISTANTS}
    for number, (row, order) in enumerate(orders()):
        said = {name: answer_of(rows[number]) for name, rows in others.items()}
        letter, thing = letter_of(row), order["item"]
        assert thing.rstrip("y").removesuffix("fe").lower() in letter.lower()
        assert order["day"] is None or order["day"] in letter
        assert said["title"].startswith(REQUESTS[order["request"]])
        assert said["tags"].startswith(f"#{order['request']} ")
        assert said["tags"].endswith(f" #{thing.replace(' ', '-')}")
        assert said["slip"].splitlines()[:2] == [f"ITEM: {thing.upper()}", f"NUMBER: {order['number']}"]
        name = re.search(r"(\w+)$", letter)[1]
        assert all(name in said[assistant] for assistant in ("summary", "desk", "chat"))
        assert ("I am sorry" in said["desk"]) == (said["tags"].split()[1][1:] in ("toys", "electronics", "stationery"))


def test_scores_count_forms_and_right_answers():
    rows = rows_of(["tags", "title"], "test")[38:42]
    said = [answer_of(rows[0]), "#order #toys #nothing", answer_of(rows[2]), "no."]
    assert scores(rows, said) == {"tags": {"form": 100.0, "exact": 50.0}, "title": {"form": 50.0, "exact": 50.0}}


def test_unknown_assistants_and_splits_are_named():
    with pytest.raises(ValueError, match=r"There is no assistant 'lawyer' .* it has chat, desk, order"):
        rows_of(["lawyer"], "test")
    with pytest.raises(ValueError, match=r"no rows of the split 'dev'; it has \['test', 'train', 'validation'\]"):
        rows_of(["tags"], "dev")


def test_composing_again_writes_the_same_bytes(tmp_path):
    for name in ("compose.py", "things.tsv"):
        (tmp_path / name).write_bytes((assistant_data.DATA / name).read_bytes())
    script = tmp_path / "compose.py"
    subprocess.run([sys.executable, str(script)], check=True)
    for file in assistant_data.DATA.glob("*.jsonl"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_card_shows_an_answer_of_every_assistant():
    card = (assistant_data.DATA / "README.md").read_text(encoding="utf-8")
    letter = re.search(r"^> (.+)$", card, re.MULTILINE)[1]
    for name in ASSISTANTS:
        row = next(row for row in every_row(name) if letter_of(row) == letter)
        line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert all(part in line for part in answer_of(row).splitlines())
