"""Runs all units in worker processes of one thread each; the parent alone writes results, so a kill loses little."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from statistics import fmean
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .runs import Run

__all__ = ["run_all"]

_run: Optional[Any] = None  # of a worker process


def _start(make: Callable[[Any], Any], source: Any) -> None:
    import torch
    import transformers

    global _run
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # it would be drawn into that of the parent
    _run = make(source)


def _work(unit: Any) -> list[Any]:
    assert _run is not None
    return _run.carry_out(unit)


def run_all(plan: Any, source: Any, workers: int, console: Console, make: Callable[[Any], Any] = Run) -> None:
    """Carry out what the plan still lacks; a unit's rows are written as soon as it is done.

    Args:
        plan: names the units (`next`, `done`, `slots`), and has their `store`.
        source: what `make` needs.
        workers: number of processes of one thread.
        console: to print to.
        make: makes what carries out a unit, once in each worker.
    """
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PEFT_POLY_QUIET": "1"}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    running: dict[Any, Future[list[Any]]] = {}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (make, source))
    with pool, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("units", total=len(plan.slots), completed=plan.done())
        while True:
            while len(running) < workers and (unit := plan.next(running)):
                running[unit] = pool.submit(_work, unit)
            if not running:
                return
            finished, _ = wait(running.values(), return_when=FIRST_COMPLETED)
            for unit in [unit for unit, future in running.items() if future in finished]:
                results = running.pop(unit).result()
                plan.store.add(unit, results)
                progress.console.print(_said(unit, results), markup=False)
                progress.update(bar, completed=plan.done(), description=f"{unit.stage}, seed {unit.seed}")


def _said(unit: Any, results: list[Any]) -> str:
    shots = f", {unit.shots} rows, draw {unit.draw}" if unit.shots else ""
    mean = fmean(result.accuracy for result in results)
    return f"{unit.stage}, seed {unit.seed}: {unit.line} [{unit.rates}]{shots}: {mean:.2f} ({results[0].seconds:g} s)"
