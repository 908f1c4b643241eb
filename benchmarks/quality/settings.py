"""How much of everything: rows, steps, seeds. `FULL` is what the documentation shows, `QUICK` takes ten minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["FULL", "QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        upper_layers: how many of the encoder's last layers are adapted.
        max_length: longest text in tokens.
        train_rows, validation_rows, test_rows: the first so many of a task's split.
        steps, tasks_per_step, rows_per_task: of training on all tasks.
        seeds: of the tables.
        more_seeds: of `lines.MATTER`, beside those.
        tune_seed: of the runs that rates are chosen by, on validation rows.
        tune: choose rates; else those that `lines` has.
        tune_steps: of those runs: half as many, for they are many.
        only: these tables of longer training alone, and nothing of few rows; empty for all.
        extra: the tables of longer training, of all layers and of texts without instructions, too.
        few_steps, few_batch: of training on a few rows.
        shots: numbers of those rows.
        draws: how often they are drawn.
    """

    OF_UNITS: ClassVar = (
        "seeds",
        "more_seeds",
        "tune_seed",
        "tune",
        "tune_steps",
        "extra",
        "only",
        "few_steps",
        "shots",
        "draws",
    )  # a unit names these itself

    upper_layers: int = 2
    max_length: int = 64
    train_rows: int = 300
    validation_rows: int = 50
    test_rows: int = 200
    steps: int = 200
    tasks_per_step: int = 8
    rows_per_task: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: tuple[int, ...] = ()
    tune_seed: int = 100
    tune: bool = True
    tune_steps: int = 100
    extra: bool = True
    only: tuple[str, ...] = ()
    few_steps: int = 20
    few_batch: int = 8
    shots: tuple[int, ...] = (16, 32)
    draws: int = 3


FULL = Settings(more_seeds=(3, 4))
QUICK = Settings(steps=100, test_rows=50, seeds=(0,), tune=False, extra=False, shots=(16,), draws=1)
