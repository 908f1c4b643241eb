"""Tenants as tasks, a simulation: each routes the same messages to queues of its own.

The rule, all of it drawn by a seed: messages have one of two dozen intents. Each trade sends each intent to one of its
queues, at random. A tenant belongs to a trade, agrees with it on most intents, and sends the others elsewhere. What a
tenant shows are some messages with their queues, few or many; neither the intent nor the trade is told to anyone. So
the text does not say the queue, and tenants of one trade can learn from one another.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from .problem import Example, Problem

__all__ = ["INTENTS", "Message", "Rule", "make_tenants", "read_messages"]

INTENTS = ("clinc_*", "banking77_*", "hwu_*")  # files of a folder of tasks whose answers are intents


@dataclass(frozen=True)
class Message:
    """A text, what it is about, and whether it is of the part that is tested."""

    text: str
    intent: str
    tested: bool


@dataclass(frozen=True)
class Rule:
    """How tenants are made.

    Attributes:
        intents: how many of those that the texts have are met, the same for all; all of them if they are no more.
        trades: how many.
        tenants: of each trade; one more of each comes later.
        queues: of each tenant.
        differs: share of the intents that a tenant sends elsewhere than its trade.
        fewest, most: messages that a tenant shows; spread evenly in their logarithm. One that comes later has most.
        tested: messages of each tenant in the test.
        seed: of all that is drawn.
    """

    intents: int = 24
    trades: int = 6
    tenants: int = 10
    queues: int = 4
    differs: float = 0.15
    fewest: int = 8
    most: int = 64
    tested: int = 60
    seed: int = 0


def read_messages(folder: Path, patterns: Sequence[str] = INTENTS) -> list[Message]:
    """The texts of a folder of tasks, the schema of `examples/data`; an intent is an answer in a file.

    Raises:
        ValueError: no file is of one of the patterns.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(f"{pattern}.jsonl")})
    if not files:
        raise ValueError(f"{folder} has no files {', '.join(f'{pattern}.jsonl' for pattern in patterns)}.")
    texts = [file.read_text(encoding="utf-8") for file in files]
    rows = [json.loads(line) for text in texts for line in text.strip().split("\n")]
    messages = {row["input"]: Message(row["input"], f"{row['task']} {row['output']}", row["split"] == "test")
                for row in rows}  # fmt: skip
    return list(messages.values())


def make_tenants(messages: Sequence[Message], rule: Rule = Rule()) -> Problem:
    """The tenants of a rule; the last of each trade comes later."""
    found = sorted({message.intent for message in messages})
    intents = sorted(Random(f"intents {rule.seed}").sample(found, min(rule.intents, len(found))))
    by_part: dict[bool, list[Message]] = defaultdict(list)
    for message in sorted(messages, key=lambda message: message.text):
        if message.intent in intents:
            by_part[message.tested].append(message)
    parts: tuple[dict[str, list[Example]], ...] = ({}, {}, {}, {})
    for trade in range(rule.trades):
        random = Random(f"trade {trade} {rule.seed}")
        shared = {intent: random.randrange(rule.queues) for intent in intents}
        for number in range(rule.tenants + 1):
            name = f"tenant {trade * (rule.tenants + 1) + number + 1}"
            later = 2 if number == rule.tenants else 0
            train, test = _tenant(name, shared, by_part, replace(rule, fewest=rule.most) if later else rule)
            parts[later][name], parts[later + 1][name] = train, test
    return Problem(rule.queues, *parts)


def _tenant(
    name: str, shared: dict[str, int], by_part: dict[bool, list[Message]], rule: Rule
) -> tuple[list[Example], list[Example]]:
    random = Random(f"{name} {rule.seed}")
    queue = dict(shared)
    for intent in random.sample(sorted(shared), round(rule.differs * len(shared))):
        queue[intent] = (shared[intent] + random.randrange(1, rule.queues)) % rule.queues
    shown = round(math.exp(random.uniform(math.log(rule.fewest), math.log(rule.most))))

    def examples(found: list[Message], number: int) -> list[Example]:
        chosen = random.sample(found, min(number, len(found)))
        return [Example(name, message.text, queue[message.intent]) for message in chosen]

    return examples(by_part[False], shown), examples(by_part[True], rule.tested)
