"""Results as rows of one CSV file that only grows: what is in it is done, and a killed run goes on."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Result", "Store", "Unit"]


@dataclass(frozen=True)
class Unit:
    """One thing to run, and all that its result depends on.

    Attributes:
        setup: fingerprint of the data, the encoder and the sizes.
        stage: tune, many, tune few, or few.
        line: a key of `lines.MANY` or `lines.FEW`.
        rates: text of the `Rates`.
        source: text of the `Rates` of the adapter that a few-shot unit starts from.
        seed: of the parameters and the order of the rows.
        steps: of training.
        shots, draw: how many rows of a new task, and which.
    """

    setup: str
    stage: str
    line: str
    rates: str
    source: str
    seed: int
    steps: int
    shots: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Result:
    """What a unit has measured on one task.

    Attributes:
        task: its name.
        accuracy: in per cent.
        loss: mean cross-entropy of the rows.
        parameters: how many numbers learned.
        seconds: CPU time of the whole unit.
    """

    task: str
    accuracy: float
    loss: float
    parameters: int
    seconds: float


class Store:
    """The results in a CSV file; reads it when made.

    Args:
        path: the file.
        unit, result: the dataclasses of what is run and of what it measures on one task, of texts and numbers.

    Attributes:
        done: results by unit, in the order of the file.
    """

    def __init__(self, path: Path, unit: type = Unit, result: type = Result) -> None:
        self.path, self.unit, self.result = path, unit, result
        self.names = [[field.name for field in fields(cls)] for cls in (unit, result)]
        # rows: how many the unit has, so that a torn one is seen
        self.columns = [*self.names[0], "rows", *self.names[1]]
        self.done: dict[Any, list[Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        """Units with fewer rows than they say are of runs that were killed while writing: they count as not done."""
        found: dict[Any, list[Any]] = defaultdict(list)
        sizes: dict[Any, int] = {}
        text = self.path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines()[1:]:
            values = next(csv.reader([line]))  # each line by itself: a torn one may end inside of quotation marks
            if len(values) != len(self.columns) or "" in values:
                continue
            row = dict(zip(self.columns, values, strict=True))
            unit = self.unit(**{name: _typed(self.unit, name, row[name]) for name in self.names[0]})
            result = self.result(**{name: _typed(self.result, name, row[name]) for name in self.names[1]})
            if all(result.task != other.task for other in found[unit]):
                found[unit].append(result)
            sizes[unit] = int(row["rows"])
        self.done = {unit: results for unit, results in found.items() if len(results) == sizes[unit]}

    def add(self, unit: Any, results: list[Any]) -> None:
        """Append a unit's rows in one write."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if not self._cut_torn_row():
            writer.writerow(self.columns)
        writer.writerows([*astuple(unit), len(results), *astuple(result)] for result in results)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, buffer.getvalue().encode())
        finally:
            os.close(file)
        self.done[unit] = results

    def _cut_torn_row(self) -> int:
        """Cut off what a killed run may have left of a row; how many bytes the file has then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return 0
        size = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, size)
        return size


def _typed(cls: type, name: str, text: str) -> str | int | float:
    kind = {field.name: field.type for field in fields(cls)}[name]
    return {"str": str, "int": int, "float": float}[str(kind)](text)
