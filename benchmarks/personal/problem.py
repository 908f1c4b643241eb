"""Labelled texts by task, where the same text may have another label in another task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

__all__ = ["Example", "Problem", "batches", "cut", "drawn", "for_tuning"]


@dataclass(frozen=True)
class Example:
    """A text, whose it is, and the class that it has there."""

    task: str
    text: str
    label: int


Examples = dict[str, list[Example]]  # by task


@dataclass(frozen=True)
class Problem:
    """What is learnt and tested.

    Attributes:
        classes: number of classes, the same for all tasks; what they mean may differ from task to task.
        train, test: examples of the tasks that are trained together.
        new_train, new_test: those of tasks that come later.
    """

    classes: int
    train: Examples
    test: Examples
    new_train: Examples
    new_test: Examples

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are trained together, by id."""
        return list(self.train)

    @property
    def texts(self) -> list[str]:
        """All texts."""
        parts = (self.train, self.test, self.new_train, self.new_test)
        return sorted({row.text for part in parts for rows in part.values() for row in rows})

    def named(self) -> Problem:
        """The same, with the name of its task in each text."""

        def told(part: Examples) -> Examples:
            return {
                task: [Example(task, f"{task}: {row.text}", row.label) for row in rows] for task, rows in part.items()
            }

        return Problem(self.classes, *(told(part) for part in (self.train, self.test, self.new_train, self.new_test)))


def cut(problem: Problem, rows: int, tested: int = 0) -> Problem:
    """The first `rows` training examples of each known task, and the first `tested` of all in the test; 0 for all."""

    def first(part: Examples, number: int) -> Examples:
        return {task: found[: number or None] for task, found in part.items()}

    test = (first(problem.test, tested), problem.new_train, first(problem.new_test, tested))
    return Problem(problem.classes, first(problem.train, rows), *test)


def for_tuning(problem: Problem) -> Problem:
    """A fifth of each task's training examples, one at least, is what is tested on; the test examples are not seen."""
    test = {task: rows[: max(1, len(rows) // 5)] for task, rows in problem.train.items()}
    train = {task: rows[len(test[task]) :] or rows for task, rows in problem.train.items()}
    return Problem(problem.classes, train, test, {}, {})


def batches(rows: list[Example], size: int, name: str) -> Iterator[list[Example]]:
    """Batches for ever, pass after pass over all rows, each in an order of its own: the same for every method."""
    random, left = Random(f"batches {name}"), []
    while True:
        while len(left) < size:
            left += random.sample(rows, len(rows))
        yield left[:size]
        left = left[size:]


def drawn(rows: list[Example], number: int) -> list[Example]:
    """The first `number` examples of a new task."""
    if len(rows) < number:
        raise ValueError(f"{rows[0].task} has {len(rows)} examples, fewer than the {number} to draw.")
    return rows[:number]
