"""Does routing pay? `python -m benchmarks.quality --data FOLDER [--quick]`.

Trains every method on all tasks of the folder and on a few rows of those held out, and writes tables and plots. What
is in the CSV file is done: run the same line again after a stop, and it goes on. `docs/benchmarks/quality.md` says what
is compared and how.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging

if __name__ == "__main__":  # importing it changes no logging
    logging.disable(logging.WARNING)  # what PEFT imports would say what it lacks

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from .. import results
from . import plots, report, routing
from .data import HELD_OUT, chance
from .plan import Plan
from .runs import Run, Source
from .settings import FULL, QUICK
from .store import Store
from .terminal import printed
from .workers import run_all

RESULTS = Path(__file__).parent / "results"
console = Console(highlight=False, soft_wrap=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of *.jsonl files, the schema of examples/data")
    parser.add_argument("--held-out", nargs="*", default=list(HELD_OUT), help="tasks that come later, from few rows")
    parser.add_argument("--model", default="", help="folder of a BERT-like encoder; empty for MiniLM from its package")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps, nothing tuned: ten minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("longer", "long"),
        default=[],
        help="these tables of longer training alone, at the rates that `lines` has: nothing is tuned",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file and the plots")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/quality"), help="hidden states, trained adapters")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose tables are to be replaced")
    parser.add_argument("--report-only", action="store_true", help="run nothing; tables of what is done")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    command = "make bench-quality BENCH_ARGS=--quick" if args.quick else "make bench-quality"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = QUICK if args.quick else FULL
    if args.only:
        command += f" BENCH_ARGS='--only {' '.join(args.only)}'"
        settings = replace(settings, tune=False, only=tuple(args.only))
    source = Source(args.data, tuple(args.held_out), args.model, args.outputs, settings)
    console.print(f"Tasks of {args.data}; their hidden states, if not in {args.outputs}, take a minute or two")
    try:
        run = Run(source)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    name = "quality-quick" if args.quick else "quality"
    plan = Plan(source.settings, run.setup, Store(args.results / f"{name}.csv"))
    tasks = run.tasks
    console.print(f"{len(tasks.known)} tasks, {len(tasks.held_out)} held out, setup {run.setup}")
    if tasks.skipped:
        console.print(f"Left out, for their rows have no options to choose from: {', '.join(tasks.skipped)}")
    done = plan.done()
    console.print(f"{done} of {len(plan.slots)} units are in {plan.store.path}")
    if not args.report_only:
        run_all(plan, source, args.workers, console)
    if plan.done() > done:
        (args.results / f"{name}.json").write_text(json.dumps(results.about(command)), encoding="utf-8")
    _report(args, run, plan, args.results / name)


def _report(args: argparse.Namespace, run: Run, plan: Plan, path: Path) -> None:
    tables = {
        "All tasks together": report.many_table(plan),
        "Settings of the router": report.best_table(plan),
        "The same, three times as long": report.many_table(plan, "long"),
        "The same, nine times as long": report.many_table(plan, "longer"),
        "Less MHR, nine times as long": report.best_table(plan, "longer"),
        "The same, all layers adapted": report.many_table(plan, "deep"),
        "The same, texts without their instruction": report.many_table(plan, "bare"),
        "A new task": report.few_table(plan),
        "A new task, after nine times as long": report.few_table(plan, "longer"),
    }
    for title, rows in tables.items():
        if rows:
            console.print(printed(title, rows, report.SETTINGS))
    looked = []
    if report.multi_task(plan):
        looked = _pictures(run, plan, path)
        if looked:
            console.print(printed("What the routers learned", looked, report.SETTINGS))
        else:
            console.print(f"No look at the routers: the adapters of these results are not in {args.outputs}.")
    if args.docs:
        rows = {**run.tasks.known, **run.tasks.held_out}
        guesses = {task: chance(run.tasks.rows(task, "test")) for task in rows}
        measured = path.with_suffix(".json")
        about = (
            json.loads(measured.read_text(encoding="utf-8"))
            if measured.exists()
            else results.about("make bench-quality")
        )
        report.write(args.docs, plan, about, looked, guesses)


def _pictures(run: Run, plan: Plan, path: Path) -> list[dict[str, Any]]:
    """Draws all that is done; what the routers of the best lines learned comes back."""
    plots.plot_tables(plan, path.with_suffix(".png"))
    if report.multi_task(plan, "long"):
        plots.plot_steps(plan, path.with_name(f"{path.name}-steps.png"))
    looked: list[dict[str, Any]] = []
    for table in ("main", "long", "longer"):  # the picture is of the last, the longest trained
        if best := routing.best_routed(plan, table):
            looked += routing.look(run, plan, best, path.with_name(f"{path.name}-routing.png"))
    return looked


if __name__ == "__main__":
    main()
