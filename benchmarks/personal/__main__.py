"""Does routing pay where the text does not tell the task? `python -m benchmarks.personal films|tenants [--quick]`.

`films`: users of MovieLens-100k as tasks, from the package recbole. `tenants`: simulated ones, from a folder of texts
with intents (`--data`). What is in the CSV file is done: run the same line again after a stop, and it goes on.
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
from pathlib import Path

import torch
import transformers
from rich.console import Console

from .. import results
from ..quality.store import Store
from ..quality.terminal import printed
from ..quality.workers import run_all
from . import report
from .plan import Plan, Result, Unit
from .runs import Run, Source
from .settings import FILMS, FILMS_QUICK, TENANTS, TENANTS_QUICK
from .tenants import INTENTS

RESULTS = Path(__file__).parent / "results"
SETTINGS = {("films", False): FILMS, ("films", True): FILMS_QUICK, ("tenants", False): TENANTS,
            ("tenants", True): TENANTS_QUICK}  # fmt: skip
console = Console(highlight=False, soft_wrap=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("films", "tenants"), help="whose tastes or queues")
    parser.add_argument("--data", type=Path, help="tenants: folder of *.jsonl files, the schema of examples/data")
    parser.add_argument("--files", nargs="+", default=list(INTENTS), help="tenants: patterns of files with intents")
    parser.add_argument("--model", default="", help="folder of a BERT-like encoder; empty for MiniLM from its package")
    parser.add_argument("--quick", action="store_true", help="one seed, nothing tuned: less than eight minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file and the plot")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/personal"), help="hidden states, adapters")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose tables are to be replaced")
    parser.add_argument("--report-only", action="store_true", help="run nothing; tables of what is done")
    args = parser.parse_args(argv)
    if args.what == "tenants" and args.data is None:
        parser.error("tenants are made of texts: name their folder with --data (make bench-tenants DATA=folder)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    verb = {"films": "make bench-personal", "tenants": "make bench-tenants"}[args.what]
    command = f"{verb} BENCH_ARGS=--quick" if args.quick else verb
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    source = Source(args.data, args.model, args.outputs, SETTINGS[args.what, args.quick], tuple(args.files))
    try:
        run = Run(source)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    path = args.results / f"{args.what}{'-quick' if args.quick else ''}"
    plan = Plan(source.settings, run.setup, Store(path.with_suffix(".csv"), Unit, Result))
    done = plan.done()
    console.print(f"{done} of {len(plan.slots)} units are in {plan.store.path}, setup {run.setup}")
    if not args.report_only:
        run_all(plan, source, args.workers, console, Run)
    if plan.done() > done:
        path.with_suffix(".json").write_text(json.dumps(results.about(command)), encoding="utf-8")
    _report(args, plan, run, path)


def _report(args: argparse.Namespace, plan: Plan, run: Run, path: Path) -> None:
    tables: dict[str, report.Table] = {}
    for case, of in plan.settings.cases.items():
        tables[f"{args.what}: {case}"] = report.case_table(plan, case)
        of_each = {task: len(rows) for task, rows in run.problem(case).train.items()}
        tables[f"{args.what}: {case} by rows"] = report.size_table(plan, case, of_each)
        tables[f"{args.what}: routed at {case}"] = report.routed_table(plan, case)
        if of.new:
            tables[f"{args.what}: new tasks, after {case}"] = report.new_table(plan, case)
        tables[f"{args.what}: settings of {case}"] = report.tuning_table(plan, case)
    for title, rows in tables.items():
        if rows:
            console.print(printed(title, rows, report.SETTINGS))
    for case in plan.settings.cases:
        console.print(report.verdict(plan, case))
    report.plot(plan, path.with_suffix(".png"))
    if args.docs:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for title, rows in tables.items():
            if rows:
                results.write_table(args.docs, title, rows, about, list(rows[0]))


if __name__ == "__main__":
    main()
