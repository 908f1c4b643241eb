"""Speed and memory against who does the same work: `python -m benchmarks.speed [--quick]`.

A figure is a ratio of two variants (`variants`) that did the same work in turn (`measuring`); `cases` has the work and
the bars, to which the launches of a layer (`launches`) are added. Without `--quick` or `--set` all sets are measured.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console

from . import cases, figures, launches, results
from .models import SHAPES

HERE = Path(__file__).parent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=cases.SETS, dest="sets", help="a set of cases (default: all)")
    parser.add_argument(
        "--quick",
        action="append_const",
        const="quick",
        dest="sets",
        help="--set quick: what must be shown, with its bars, four minutes on a free core",
    )
    parser.add_argument("--modes", nargs="+", help="only these: decode, forward, train, saved, peak")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), help="only these")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a case at most (default: 15)")
    parser.add_argument("--budget", type=float, help="seconds of a case after its third round (default: 30; quick: 10)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of speed.csv")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose tables are to be replaced")
    parser.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args(argv)


def measured(chosen: list[cases.Case], rounds: int, budget: float) -> Iterator[figures.Figures]:
    """The figures of cases; a model is built once for those that follow one another with equal sizes."""
    key = variants = None
    for case in chosen:
        sizes = (case.model, case.r, case.skills, case.splits, case.tasks)
        if key != sizes:
            variants = None  # the old ones go before new ones come
            key, variants = sizes, figures.variants_of(case)
        yield figures.measure(case, rounds, budget, variants)


def run(name: str, args: argparse.Namespace, console: Console) -> None:
    """One set of cases: measured, printed, kept."""
    begin, taken = time.perf_counter(), []
    chosen = [
        case
        for case in cases.SETS[name]
        if (not args.modes or case.mode in args.modes) and (not args.models or case.model in args.models)
    ]
    for one in measured(chosen, args.rounds, args.budget or (10 if name == "quick" else 30)):
        taken.append(one)
        if not one.over:
            console.print(f"{one.case}: to come")
            continue
        over = ", ".join(f"{name} {value:.3f}" for name, value in one.over.items() if name != "base")
        console.print(f"{one.case}, {one.case.sizes}: {over} (load {one.load}, {one.rounds} rounds)", soft_wrap=True)
        if (one.difference or 0) > figures.DIFFERENCE:
            console.print(f"[red]outputs of the same work differ by {one.difference:.1e}")
    about = results.about(f"python -m benchmarks.speed --set {name}")
    rows, loads, claims = results.rows_of(taken), [one.load for one in taken], [c for one in taken for c in one.claims]
    title = f"{about['command']}, {about['date']}, {about['machine']}, torch {about['torch']}, one thread"
    console.print(results.table(f"{title}: cost over the bare model", results.COLUMNS, rows))
    if claims:
        claims += [] if args.modes or args.models else launches.claims(launches.counts_here())
        console.print(results.table("as a part of what it stands against", results.CLAIMS, results.claim_rows(claims)))
        verdicts = Counter(claim.verdict.split()[0] for claim in claims)
        console.print(f"{verdicts['hit']} hit, {verdicts['miss']} missed, {verdicts['to']} to come")
    console.print(f"{time.perf_counter() - begin:.0f} s")
    if args.no_save:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    results.append_csv(args.results / "speed.csv", taken, about)
    if args.docs:
        columns = ("work", "settings", *results.COLUMNS[1:]) if name == "shapes" else results.COLUMNS
        results.write_table(args.docs, name, rows, about, columns, loads)
        if claims:
            results.write_table(args.docs, "claims", results.claim_rows(claims), about, results.CLAIMS, loads)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in args.sets or cases.SETS:
        run(name, args, results.console())


if __name__ == "__main__":
    main()
