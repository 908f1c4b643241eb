"""PEFT without this package loads every exported task and answers mixed batches with the tokens of `model.generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from environments import run
from exported import NEW_TOKENS, PROMPTS, TIE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_peft_alone_answers_mixed_tasks_with_our_tokens(exported, tmp_path, record_property, capsys):
    source, target = tmp_path / "requests.json", tmp_path / "answers.json"
    loras = {task: str(path) for task, path in exported.loras.items()}
    asked = {"base": str(exported.base), "loras": loras, "requests": exported.requests, "new": NEW_TOKENS}
    source.write_text(json.dumps(asked), encoding="utf-8")
    run(sys.executable, Path(__file__).with_name("peft_steps.py"), source, target)
    found = [until(row, exported.end) for row in json.loads(target.read_text(encoding="utf-8"))]
    with capsys.disabled():
        print("\n", json.dumps({**exported.requests[0], "answer": found[0]}))
        equal = exported.compare(found, "PEFT", record_property)
    assert all(abs(tie["ours"] - tie["theirs"]) < TIE for tie in exported.ties)
    assert sum(equal.values()) + len(exported.ties) == PROMPTS * len(exported.loras)
