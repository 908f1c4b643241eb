"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["printed"]


def printed(title: str, rows: list[dict[str, Any]], left_out: Container[str]) -> Table:
    """A table without the columns that only the documentation has room for."""
    columns = [column for column in rows[0] if column not in left_out]
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[column]).replace("**", "") for column in columns))
    return table
