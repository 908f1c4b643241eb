"""Speed and memory against LoRA, PEFT's own Poly and the bare model: `python -m benchmarks.speed [--quick]`.

Every figure is a ratio of two variants that were measured in turn; see `measuring` for how, `cases` for what.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import time
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console

from . import cases, results

HERE = Path(__file__).parent
console = Console(highlight=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main table only, in three minutes on a free core")
    parser.add_argument("--modes", nargs="+", help="only these: decode, eval, train, saved, peak, merged, cost")
    parser.add_argument("--models", nargs="+", choices=sorted(cases.SHAPES), help="only these")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a case at most (default: 15)")
    parser.add_argument("--budget", type=float, help="seconds of a case after its third round (default: 30; quick: 8)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of speed.csv and the plot")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table is to be replaced")
    parser.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = [
        case
        for case in (cases.QUICK if args.quick else cases.FULL)
        if (not args.modes or any(case.mode.startswith(mode) for mode in args.modes))
        and (not args.models or case.model in args.models)
    ]
    rows, built, key = [], {}, None
    begin = time.perf_counter()
    for case in sorted(chosen, key=chosen.index):
        needed = (case.model, case.r, case.skills, case.splits, case.tasks)
        if needed != key:
            built.clear()
            built, key = cases.variants_of(case), needed
        rows.append(cases.measure(case, args.rounds, args.budget or (8 if args.quick else 30), built))
        console.print(results.line(rows[-1]), soft_wrap=True)
    command = "python -m benchmarks.speed" + (" --quick" if args.quick else "")
    about = results.about(command)
    console.print(results.table(rows, about))
    console.print(f"{time.perf_counter() - begin:.0f} s")
    if args.no_save:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    results.append_csv(args.results / "speed.csv", rows, about)
    name = "speed" if args.quick else "speed-all"
    results.plot(args.results / f"{name}.png", rows)
    if args.docs:
        results.write_table(args.docs, name, rows, about)


if __name__ == "__main__":
    main()
