"""How the commands speak: results on stdout; progress and notes on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["console", "note", "print_json", "quiet_libraries", "working"]


def console(**kwargs: Any) -> Console:
    """A console that colours nothing by itself."""
    return Console(highlight=False, **kwargs)


def print_json(result: Any) -> None:
    """Print a result for a machine."""
    print(json.dumps(result, ensure_ascii=False))


def note(text: str) -> None:
    """Say something that is no result."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A bar that says that something goes on, if somebody looks."""
    stderr = console(stderr=True)
    if not stderr.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def quiet_libraries() -> None:
    """Keep transformers and the Hub client to errors, and to progress bars where somebody looks."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
