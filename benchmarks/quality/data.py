"""Tasks with options to choose from, out of a folder of JSON lines, and the rows that a run trains and tests on.

A row has `task, instruction, input, output, options, split`; the schema of `examples/data`. Tasks whose rows have no
options (generation) are left out: a ranker can only choose.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

__all__ = ["HELD_OUT", "Row", "Tasks", "batches", "chance", "draw", "families", "load_tasks"]

# Of the data set that the documentation describes; `--held-out` names those of another folder.
HELD_OUT = (
    "active_to_passive", "banking77_payments", "blimp_npi", "clinc_travel", "help_conjunction_nli",
    "implicature_yes_no", "piqa", "sgd_system_act",
)  # fmt: skip
SPLITS = ("train", "validation", "test")
KEYS = {"task", "instruction", "input", "output", "options", "split"}


@dataclass(frozen=True)
class Row:
    """A text, the options to choose from, and which of them is right."""

    task: str
    text: str
    options: tuple[str, ...]
    label: int
    split: str


@dataclass(frozen=True)
class Tasks:
    """Rows by task, each in the order of its file.

    Attributes:
        known: the tasks that are trained together.
        held_out: those that come later.
        skipped: names of those that have no options.
        category: what the rows say of a task's kind; empty if they do not.
    """

    known: dict[str, list[Row]]
    held_out: dict[str, list[Row]]
    skipped: list[str]
    category: dict[str, str]

    def rows(self, task: str, split: str, most: int = 0) -> list[Row]:
        """The first `most` rows (0: all) of one split of a task."""
        rows = {**self.known, **self.held_out}[task]
        return [row for row in rows if row.split == split][: most or None]


def load_tasks(folder: Path, held_out: Sequence[str] = HELD_OUT, instruction: bool = True) -> Tasks:
    """The tasks of a folder, each text with or without its instruction.

    Raises:
        ValueError: the folder has no such files, a line is no JSON, a row lacks a key, an answer is not among its
            options, a held-out name is unknown, a task has no row in a split, or no task is left to train.
    """
    tasks: dict[str, list[Row]] = {}
    category: dict[str, str] = {}
    skipped: dict[str, None] = {}
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} is no folder with *.jsonl files, the schema of examples/data.")
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").strip().split("\n"), start=1):
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file.name}, line {number}: this is no JSON: {error}.") from error
            if missing := KEYS - found.keys():
                raise ValueError(f"{file.name}, line {number}: the row lacks {sorted(missing)}.")
            if not found["options"]:
                skipped[found["task"]] = None
                continue
            category[found["task"]] = found.get("category", "")
            tasks.setdefault(found["task"], []).append(_row(found, f"{file.name}, line {number}", instruction))
    if unknown := sorted(set(held_out) - tasks.keys() - skipped.keys()):
        raise ValueError(
            f"Held-out tasks {unknown} are not in {folder}. Name yours with --held-out; it has {[*tasks]}."
        )
    for name in skipped:
        tasks.pop(name, None)
    empty = [f"{name} ({split})" for name, rows in tasks.items() for split in SPLITS if split not in _splits(rows)]
    if empty:
        raise ValueError(f"These tasks have no row in a split: {', '.join(empty)}.")
    known = {name: rows for name, rows in sorted(tasks.items()) if name not in held_out}
    if not known:
        raise ValueError(f"No task to train is left in the *.jsonl files of {folder}.")
    later = {name: rows for name, rows in sorted(tasks.items()) if name in held_out}
    return Tasks(known, later, list(skipped), category)


def _splits(rows: list[Row]) -> set[str]:
    return {row.split for row in rows}


def _row(found: dict, place: str, instruction: bool) -> Row:
    if found["output"] not in found["options"]:
        raise ValueError(f"{place}: {found['output']!r} is not one of {found['options']}.")
    text = f"{found['instruction']} {found['input']}" if instruction else found["input"]
    label = found["options"].index(found["output"])
    return Row(found["task"], text, tuple(found["options"]), label, found["split"])


def batches(tasks: Tasks, steps: int, tasks_per_step: int, rows_per_task: int, seed: int) -> Iterator[list[Row]]:
    """The training rows of each step: every method sees the same ones in the same order.

    A step has some rows of each of some tasks, which share their options: an option is then encoded once for several
    rows. All tasks come up equally often, and so do the rows of a task.
    """
    random = Random(f"batches {seed}")
    names, left = sorted(tasks.known), []
    rows = {name: _for_ever(tasks.rows(name, "train"), random) for name in names}
    for _ in range(steps):
        chosen: list[str] = []
        while len(chosen) < min(tasks_per_step, len(names)):
            if all(name in chosen for name in left):
                left += random.sample(names, len(names))
            chosen.append(next(name for name in left if name not in chosen))
            left.remove(chosen[-1])
        yield [next(rows[name]) for name in chosen for _ in range(rows_per_task)]


def draw(tasks: Tasks, task: str, shots: int, number: int) -> list[Row]:
    """The `number`-th draw of so many training rows of a task, the same for every method and seed."""
    rows = tasks.rows(task, "train")
    if len(rows) < shots:
        raise ValueError(f"Task {task!r} has {len(rows)} training rows, fewer than the {shots} to draw.")
    return Random(f"draw {task} {number}").sample(rows, shots)


def chance(rows: Sequence[Row]) -> float:
    """Per cent right without reading: the commonest answer if all rows have the same options, else that of guessing."""
    if len({frozenset(row.options) for row in rows}) > 1:
        return 100 * fmean(1 / len(row.options) for row in rows)
    return 100 * max(Counter(row.options[row.label] for row in rows).values()) / len(rows)


def families(names: Sequence[str]) -> dict[str, str]:
    """The family of each task that has kin: what two or more names begin with, up to the first underscore."""
    stems = [name.partition("_")[0] for name in names]
    return {name: stem for name, stem in zip(names, stems, strict=True) if stems.count(stem) > 1}


def _for_ever(things: list, random: Random) -> Iterator:
    """Pass after pass over `things`, each in an order of its own."""
    while True:
        yield from random.sample(things, len(things))
