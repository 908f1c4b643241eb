"""The picture of a comparison: accuracies with their intervals."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.staging import staged_file
from ..insight.plots import figure_class
from .comparison import MAJORITY, Comparison
from .learning.methods import METHODS, REFERENCE

__all__ = ["save_plot"]

ROUTED, OTHER, LINE = "#1d4ed8", "#6b7280", "#9ca3af"


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw all methods, from the majority down.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib cannot write that format.
    """
    figure = figure_class(path)(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    names = [MAJORITY, *(method.name for method in METHODS)]
    routed = {method.name for method in METHODS if method.routed}
    for place, name in enumerate(names):
        found = comparison.accuracy(name)
        ends = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
        axes.errorbar(100 * found.mean, place, xerr=ends, fmt="o", capsize=3, color=ROUTED if name in routed else OTHER)
        if name == REFERENCE.name:
            axes.axvline(100 * found.mean, color=LINE, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy in %, mean over {len(comparison.tasks.names)} tasks, with 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    with staged_file(path) as staging:
        figure.savefig(staging, dpi=150)
