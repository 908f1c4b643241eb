"""The picture of a comparison: accuracies with their intervals."""

from __future__ import annotations

from pathlib import Path

from .comparison import MAJORITY, Comparison
from .learning.methods import METHODS, REFERENCE

__all__ = ["check_can_draw", "save_plot"]

ROUTED, OTHER, LINE = "#1d4ed8", "#6b7280", "#9ca3af"


def check_can_draw(path: Path) -> None:
    """Say early, before hours of training, that a picture cannot be drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file's ending is none that it writes.
    """
    try:
        import matplotlib.backends.backend_agg as agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("A picture needs matplotlib. Run: pip install matplotlib") from error
    kinds = agg.FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} must end in one of {', '.join(sorted(kinds))}.")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw all methods, from the majority down.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_can_draw(path)
    from matplotlib.figure import Figure  # no pyplot: it keeps figures, and picks a window system

    figure = Figure(figsize=(7.5, 3), layout="constrained")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
