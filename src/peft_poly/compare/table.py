"""The table of a comparison, for a terminal and for a machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from .comparison import MAJORITY, Comparison
from .learning.methods import METHODS, REFERENCE
from .statistics import Interval
from .verdict import verdict

__all__ = ["as_numbers", "comparison_table"]


def comparison_table(comparison: Comparison) -> Table:
    """A line for each method, the best accuracy in bold."""
    seeds = comparison.settings.seeds
    caption = "In brackets: 95 % intervals of a bootstrap over the test rows of each task"
    caption += f" and {seeds} seeds." if seeds > 1 else "; one seed, so that another start may move them further."
    table = Table(
        title=f"Accuracy in %, mean over {len(comparison.tasks.names)} tasks, {len(comparison.tasks.test)} test rows",
        title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("method")
    lines = {name: _line(comparison, name) for name in (MAJORITY, *(method.name for method in METHODS))}
    for heading in lines[MAJORITY]:
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((method.name for method in METHODS), key=lambda name: comparison.accuracy(name).mean)
    for name, line in lines.items():
        table.add_row(name, *line.values(), style="bold" if name == best else "")
    return table


def _line(comparison: Comparison, name: str) -> dict[str, str]:
    """Cells by their headings. One rate for all says nothing, and a terminal of 80 letters has no room for it."""
    runs = comparison.runs.get(name)
    line = {"numbers\nthat learn": f"{runs[0].parameters:,}" if runs else "0"}
    if len(set(comparison.rates.values())) > 1:
        line["rate"] = f"{comparison.rates[name]:g}" if runs else ""
    return line | {"accuracy": _percent(comparison.accuracy(name)), f"less {REFERENCE.name}": _less(comparison, name)}


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _less(comparison: Comparison, name: str) -> str:
    if name == REFERENCE.name:
        return ""
    found = comparison.difference(name, REFERENCE.name)
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def as_numbers(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the table and those of each task, shares of 1, and the verdict."""
    tasks = comparison.tasks
    names = [MAJORITY, *(method.name for method in METHODS)]
    return {
        "verdict": verdict(comparison),
        "tasks": {task: len(labels) for task, labels in tasks.labels.items()},
        "rows": {"train": len(tasks.train), "validation": len(tasks.validation), "test": len(tasks.test)},
        "settings": asdict(comparison.settings),
        "methods": {name: _method(comparison, name) for name in names},
        "notes": list(tasks.notes),
    }


def _method(comparison: Comparison, name: str) -> dict[str, Any]:
    runs = comparison.runs.get(name, [])
    right = zip(comparison.tasks.names, comparison.right(name), strict=True)
    return {
        "parameters": runs[0].parameters if runs else 0,
        "rate": comparison.rates.get(name),
        "steps": [run.steps for run in runs],
        "accuracy": asdict(comparison.accuracy(name)),
        "less_shared": asdict(comparison.difference(name, REFERENCE.name)),
        "by_task": {task: float(values.mean()) for task, values in right},
    }
