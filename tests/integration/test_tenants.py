"""The simulated tenants: the rule that makes them, and a run of the script on a tiny encoder."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from pathlib import Path

import pytest
from labelled_folder import MEANING, rows_of, write_encoder, write_rows

from peft_poly.compare.data import load_tasks

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("tenants")


@pytest.fixture
def tenants(script):
    """Those of the demo, and the messages that they are made of."""
    args = script.Arguments()
    messages = script.read_messages(EXAMPLES / "data", args.files)
    return script.make_tenants(messages, args), messages


def test_a_tenant_sends_all_messages_of_an_intent_to_one_queue(tenants):
    made, messages = tenants
    intent = {message.text: message.intent for message in messages}
    for rows in made.values():
        queues = {(intent[row["input"]], row["output"]) for row in rows}
        assert len(queues) == len({found for found, _ in queues})


def test_tenants_of_a_trade_agree_on_most_intents_and_others_by_chance(tenants):
    made, messages = tenants
    intent = {message.text: message.intent for message in messages}
    queues = [{intent[row["input"]]: row["output"] for row in rows} for rows in made.values()]
    agree = {True: [], False: []}
    for (m, one), (n, other) in itertools.combinations(enumerate(queues), 2):
        agree[m // 5 == n // 5] += [one[found] == other[found] for found in one.keys() & other.keys()]
    assert 0.65 < sum(agree[True]) / len(agree[True]) < 0.85  # 0.85 squared, and some by chance
    assert 0.15 < sum(agree[False]) / len(agree[False]) < 0.4


def test_nothing_but_the_name_tells_a_tenant_and_tests_have_new_messages(tenants):
    made, _ = tenants
    assert len(made) == 20
    shown = Counter(sum(row["split"] == "train" for row in rows) for rows in made.values())
    assert min(shown) >= 16
    assert max(shown) <= 64
    assert len({tuple(row["options"]) for rows in made.values() for row in rows}) == 1
    texts = {
        split: {row["input"] for rows in made.values() for row in rows if row["split"] == split}
        for split in ("train", "test")
    }
    assert not texts["train"] & texts["test"]


def test_a_seed_makes_the_same_tenants_again_and_another_makes_others(script, tenants):
    made, messages = tenants
    assert script.make_tenants(messages, script.Arguments()) == made
    assert script.make_tenants(messages, script.Arguments(), seed=1) != made


def test_the_script_writes_the_tenants_and_compares_on_them(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.console, "width", 140)
    write_encoder(tmp_path / "encoder")
    for task in MEANING:
        write_rows(tmp_path / "data", [*rows_of(task, 40), *rows_of(task, 8, "test")], f"{task}.jsonl")
    words = "--model encoder --data data --files near count --trades 1 --tenants 2 --queues 2 --tested 8 --epochs 0.1"
    script.main([*words.split(), "--fewest", "8", "--most", "12", "--blocks", "1"])
    said = capsys.readouterr().out
    assert "a LoRA per task" in said
    assert "seconds in all" in said
    assert load_tasks(tmp_path / "outputs/tenants/data").names == ["tenant 1", "tenant 2"]
