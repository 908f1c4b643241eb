"""What is to be run: units in an order that makes a fair table of a run cut short, and a CSV of those that are done.

rates (validation rows) ─▶ all assistants, seed 0 ─▶ quantised ─▶ few rows, draws 0.. ─▶ what the six keep of it
                           ─▶ all assistants, seed 1 ─▶ ...
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean

__all__ = ["FEW", "GRID", "KEPT", "METHODS", "OLD_ROWS", "QUANTISED", "Plan", "Result", "Settings", "Store", "Unit"]

METHODS = ["base", "shared LoRA", "shared LoRA, told", "MHR", "gates"]  # the first is not trained
GRID = {  # rate, router's rate; without trials the first
    "shared LoRA": [(2e-3, 0)],  # it cannot know who is asked, at any rate
    "shared LoRA, told": [(2e-3, 0), (1e-3, 0), (4e-3, 0)],
    "MHR": [(2e-3, 0.1), (1e-3, 0.1), (4e-3, 0.1)],
    "gates": [(2e-3, 0.1), (1e-3, 0.1), (4e-3, 0.1), (2e-3, 0.03)],
}
# a way to learn the seventh assistant, and whose adapter it goes on from
FEW = {
    "MHR, routers only (-z)": "MHR",
    "MHR, all": "MHR",
    "gates, gates only (-z)": "gates",
    "gates, all": "gates",
    "shared LoRA, trained on": "shared LoRA, told",
    "LoRA from scratch": None,
}
OLD_ROWS = ", with rows of the six"  # as many of each as make up the number of the seventh's, seen as often
# ways to learn the seventh after which the six are asked again, for they share what is trained
KEPT = [way + more for way in ("MHR, all", "gates, all", "shared LoRA, trained on") for more in ("", OLD_ROWS)]
# base model in training, and the one that answers; the GGUF file's weights are those of the plain one, bit for bit
QUANTISED = {
    "MHR, NF4 then NF4": ("nf4", "nf4"),
    "MHR, NF4 then plain": ("nf4", "plain"),
    "MHR, plain then NF4": ("plain", "nf4"),
}


@dataclass(frozen=True)
class Settings:
    """How much is run."""

    train_rows: int = 120
    validation_rows: int = 20
    test_rows: int = 40
    epochs: float = 2
    seeds: int = 3
    shots: tuple[int, ...] = (8, 16, 32)
    draws: int = 3
    few_steps: int = 40
    few_batch: int = 8
    rank: int = 24  # of the shared LoRA and the gates; MHR has as many in its skills together
    tune: bool = True

    @property
    def name(self) -> str:
        """Part of every line of the CSV, so that results of other settings are not taken for these."""
        return (
            f"{self.train_rows}x{self.epochs:g} r{self.rank} test{self.test_rows} few{self.few_steps}x{self.few_batch}"
        )


@dataclass(frozen=True)
class Unit:
    """One training and what it is tested on; `rates` is given where it is a trial of them."""

    stage: str  # tune, all, quantised, few, kept
    method: str
    seed: int
    shots: int = 0
    draw: int = 0
    rates: tuple[float, float] = (0, 0)


@dataclass(frozen=True)
class Result:
    """Of one assistant: per cent of answers in its form, and right to the letter; which are, 1 or 0 for each row."""

    task: str
    form: float
    exact: float
    parameters: int = 0
    seconds: float = 0  # of the whole unit
    rows: str = ""


class Store:
    """The CSV: a line for each unit and assistant; a unit is written at once, when it is whole."""

    COLUMNS = ("setup", *(field.name for field in fields(Unit)), *(field.name for field in fields(Result)))

    def __init__(self, path: Path, setup: str) -> None:
        self.path, self.setup = path, setup
        self.done: dict[Unit, list[Result]] = {}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                for line in csv.DictReader(file):
                    if line["setup"] == setup:
                        self.done.setdefault(_unit(line), []).append(_result(line))

    def add(self, unit: Unit, results: list[Result]) -> None:
        """Keep what a unit gave."""
        self.done[unit] = results
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            rates = "/".join(f"{rate:g}" for rate in unit.rates)
            lines = [[self.setup, *astuple(unit)[:-1], rates, *asdict(result).values()] for result in results]
            writer.writerows([self.COLUMNS, *lines] if new else lines)


def _unit(line: dict[str, str]) -> Unit:
    rate, router = (float(part) for part in line["rates"].split("/"))
    numbers = (int(line[key]) for key in ("seed", "shots", "draw"))
    return Unit(line["stage"], line["method"], *numbers, rates=(rate, router))


def _result(line: dict[str, str]) -> Result:
    numbers = (float(line["form"]), float(line["exact"]), int(line["parameters"]), float(line["seconds"]))
    return Result(line["task"], *numbers, rows=line["rows"])


class Plan:
    """The units of some settings."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store

    def units(self) -> Iterator[Unit]:
        """All of them, in order."""
        if self.settings.tune:
            for method, grid in GRID.items():
                for rates in grid if len(grid) > 1 else ():
                    yield Unit("tune", method, 0, rates=rates)
        for seed in range(self.settings.seeds):
            for method in METHODS[0 if seed == 0 else 1 :]:
                yield Unit("all", method, seed)
            if seed == 0:
                yield from (Unit("quantised", method, 0) for method in QUANTISED)
                for draw, shots, way in product(range(self.settings.draws), self.settings.shots, FEW):
                    yield Unit("few", way, 0, shots, draw)
                yield from (Unit("kept", way, 0, max(self.settings.shots)) for way in KEPT)

    def left(self) -> list[Unit]:
        return [unit for unit in self.units() if unit not in self.store.done]

    def rates(self, method: str) -> tuple[float, float]:
        """The rates that had most validation rows right to the letter; the first of the grid where none was tried."""
        tried = {
            unit.rates: found
            for unit, found in self.store.done.items()
            if (unit.stage, unit.method) == ("tune", method)
        }
        if not tried:
            return GRID[method][0]
        return max(GRID[method], key=lambda rates: fmean(one.exact for one in tried[rates]) if rates in tried else -1)
