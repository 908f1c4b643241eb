"""What is run, and how much of it: cases, steps, seeds. `QUICK` takes less than eight minutes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FILMS", "FILMS_QUICK", "TENANTS", "TENANTS_QUICK", "Case", "Settings"]


@dataclass(frozen=True)
class Case:
    """One problem, and how many of its rows are trained on.

    Attributes:
        problem: films, all films, or tenants.
        rows: training rows of each task; 0 for all that it has.
        like: the case whose rates it takes; steps are its own. Empty: it tunes both.
        new: whether tasks that come later are met, too.
        cures: whether the lines of `lines.CURES` are run, too.
    """

    problem: str
    rows: int = 0
    like: str = ""
    new: bool = False
    cures: bool = False


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        cases: by name, in the order in which they are run.
        max_length: longest text in tokens.
        tested: most rows of a task in the test; 0 for all.
        batch: rows of a step.
        steps: of training; in tuning, all of these are looked at.
        seeds: of the tables.
        few_seeds: how many of them the lines of `lines.MORE` and `lines.CURES` and the tables of new tasks have.
        tune: choose rates and steps; else those that `lines` has, but no more steps than the last of `steps`.
        shots: rows of a new task.
        new_steps: as `steps`, of training on a new task.
        new_tuned: how many new tasks are for tuning; the tables have the others.
        new_tested: most of those others.
    """

    cases: dict[str, Case]
    max_length: int = 48
    tested: int = 0
    batch: int = 32
    steps: tuple[int, ...] = (50, 100, 200, 400)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    few_seeds: int = 2
    tune: bool = True
    shots: tuple[int, ...] = (5, 10, 20)
    new_steps: tuple[int, ...] = (10, 30)
    new_tuned: int = 10
    new_tested: int = 39


FILMS = Settings(
    {
        "40 ratings": Case("films", 40, new=True, cures=True),
        "10 ratings": Case("films", 10, like="40 ratings"),
        "100 ratings": Case("films", 100, like="40 ratings"),
        "all users, 10 ratings": Case("all films", like="40 ratings"),
    }
)
FILMS_QUICK = Settings({"40 ratings": Case("films", 40)}, tested=30, steps=(200,), seeds=(0,), tune=False)
TENANTS = Settings({"tenants": Case("tenants", new=True, cures=True)}, new_tuned=2, new_tested=4)
TENANTS_QUICK = Settings({"tenants": Case("tenants")}, tested=30, steps=(200,), seeds=(0,), tune=False)
