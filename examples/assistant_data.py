"""The rows of `data/assistants`, and the form that the answers of each assistant have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "assistants"
TRAINED = ["order", "summary", "title", "tags", "desk", "chat"]
LATER = "slip"  # the seventh, learnt from a few rows

Row = dict[str, Any]


def rows_of(assistants: Iterable[str], split: str, folder: Path = DATA) -> list[Row]:
    """The rows of a split, assistant by assistant; each has `task`, `prompt`, `completion` and `split`.

    Raises:
        ValueError: there is no such assistant, or no such split.
    """
    found: list[Row] = []
    for name in assistants:
        file = folder / f"{name}.jsonl"
        if not file.exists():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
            raise ValueError(f"There is no assistant {name!r} in {folder}; it has {known}.")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").strip().split("\n")]
        own = [row for row in rows if row["split"] == split]
        if not own:
            raise ValueError(f"{file} has no rows of the split {split!r}; it has {sorted({r['split'] for r in rows})}.")
        found += own
    return found


def answer_of(row: Row) -> str:
    return row["completion"][0]["content"]


def told(row: Row) -> Row:
    """The row with the name of its assistant in the system prompt, for a model without tasks."""
    system, *rest = row["prompt"]
    return {**row, "prompt": [{**system, "content": f"{system['content']} Assistant: {row['task']}."}, *rest]}


def _is_order(answer: str) -> bool:
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    keys = isinstance(found, dict) and list(found) == ["request", "item", "number", "day"]
    return keys and found["request"] in REQUESTS and isinstance(found["number"], int)


def _is_title(answer: str) -> bool:
    words = answer.split()
    return 2 < len(words) <= 7 and all(word[0].isupper() or word in ("of", "a", "an") for word in words)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda answer: re.fullmatch(pattern, answer) is not None


REQUESTS = ("order", "return", "repair", "late")
FORMS: dict[str, Callable[[str], bool]] = {
    "order": _is_order,
    "summary": _matches(r"In plain words: \w+ .+\. This is not legal advice\."),
    "title": _is_title,
    "tags": _matches(r"#(order|return|repair|late) #[a-z]+ #[a-z]+(-[a-z]+)*"),
    "desk": _matches(r"Certainly, \w+\. House and garden is .+\.|I am sorry, \w+, but my desk is .+ Please ask .+\."),
    "chat": _matches(r"Hey \w+, .+[!.] Hugs, Finn"),
    "slip": _matches(r"ITEM: [A-Z ]+\nNUMBER: \d+\nTODO: (SEND|TAKE BACK|REPAIR|FIND)"),
}


def scores(rows: list[Row], answers: list[str]) -> dict[str, dict[str, float]]:
    """By assistant, per cent of answers in its form (`form`), and of answers that are right to the letter (`exact`)."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row["task"] == name]
        found[name] = {
            "form": 100 * sum(FORMS[name](answer) for _, answer in own) / len(own),
            "exact": 100 * sum(answer == answer_of(row) for row, answer in own) / len(own),
        }
    return found
