"""What becomes of the figures: a line each, a table against the bars, a CSV that grows, a plot, a Markdown table."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .cases import BARS, DIFFERENCE, Row

__all__ = ["about", "append_csv", "line", "plot", "table", "verdict", "write_table"]

RATIOS = ("lora/base", "poly/lora", "ours/base", "ours/lora", "ours/poly")
SETTINGS = ("mode", "model", "rows", "length", "ids", "r", "skills", "splits", "tasks")
COLUMNS = ("date", "machine", "load", "torch", "command", *SETTINGS, "rounds", "base", "unit", *RATIOS, "difference")


def about(command: str) -> dict[str, str]:
    """When, on what and how the figures were taken."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "torch": torch.__version__,
        "command": command,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(encoding="utf-8"), re.M))
        return f"{fields.get('model name')} family {fields.get('cpu family')} model {fields.get('model')}"
    return platform.processor() or platform.machine()


def what(row: Row) -> str:
    size = f"{row['rows']} x {row['length']}"
    return f"{row['mode']}, {row['model']}, {size}, {row['ids']}"


def settings(row: Row) -> str:
    return f"r {row['r']}, {row['skills']} skills, {row['splits']} splits, {row['tasks']} tasks"


def verdict(row: Row) -> str:
    """`pass`, or by how much which bar is missed; empty where the case has none."""
    bars = BARS.get(row["mode"], {})
    missed = [f"{name} {row[name]:.3f} > {bar:.2f}" for name, bar in bars.items() if row.get(name, 0) > bar]
    if row.get("difference", 0) > DIFFERENCE:
        missed.append(f"outputs differ by {row['difference']:.1e}")
    return "miss: " + ", ".join(missed) if missed else "pass" if bars else ""


def line(row: Row) -> str:
    figures = ", ".join(f"{name} {row[name]:.3f}" for name in RATIOS if name in row)
    return f"{what(row)}, {settings(row)}: {figures} (load {row['load']})"


def table(rows: list[Row], about: dict[str, str]) -> Table:
    shown = Table(title=f"{about['command']}, {about['date']}, {about['machine']}, torch {about['torch']}, one thread")
    for name in ("case", "settings", "base", *RATIOS, "difference", "bar"):
        shown.add_column(name, justify="left" if name in ("case", "settings", "bar") else "right")
    for row in rows:
        word = verdict(row)
        shown.add_row(*_cells(row)[:-1], f"[red]{word}" if word.startswith("miss") else f"[green]{word}")
    return shown


def _cells(row: Row) -> list[str]:
    ratios = [f"{row[name]:.3f}" if name in row else "" for name in RATIOS]
    difference = f"{row['difference']:.0e}" if "difference" in row else ""
    return [what(row), settings(row), f"{row['base']:.1f} {row['unit']}", *ratios, difference, verdict(row)]


def append_csv(path: Path, rows: list[Row], about: dict[str, str]) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**about, **row} for row in rows)


def plot(path: Path, rows: list[Row]) -> None:
    """Bars of what LoRA, PEFT's own Poly and this package cost over the bare model; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if "lora/base" in row and "poly/lora" in row]
    if not timed:
        return
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.45 * len(timed)), layout="constrained")
    series: list[tuple[str, str, Any]] = [
        ("LoRA", "#9ca3af", lambda row: row["lora/base"]),
        ("PEFT's Poly", "#b45309", lambda row: row["poly/lora"] * row["lora/base"]),
        ("peft-poly", "#1d4ed8", lambda row: row["ours/base"]),
    ]
    for i, (label, colour, value) in enumerate(series):
        places = [y + (i - 1) * 0.26 for y in range(len(timed))]
        axes.barh(places, [value(row) - 1 for row in timed], height=0.24, color=colour, label=label)
    axes.set_yticks(range(len(timed)), [what(row) for row in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("CPU time over that of the bare model")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_table(
    path: Path, name: str, rows: list[Row], about: dict[str, str], columns: list[str] | None = None
) -> None:
    """Replace what lies between `<!-- name -->` and `<!-- /name -->` in a Markdown file."""
    head = list(columns or ["case", "settings", "base", *RATIOS, "difference", "bar"])
    cells = [[str(row[column]) for column in columns] if columns else _cells(row) for row in rows]
    common = ""
    if not columns and len({line[1] for line in cells}) == 1:  # said once, above the table
        common = f" All with {cells[0][1]}."
        head, cells = [head[0], *head[2:]], [[line[0], *line[2:]] for line in cells]
    lines = [" | ".join(["", *line, ""]).strip() for line in (head, ["---"] * len(head), *cells)]
    loads = [row["load"] for row in rows if "load" in row]
    load = f", load {min(loads)} to {max(loads)}" if loads else ""
    note = f"`{about['command']}`, {about['date']}, {about['machine']}{load}, torch {about['torch']}, one thread."
    note += common
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"(<!-- {name} -->).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"{path} has no place for the table: a line <!-- {name} --> and a line <!-- /{name} -->.")
    block = "\n".join([note, "", *lines])
    path.write_text(pattern.sub(lambda match: f"{match[1]}\n{block}\n{match[2]}", text), encoding="utf-8")
