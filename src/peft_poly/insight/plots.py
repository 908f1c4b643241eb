"""Pictures of a router with matplotlib: which task uses which skill, and which tasks are alike.

Needs `pip install matplotlib scipy`. Every function draws on the Axes it is given, or on those of a new figure, and
returns them.
"""

from __future__ import annotations

import importlib
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from ..checkpoints.reading import Routing
from ..checkpoints.staging import staged_file
from .analysis import farthest, span, task_linkage, task_order, task_skill_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["figure_class", "plot_dendrogram", "plot_heat_map", "plot_heat_maps", "save_plots"]

MOST_NUMBERS = 240  # cells of a heat map that still say their number
COLUMN, ROW = 0.45, 0.28  # inches of a skill, of a task
LETTER, KEY, EDGES, TREE = 0.08, 1.1, 1.2, 3.6  # of a label's letter, the key to colours, title and axis, the tree
NUMBER = (0.31, 0.16)  # that the number of a cell needs
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
    decided looks pale and even. Gates are blue above one, red below it and white at one. Two maps that are to be
    compared have one scale in `plot_heat_maps`.

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
    labels = routing.layers if task is not None else routing.task_names
    ax = _axes(ax, _heat_width(labels, routing.shape[2]), rows=len(labels))
    _draw_heat_map(ax, routing, task, layer, split, order, _inches(ax)[0] - _heat_width(labels, 0))
    return ax


def plot_heat_maps(
    routings: Mapping[str, Routing],
    *,
    layer: Optional[str] = None,
    split: Optional[int] = None,
    order: Optional[Sequence[int]] = None,
) -> list[Axes]:
    """Draw the heat maps of several adapters side by side: one scale of colours, one order of the tasks.

    The number of a skill means nothing: skill 1 of one adapter may do what skill 2 of another does.

    Args:
        routings: what to draw, by the titles; all of one kind. A task is found by its name.
        layer: of which layer. Default: the mean of all.
        split: of which split. Default: the mean of all.
        order: task ids of the first adapter from top to bottom. Default: all, by id.

    Returns:
        The Axes, from left to right.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no routing, no such layer or split; an adapter is of another kind, or lacks a task.
    """
    if not routings:
        raise ValueError("There is no routing to draw, got an empty `routings`.")
    first = next(iter(routings.values()))
    names = [first.task_names[row] for row in (range(first.shape[0]) if order is None else order)]
    for title, routing in routings.items():
        missing = [name for name in names if name not in routing.task_names]
        if routing.kind != first.kind or missing:
            lacks = f"has no task {', '.join(missing)}" if missing else f"has {routing.kind.weights}"
            raise ValueError(
                f"Heat maps side by side are of the same tasks, and all {first.kind.weights}, but {title!r} {lacks}. "
                "Leave it out, or choose other tasks with `order`."
            )
    drawn = [
        task_skill_matrix(routing, layer, split)[[routing.task_names.index(name) for name in names]]
        for routing in routings.values()
    ]
    lows, highs = zip(*(span(first, matrix) for matrix in drawn), strict=True)
    columns = [matrix.shape[1] for matrix in drawn]
    size = (_heat_width(names, sum(columns)), _height(len(names)))
    figure = _matplotlib("pyplot").figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False, width_ratios=columns)[0]
    inches = (size[0] - _heat_width(names, 0)) / sum(columns)
    for ax, title, matrix in zip(axes, routings, drawn, strict=True):
        image = _draw_matrix(ax, first, matrix, names, (min(lows), max(highs)), inches * matrix.shape[1])
        ax.set_title(_wrapped(title, inches * matrix.shape[1]), fontsize=10)
        ax.label_outer()
    figure.colorbar(image, ax=axes, label=first.kind.weight, fraction=0.05, pad=0.02)
    return list(axes)


def plot_dendrogram(routing: Routing, *, method: str = "average", ax: Optional[Axes] = None) -> Axes:
    """Draw the tree of tasks: the further to the right two branches meet, the less alike are their mixing weights
    (gates).

    Args:
        routing: what to draw.
        method: scipy's name of the way to cluster.
        ax: where to draw.

    Returns:
        The Axes; the x-axis is `1 - cosine`, from 0 to the furthest that two tasks can be apart: 1, with gates 2.

    Raises:
        ImportError: matplotlib or scipy is missing.
        ValueError: there is only one task.
    """
    linkage, names = task_linkage(routing, method), [_plain(name) for name in routing.task_names]
    ax = _axes(ax, width=LETTER * max(map(len, names)) + 1.5 * TREE, rows=len(names))
    from scipy.cluster import hierarchy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high xlims")  # all tasks equal
        hierarchy.dendrogram(
            linkage,
            orientation="right",
            labels=names,
            color_threshold=0,
            above_threshold_color="#4269a5",
            leaf_font_size=_font(ax, len(names)),
            ax=ax,
        )
    ax.invert_yaxis()  # the order of the leaves from top to bottom, as in a heat map
    ax.yaxis.tick_left()
    ax.set_xlim(0, farthest(routing))
    ax.set_xlabel(f"distance, 1 - cosine of the {routing.kind.weights}")
    ax.set_title("Tree of tasks", fontsize=10)
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
    path = Path(path)
    figure_cls = figure_class(path)
    two = task is None and routing.shape[0] > 1
    labels = routing.task_names if task is None else routing.layers
    width, aside = _heat_width(labels, routing.shape[2]), _heat_width(labels, 0)
    widths = [width - aside, *([TREE] if two else [])]
    figure = figure_cls(figsize=(aside + sum(widths), _height(len(labels))), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_heat_map(axes[0], routing, task, None, None, task_order(routing) if two else None, widths[0])
    if two:
        plot_dendrogram(routing, ax=axes[1]).set_yticks([])  # its leaves are the rows beside it
    with staged_file(path) as staging:
        figure.savefig(staging, dpi=150)
    return path


def figure_class(path: Path) -> type[Figure]:
    """matplotlib's `Figure`, which can write this file: no pyplot, which keeps figures, and picks a window system.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib cannot write that format.
    """
    figure_cls: type[Figure] = _matplotlib("figure").Figure
    supported = sorted(figure_cls().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in supported:
        raise ValueError(f"{path.name} must end in one of {', '.join('.' + kind for kind in supported)}.")
    return figure_cls


def _draw_heat_map(
    ax: Axes,
    routing: Routing,
    task: Union[int, str, None],
    layer: Optional[str],
    split: Optional[int],
    order: Optional[Sequence[int]],
    width: float,
) -> None:
    """Draw `plot_heat_map`, its cells in so many inches."""
    title, labels = routing.kind.weights.capitalize(), routing.layers
    if task is None:
        rows = list(range(routing.shape[0])) if order is None else list(order)
        matrix, labels = task_skill_matrix(routing, layer, split)[rows], [routing.task_names[row] for row in rows]
        title += f", {layer or 'mean of the layers'}"
    else:
        task_id = routing.task_id(task)
        matrix = torch.stack([task_skill_matrix(routing, key, split)[task_id] for key in routing.layers])
        title += f" of {routing.task_names[task_id]}"
    image = _draw_matrix(ax, routing, matrix, labels, span(routing, matrix), width)
    ax.figure.colorbar(image, ax=ax, label=routing.kind.weight, fraction=0.05, pad=0.02)
    beside = min(KEY, LETTER * max(map(len, labels)))  # room on either side of the cells
    ax.set_title(_wrapped(title if split is None else f"{title}, split {split}", width + 2 * beside), fontsize=10)


def _draw_matrix(
    ax: Axes,
    routing: Routing,
    matrix: torch.Tensor,
    labels: Sequence[str],
    limits: tuple[float, float],
    width: float,
) -> AxesImage:
    """Draw the cells, in so many inches; where one has room for its number, with that."""
    kind, (low, high), (n_rows, n_columns) = routing.kind, limits, matrix.shape
    pale = low if kind.centre is None else kind.centre
    colours = "Blues" if kind.centre is None else "RdBu"
    image = ax.imshow(matrix.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    room = (max(width, 0.1) / n_columns, (_inches(ax)[1] - EDGES) / n_rows)
    ax.set_xticks(range(0, n_columns, math.ceil(NUMBER[0] / room[0])))
    ax.set_yticks(range(n_rows), [_plain(label) for label in labels], fontsize=_font(ax, n_rows))
    ax.set_xlabel(kind.unit)
    if matrix.numel() <= MOST_NUMBERS and room[0] > NUMBER[0] and room[1] > NUMBER[1]:
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                color = LIGHT if abs(value - pale) > 0.65 * (high - pale) else DARK
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    return image


def _wrapped(title: str, width: float) -> str:
    """A title in lines of so many inches; where it must break, after a comma first."""
    letters = max(16, int(width / LETTER))
    parts = [title] if len(title) <= letters else re.split("(?<=,) ", title)
    return "\n".join(line for part in parts for line in textwrap.wrap(_plain(part), letters))


def _axes(ax: Optional[Axes], width: float, rows: int) -> Axes:
    if ax is not None:
        return ax
    return _matplotlib("pyplot").subplots(figsize=(width, _height(rows)), layout="constrained")[1]


def _heat_width(labels: Sequence[str], columns: int) -> float:
    """Inches of a heat map with its labels and the key to its colours."""
    cells = max(COLUMN * columns, 4 * COLUMN) if columns else 0.0
    return min(LETTER * max(map(len, labels)) + KEY + cells, 24)


def _height(rows: int) -> float:
    return min(max(2.4, EDGES + ROW * rows), 60)


def _inches(ax: Axes) -> tuple[float, float]:
    """Width and height of what an Axes has of its figure, labels included."""
    figure, spec = ax.figure, ax.get_subplotspec()
    whole = (figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi)
    if spec is None:
        box = ax.get_position()
        return whole[0] * box.width, whole[1] * box.height
    grid: Any = spec.get_gridspec()
    ratios = (grid.get_width_ratios(), grid.get_height_ratios())
    shares = [
        sum(part[n] for n in own) / sum(part) for part, own in zip(ratios, (spec.colspan, spec.rowspan), strict=True)
    ]
    return whole[0] * shares[0], whole[1] * shares[1]


def _font(ax: Axes, rows: int) -> float:
    """Points that a row's label may have, so that it does not touch the next."""
    return min(9.0, max(54 * (_inches(ax)[1] - EDGES) / rows, 1.0))


def _plain(text: str) -> str:
    """Dollar signs in a name are no formula."""
    return text.replace("$", r"\$")


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("Pictures need matplotlib. Run: pip install matplotlib scipy") from error
