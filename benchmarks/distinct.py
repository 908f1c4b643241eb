"""How cost grows with the distinct tasks of a batch: `python -m benchmarks.distinct [--docs docs/benchmarks/speed.md]`.

A forward of 1,000 rows of one token, T5-small shape, 1 to 1,000 distinct tasks of 1,000: CPU time over that of the bare
model, and a plot. `adapters` goes as far as its LoRAs are loaded (`--loras`): one takes the longer the more there are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console

from . import results
from .cases import Case
from .figures import Figures, measure, variants_of

IMAGES = Path(__file__).parents[1] / "docs" / "images"
POINTS = (1, 3, 10, 30, 100, 300, 1000)
WORK = Case("forward", ("lora",), rows=1000, length=1, tasks=1000)
COLUMNS = ("tasks", *results.NAMES)
COLOURS = {"lora": "#9ca3af", "adapters": "#b45309", "poly": "#60a5fa", "mhr": "#1d4ed8", "gates": "#047857"}
LABELS = {
    "lora": "one LoRA for all (one task)",
    "adapters": "a LoRA each",
    "mhr": "MHR",
    "poly": "Poly",
    "gates": "gates",
}


def plot(path: Path, figures: Sequence[Figures]) -> None:
    """A line for each variant with its name at its end, so that no key is needed; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    lines = {name: [(one.case.distinct, one.over[name]) for one in figures if name in one.over] for name in COLOURS}
    lines = {name: known for name, known in lines.items() if known}
    for name, known in lines.items():
        axes.plot(*zip(*known, strict=True), marker="o", markersize=4, color=COLOURS[name])
    axes.set(xscale="log", xlabel="distinct tasks in a batch of 1,000 rows", ylabel="CPU time over the bare model's")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=1)
    axes.spines[["top", "right"]].set_visible(False)
    for name, height in apart({name: known[-1][1] for name, known in lines.items()}, axes.get_ylim()[1] - 1).items():
        x, label = lines[name][-1][0], LABELS.get(name, name)
        axes.annotate(label, (x, height), (8, 0), textcoords="offset points", va="center", color=COLOURS[name])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def apart(heights: Mapping[str, float], span: float) -> dict[str, float]:
    """Heights of labels, none nearer to the one below than a line of text is high, a 16th of the picture's span."""
    placed: dict[str, float] = {}
    lowest = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = lowest = max(height, lowest + span / 16)
    return placed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", type=int, default=30, help="the most tasks that `adapters` does (default: 30)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a point (default: 5)")
    parser.add_argument("--budget", type=float, default=20, help="seconds of a point after its third round")
    parser.add_argument("--picture", type=Path, default=IMAGES / "speed.png", help="the plot")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table is to be replaced")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    console, variants, taken = Console(highlight=False), variants_of(WORK), []
    for distinct in (point for point in POINTS if point <= WORK.rows):
        rivals = (*WORK.rivals, *(("adapters",) if distinct <= args.loras else ()))
        one = measure(replace(WORK, distinct=distinct, rivals=rivals), args.rounds, args.budget, variants)
        taken.append(one)
        over = ", ".join(f"{name} {value:.3f}" for name, value in one.over.items() if name != "base")
        console.print(f"{distinct:,} tasks: {over} (load {one.load}, {one.rounds} rounds)", soft_wrap=True)
    loading = variants.loading
    console.print(f"{len(loading)} LoRAs took {sum(loading):.1f} s to load, the last {loading[-1]:.2f} s")
    plot(args.picture, taken)
    if args.docs:
        rows = [
            {**row, "tasks": f"{one.case.distinct:,}"} for one, row in zip(taken, results.rows_of(taken), strict=True)
        ]
        loads = [one.load for one in taken]
        results.write_table(args.docs, "distinct", rows, results.about("python -m benchmarks.distinct"), COLUMNS, loads)


if __name__ == "__main__":
    main()
