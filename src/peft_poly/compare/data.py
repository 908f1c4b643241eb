"""Labelled texts of many tasks, out of a folder of JSON lines; each task has labels of its own.

    {"task": "acme", "input": "Where is my parcel?", "output": "shipping", "split": "train"}

`split` is train, validation or test. A row may have an `instruction`, which stands before its input, and `options`, the
labels of its task; without these a task's labels are the outputs of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Row", "Tasks", "batches", "load_tasks"]

KEYS = ("task", "input", "output", "split")
SPLITS = ("train", "validation", "test")
FEWEST = 2  # training rows of a task: one of them may be held out


@dataclass(frozen=True)
class Row:
    """A text of a task, and its label there."""

    task: str
    text: str
    label: str


@dataclass(frozen=True)
class Tasks:
    """Rows by split, task by task.

    Attributes:
        labels: what each task chooses from.
        train: what is learnt.
        validation: what rates and steps are chosen on.
        test: what is reported.
        notes: what the user should know of the data.
    """

    labels: dict[str, tuple[str, ...]]
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The tasks, by id."""
        return list(self.labels)


def load_tasks(folder: Path) -> Tasks:
    """The tasks of a folder.

    Without validation rows of every task, every fifth training row, drawn by a fixed seed, is one. Tasks whose rows are
    no choice between the same labels are left out, and named in the notes.

    Raises:
        ValueError: there are no such files; a line is no JSON object, lacks a key, or has a value that cannot be; a
            task has one label only, too few training rows or no test row; fewer than two tasks are left.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for found in _lines(folder):
        by_task.setdefault(found["task"], []).append(found)
    notes, labels = [], {}
    for task, rows in sorted(by_task.items()):
        if reason := _no_classification(rows):
            notes.append(f"Task {task!r} is left out: {reason}.")
        else:
            labels[task] = _labels(task, rows)
    if len(labels) < 2:
        raise ValueError(
            f"{folder} has {len(labels)} task(s) to compare on, {', '.join(labels) or 'none'}; routing is for two or "
            f"more. {' '.join(notes)}"
        )
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for task in labels:
        for found in by_task[task]:
            parts[found["split"]].append(Row(task, found["text"], found["output"]))
    _check_sizes(parts, labels)
    if {row.task for row in parts["validation"]} != set(labels):
        lack = "Not every task has" if parts["validation"] else "There are no"
        notes.append(f"{lack} validation rows: a fifth of the training rows is held out to choose rates and steps on.")
        parts["train"], parts["validation"] = _hold_out(parts["train"] + parts["validation"], labels)
    if seen := len({*parts["train"]} & {*parts["test"]}):
        notes.append(f"{seen} of {len(parts['test'])} test rows are among the training rows, with the same label.")
    notes += _never_learnt(parts["train"], parts["test"], labels)
    return Tasks(labels, parts["train"], parts["validation"], parts["test"], tuple(notes))


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of all files, each checked by itself, its `text` put together."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        what = "has no *.jsonl file" if folder.is_dir() else "is no folder"
        raise ValueError(f'{folder} {what}. Pass a folder of files with rows such as {{"task": "acme", "input": '
                         '"Where is my parcel?", "output": "shipping", "split": "train"}.')  # fmt: skip
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                yield _row(line, f"{file.name}, line {number}")


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: this is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place}: a row is an object with {', '.join(KEYS)}, got {line[:60]}.")
    if missing := [key for key in KEYS if found.get(key) is None]:
        raise ValueError(
            f"{place}: the row lacks {', '.join(missing)}. A row has {', '.join(KEYS)}, and may have instruction and "
            "options."
        )
    if found["split"] not in SPLITS:
        raise ValueError(f"{place}: `split` must be one of {', '.join(SPLITS)}, got {found['split']!r}.")
    options = found.get("options") or []
    if not isinstance(options, list):
        raise ValueError(f"{place}: `options` must be a list of labels, got {options!r}.")
    task, output, options = str(found["task"]), str(found["output"]), [str(option) for option in options]
    if options and output not in options:
        raise ValueError(f"{place}: the output {output!r} is not one of the options {options}.")
    if len(set(options)) < len(options):
        raise ValueError(f"{place}: an option occurs twice: {options}.")
    text = " ".join(str(found[key]) for key in ("instruction", "input") if found.get(key))
    return {"task": task, "text": text, "output": output, "options": options, "split": found["split"]}


def _no_classification(rows: list[dict[str, Any]]) -> str:
    """Why a task is no choice between labels; empty if it is one."""
    if len({frozenset(row["options"]) for row in rows}) > 1:
        return "its rows have options of their own (a multiple choice), and here a task has one list of labels"
    outputs = {row["output"] for row in rows}
    if not rows[0]["options"] and len(rows) > FEWEST and 2 * len(outputs) > len(rows):
        return f"its rows have no options, and {len(outputs)} different outputs in {len(rows)} rows are no labels"
    return ""


def _labels(task: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    labels = tuple(rows[0]["options"]) or tuple(sorted({row["output"] for row in rows}))
    if len(labels) < 2:
        raise ValueError(
            f"Task {task!r} has one label only, {labels[0]!r}: there is nothing to learn. Add rows of another label, "
            "name its labels in `options`, or leave it out."
        )
    return labels


def _check_sizes(parts: dict[str, list[Row]], labels: dict[str, tuple[str, ...]]) -> None:
    sizes = {
        task: [sum(row.task == task for row in parts[split]) for split in ("train", "validation", "test")]
        for task in labels
    }
    if few := [f"{task!r} ({size[0]})" for task, size in sizes.items() if size[0] < FEWEST]:
        raise ValueError(f"Each task needs {FEWEST} training rows or more; too few have: {', '.join(few)}.")
    if untested := [repr(task) for task, size in sizes.items() if not size[2]]:
        raise ValueError(f'These tasks have no test row ("split": "test"): {", ".join(untested)}.')


def _hold_out(rows: list[Row], labels: dict[str, tuple[str, ...]]) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows, a fifth of each task's and one at least."""
    train, validation = [], []
    for task in labels:
        of_task = [row for row in rows if row.task == task]
        Random(f"validation {task}").shuffle(of_task)
        number = max(1, len(of_task) // 5)
        validation += of_task[:number]
        train += of_task[number:]
    return train, validation


def _never_learnt(train: list[Row], test: list[Row], labels: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """A note for each task with test rows of labels that it is not trained on."""
    seen, learnt = {(row.task, row.label) for row in train}, {row.label for row in train}
    for task in labels:
        strange = [row.label for row in test if row.task == task and (task, row.label) not in seen]
        if strange:
            who = "only a head that all tasks share" if any(label in learnt for label in strange) else "no method"
            named = ", ".join(repr(label) for label in sorted({*strange})[:5])
            yield (
                f"Task {task!r} has {len(strange)} test row(s) with labels that none of the rows it is trained on has "
                f"({named}): {who} can learn them."
            )


def batches(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches for ever, pass after pass over all rows, each in an order of its own: the same for every method."""
    random, left = Random(f"batches {seed}"), []  # type: ignore[var-annotated]
    while True:
        while len(left) < size:
            left += random.sample(rows, len(rows))
        yield left[:size]
        left = left[size:]
