"""What becomes of figures: tables on the screen and in Markdown, a CSV that grows."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import Claim
from .figures import Figures

__all__ = ["CLAIMS", "COLUMNS", "about", "append_csv", "claim_rows", "console", "rows_of", "table", "write_table"]

NAMES = ("merged", "lora", "adapters", "upstream poly", "upstream mhr", "poly", "mhr", "gates")
COLUMNS = ("work", "base", *NAMES)
CLAIMS = ("work", "variant", "against", "measured", "at most", "verdict")
SETTINGS = ("mode", "model", "rows", "length", "distinct", "tasks", "r", "skills", "splits", "serving")
ABOUT = ("date", "machine", "load", "torch", "command")
CSV = (*ABOUT, *SETTINGS, "rounds", "base", "unit", *NAMES, "one task", "difference")


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


def rows_of(figures: Sequence[Figures]) -> list[dict[str, str]]:
    """A row for each case: the bare model's milliseconds or megabytes, and each variant's cost over it."""
    return [
        {
            "work": str(one.case), "settings": one.case.sizes, "base": f"{one.base:.1f} {one.unit}",
            **{name: f"{one.over[name]:.3f}" if name in one.over else "" for name in NAMES},
        }
        for one in figures
        if one.over
    ]  # fmt: skip


def claim_rows(claims: Sequence[Claim]) -> list[dict[str, str]]:
    return [
        dict(zip(CLAIMS, (
            claim.what, claim.variant, claim.against, "" if claim.measured is None else f"{claim.measured:.3f}",
            f"{claim.most:.2f}", claim.verdict,
        ), strict=True))
        for claim in claims
    ]  # fmt: skip


def console() -> Console:
    """Wide enough for the tables where the output goes to a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    """For the screen; a miss is red, a hit green."""
    shown = Table(title=title)
    for name in columns:
        shown.add_column(name, justify="left" if name in ("work", *CLAIMS) else "right", no_wrap=True)
    for row in rows:
        verdict = row.get("verdict", "")
        colour = "red" if verdict.startswith("miss") else "green" if verdict == "hit" else None
        shown.add_row(*[row[name] for name in columns], style=colour)
    return shown


def append_csv(path: Path, figures: Sequence[Figures], about: dict[str, str]) -> None:
    """Add a row for each case to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV, lineterminator="\n")
        if new:
            writer.writeheader()
        for one in (one for one in figures if one.over):
            settings: dict[str, Any] = {name: getattr(one.case, name) for name in SETTINGS}
            over = {"one task" if name.endswith("one task") else name: f"{x:.4f}" for name, x in one.over.items()}
            over.pop("base")
            measured = {"rounds": one.rounds, "base": f"{one.base:.3f}", "unit": one.unit}
            writer.writerow({**about, **settings, **measured, **over, "load": one.load, "difference": one.difference})


def write_table(
    path: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    about: dict[str, str],
    columns: Sequence[str],
    loads: Sequence[float] = (),
) -> None:
    """Replace what lies between `<!-- name -->` and `<!-- /name -->` in a Markdown file.

    Raises:
        ValueError: there is no such place in it.
    """
    columns = [column for column in columns if any(str(row[column]) for row in rows)] or list(columns)
    cells = [[str(row[column]) for column in columns] for row in rows]
    lines = [" | ".join(["", *line, ""]).strip() for line in (columns, ["---"] * len(columns), *cells)]
    load = f", load {min(loads)} to {max(loads)}" if loads else ""
    note = f"`{about['command']}`, {about['date']}, {about['machine']}{load}, torch {about['torch']}, one thread."
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"(<!-- {name} -->).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"{path} has no place for the table: a line <!-- {name} --> and a line <!-- /{name} -->.")
    block = "\n".join([note, "", *lines])
    path.write_text(pattern.sub(lambda match: f"{match[1]}\n{block}\n{match[2]}", text), encoding="utf-8")
