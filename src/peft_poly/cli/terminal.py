"""How `peft-poly` speaks: results on stdout; progress, notes and one line of error on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["NAME", "console", "fail", "note", "print_json", "quiet_libraries", "show_warning", "working"]

NAME = "peft-poly"


def console(**kwargs: Any) -> Console:
    """A console that colours nothing by itself."""
    return Console(highlight=False, **kwargs)


def print_json(result: Any) -> None:
    """Print a result for a machine."""
    print(json.dumps(result, ensure_ascii=False))


def note(text: str) -> None:
    """Say something that is no result."""
    print(text, file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong with the input, and exit with code 2."""
    note(f"{NAME}: error: {_one_line(message)}")
    sys.exit(2)


def show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Stands in for `warnings.showwarning`: one line, without the place in the code."""
    note(f"{NAME}: warning: {_one_line(str(message))}")


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


def _one_line(text: str) -> str:
    return " ".join(text.split())
