"""Pictures of the results: all lines of a table, accuracy against steps, and which tasks are routed alike."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt

from peft_poly.insight import Routing, plot_dendrogram, task_order

from .lines import BEST, FEW_REFERENCE, MANY, REFERENCE, REFERENCES, SKILL_SIZED
from .plan import Plan
from .report import Accuracies, few_shot, multi_task
from .statistics import mean_and_error

__all__ = ["plot_routing", "plot_steps", "plot_tables"]

ROUTED, GATES, OTHER = "#1d4ed8", "#b45309", "#6b7280"
STYLES = {  # of the lines that are trained longer
    REFERENCE: {"color": OTHER, "marker": "o"},
    "LoRA per task": {"color": OTHER, "marker": "s", "linestyle": "--"},
    "Poly": {"color": ROUTED, "marker": "^", "linestyle": "--"},
    BEST: {"color": ROUTED, "marker": "o"},
    "gates": {"color": GATES, "marker": "D"},
    SKILL_SIZED: {"color": OTHER, "marker": ".", "linestyle": ":"},
}


def _over_seeds(accuracies: Accuracies) -> tuple[float, float, list[float]]:
    """Mean, standard error (0 for one seed), and each seed's mean over the tasks."""
    means = [fmean(tasks.values()) for tasks in accuracies.values()]
    mean, error = mean_and_error(means)
    return mean, 0.0 if math.isnan(error) else error, means


def plot_tables(plan: Plan, path: Path) -> None:
    """Means and their errors, of every line of both tables, seeds as dots."""
    shots = plan.settings.shots[-1]
    panels = [
        ("all tasks together, test accuracy in %", multi_task(plan), REFERENCE),
        (f"a new task from {shots} rows, test accuracy in %", few_shot(plan, shots), FEW_REFERENCE),
    ]
    panels = [panel for panel in panels if panel[1]]
    heights = [len(found) for _, found, _ in panels]
    size = (7.5, 1.4 + 0.3 * sum(heights))
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=size, layout="constrained", height_ratios=heights, squeeze=False
    )
    for axes, (title, found, reference) in zip(all_axes[:, 0], panels, strict=True):
        for place, (line, accuracies) in enumerate(found.items()):
            mean, error, means = _over_seeds(accuracies)
            colour = ROUTED if "Poly" in line or "MHR" in line else GATES if "gates" in line else OTHER
            axes.errorbar(mean, place, xerr=error, fmt="o", color=colour, capsize=3)
            axes.plot(means, [place] * len(means), ".", color=colour, alpha=0.35)
            if line == reference:
                axes.axvline(mean, color="#9ca3af", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(found)), list(found), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_steps(plan: Plan, path: Path) -> None:
    """Accuracy against steps, of the lines that are trained longer, too."""
    found = {line: values for table in REFERENCES for line, values in multi_task(plan, table).items()}
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    steps = set()
    for base, style in STYLES.items():
        lines = [line for line in found if line == base or (MANY[line].like == base and MANY[line].times > 1)]
        points = [(plan.settings.steps * MANY[line].times, *_over_seeds(found[line])[:2]) for line in lines]
        if points:
            x, y, errors = zip(*points, strict=True)
            steps.update(x)
            axes.errorbar(x, y, yerr=errors, label=base, capsize=3, **style)
    axes.set_xscale("log")
    axes.set_xticks(sorted(steps), sorted(steps), minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps of training on all tasks together")
    axes.set_ylabel("test accuracy in %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_routing(routing: Routing, path: Path) -> None:
    """Left how alike two tasks' differences from the mean of the tasks are (cosine); right the tree of tasks.

    The mean over layers of what a task mixes is even everywhere, for skill 3 of one layer has nothing to do with skill
    3 of another; what tells tasks apart is where they differ from the others, layer by layer.
    """
    rows = torch.cat([weights.double().flatten(1) for weights in routing.weights.values()], dim=1)
    away = torch.nn.functional.normalize(rows - rows.mean(dim=0))
    order = task_order(routing)
    likeness = (away @ away.T)[order][:, order].fill_diagonal_(torch.nan)
    names = [routing.task_names[task] for task in order]
    most = max(likeness.nan_to_num().abs().max().item(), 0.1)
    size = (10.5, 1.6 + 0.22 * len(names))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(1.6, 1))
    image = left.imshow(likeness.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_xticks([])
    left.set_xlabel("the same tasks, in the same order")
    left.set_title("Likeness of the differences from the mean task", fontsize=10)
    figure.colorbar(image, ax=left, label="cosine: blue alike, red opposed", fraction=0.05, pad=0.02)
    plot_dendrogram(routing, ax=right).set_yticks([])  # its leaves are the rows beside it
    figure.savefig(path, dpi=150)
    plt.close(figure)
