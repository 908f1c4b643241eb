"""Progress of many runs: a bar where somebody looks, else a line for each run."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Optional

from rich import progress as bars
from rich.console import Console

__all__ = ["Progress"]


class Progress:
    """A context manager, on stderr.

    Args:
        steps: of all runs together.
    """

    def __init__(self, steps: int) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn())
        times = (bars.TimeElapsedColumn(), bars.TextColumn("left:"), bars.TimeRemainingColumn())
        shown = self.console.is_terminal and steps > 0
        self.bar = bars.Progress(*columns, *times, console=self.console, transient=True, disable=not shown)
        self.task = self.bar.add_task("", total=steps)
        self.shown = shown

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.bar.stop()

    def begin(self, what: str) -> None:
        """A run begins."""
        self.bar.update(self.task, description=what)
        if not self.shown:
            print(f"{self.bar.tasks[0].percentage:3.0f} %: {what}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """A step is done."""
        self.bar.advance(self.task)
