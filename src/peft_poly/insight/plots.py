"""Pictures of a router with matplotlib: which task uses which skill, and which tasks are alike.

Needs `pip install matplotlib scipy`. Every function draws on the Axes it is given, or on those of a new figure, and
returns them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from ..checkpoints.reading import Routing
from ..checkpoints.staging import staged_file
from .analysis import span, task_linkage, task_order, task_skill_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dendrogram", "plot_heat_map", "save_plots"]

MOST_NUMBERS = 240  # cells of a heat map that still have room for their number
ROW_INCHES = 0.28
DARK, LIGHT = "#16243d", "#ffffff"


def plot_heat_map(
    routing: Routing,
    *,
    task: Union[int, str, None] = None,
    layer: Optional[str] = None,
    split: Optional[int] = None,
    order: Optional[Sequence[int]] = None,
    ax: Optional[Axes] = None,
) -> Axes:
    """Draw the mixing weights: tasks by skills, or for one task layers by skills. With gates: tasks by ranks.

    The colours run from 0 to the largest weight, at least to twice an even share, so that a router that has not
    decided looks pale and even. Gates are blue above one, red below it and white at one.

    Args:
        routing: what to draw.
        task: draw this task's layers (mean over splits) in place of the tasks.
        layer: of which layer. Default: the mean of all.
        split: of which split. Default: the mean of all.
        order: task ids from top to bottom, as `analysis.task_order` gives. Default: by id.
        ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no such task, layer or split; `task` was given with `layer` or `order`.
    """
    if task is not None and (layer is not None or order is not None):
        raise ValueError("With `task` the rows are the layers, so `layer` and `order` have no meaning. Leave them out.")
    weights = routing.kind.weights.capitalize()
    if task is None:
        rows = list(range(routing.shape[0])) if order is None else list(order)
        matrix, labels = task_skill_matrix(routing, layer, split)[rows], [routing.task_names[row] for row in rows]
        title = f"{weights}, {layer or 'mean of the layers'}"
    else:
        task_id = routing.task_id(task)
        matrix = torch.stack([task_skill_matrix(routing, key, split)[task_id] for key in routing.layers])
        labels, title = routing.layers, f"{weights} of {routing.task_names[task_id]}"
    if split is not None:
        title += f", split {split}"
    ax = _axes(ax, width=2.8 + 0.085 * max(map(len, labels)) + 0.5 * matrix.shape[1], rows=len(labels))
    _draw_matrix(ax, routing, matrix, labels)
    ax.set_title(_plain(title), fontsize=11)
    return ax


def plot_dendrogram(routing: Routing, *, method: str = "average", ax: Optional[Axes] = None) -> Axes:
    """Draw the tree of tasks: the further to the right two branches meet, the less alike are their mixing weights
    (gates).

    Args:
        routing: what to draw.
        method: scipy's name of the way to cluster.
        ax: where to draw.

    Returns:
        The Axes; the x-axis is `1 - cosine`.

    Raises:
        ImportError: matplotlib or scipy is missing.
        ValueError: there is only one task.
    """
    linkage = task_linkage(routing, method)
    ax = _axes(ax, width=5.5 + 0.085 * max(map(len, routing.task_names)), rows=routing.shape[0])
    from scipy.cluster import hierarchy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high xlims")  # all tasks equal
        hierarchy.dendrogram(
            linkage,
            orientation="right",
            labels=[_plain(name) for name in routing.task_names],
            color_threshold=0,
            above_threshold_color="#4269a5",
            leaf_font_size=_font(routing.shape[0]),
            ax=ax,
        )
    ax.invert_yaxis()  # the order of the leaves from top to bottom, as in a heat map
    ax.yaxis.tick_left()
    ax.set_xlim(0, max(float(linkage[:, 2].max()) * 1.05, 1e-6))
    ax.set_xlabel(f"distance, 1 - cosine of the {routing.kind.weights}")
    ax.set_title("Tree of tasks", fontsize=11)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def save_plots(routing: Routing, path: Union[str, Path], task: Union[int, str, None] = None) -> Path:
    """Write the heat map and the tree of tasks, or one task's heat map, as a picture.

    Args:
        routing: what to draw.
        path: the file; its ending says the format (`.png`, `.svg`, `.pdf`).
        task: draw this task's layers only.

    Raises:
        ImportError: matplotlib or scipy is missing.
        ValueError: matplotlib cannot write that format.
    """
    figure_cls = _matplotlib("figure").Figure
    path = Path(path)
    supported = sorted(figure_cls().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in supported:
        raise ValueError(f"{path.name} must end in one of {', '.join('.' + kind for kind in supported)}.")
    rows = len(routing.layers) if task is not None else routing.shape[0]
    two = task is None and routing.shape[0] > 1
    figure = figure_cls(figsize=(13 if two else 8, _height(rows)), layout="constrained")
    axes = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    plot_heat_map(routing, task=task, order=task_order(routing) if two else None, ax=axes[0])
    if two:
        plot_dendrogram(routing, ax=axes[1])
    with staged_file(path) as staging:
        figure.savefig(staging, dpi=150)
    return path


def _draw_matrix(ax: Axes, routing: Routing, matrix: torch.Tensor, labels: Sequence[str]) -> None:
    kind, (low, high) = routing.kind, span(routing, matrix)
    pale = low if kind.centre is None else kind.centre
    colours = "Blues" if kind.centre is None else "RdBu"
    image = ax.imshow(matrix.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(0, matrix.shape[1], 1 + matrix.shape[1] // 24))
    ax.set_yticks(range(matrix.shape[0]), [_plain(label) for label in labels], fontsize=_font(len(labels)))
    ax.set_xlabel(kind.unit)
    ax.figure.colorbar(image, ax=ax, label=kind.weight, fraction=0.05, pad=0.02)
    if matrix.numel() <= MOST_NUMBERS:
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                color = LIGHT if abs(value - pale) > 0.65 * (high - pale) else DARK
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def _axes(ax: Optional[Axes], width: float, rows: int) -> Axes:
    if ax is not None:
        return ax
    return _matplotlib("pyplot").subplots(figsize=(min(width, 16), _height(rows)), layout="constrained")[1]


def _height(rows: int) -> float:
    return min(max(2.4, 1.2 + ROW_INCHES * rows), 60)


def _font(rows: int) -> float:
    return min(9.0, 60 * _height(rows) / rows)


def _plain(text: str) -> str:
    """Dollar signs in a name are no formula."""
    return text.replace("$", r"\$")


def _matplotlib(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("Pictures need matplotlib. Run: pip install matplotlib scipy") from error
