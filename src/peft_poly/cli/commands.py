"""The work of each command of `peft-poly`; the grammar, which starts without this package, is `peft_poly_cli`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from peft.config import PeftConfig

from ..checkpoints.conversion import convert_checkpoint
from ..checkpoints.reading import read_routing
from ..checkpoints.staging import check_target, staged
from ..compare.comparison import Settings
from ..compare.learning.encoder import default_encoder
from ..compare.plots import save_plot
from ..compare.runs import compare_methods
from ..compare.table import as_numbers, comparison_table
from ..compare.verdict import verdict
from ..config import PolyConfig
from ..insight.plots import figure_class, save_plots
from ..insight.report import write_report
from . import tables
from .bases import (
    base_model_name,
    holds_base_weights,
    hollow_base_model,
    load_base_model,
    save_tokenizer,
    with_adapter,
)
from .terminal import console, note, print_json, quiet_libraries, working

__all__ = ["compare", "convert", "export", "inspect", "merge"]


def inspect(
    source: str, task: Optional[str], *, plot: Optional[Path], html: Optional[Path], as_json: bool, force: bool
) -> None:
    """Show what the router of a saved adapter has learned."""
    for path in (plot, html):
        _check_free(path, force)
    routing = read_routing(source)
    task_id = None if task is None else routing.task_id(task)
    if plot is not None:
        with working("Drawing"):
            save_plots(routing, plot, task_id)
        note(f"wrote {plot}")
    if html is not None:
        with working("Writing the report"):
            write_report(routing, html, title=f"Routing of {source}", task=task_id)
        note(f"wrote {html}")
    if as_json:
        print_json(tables.as_json(routing, source, task_id))
    elif task_id is None:
        tables.show_routing(routing, source, console())
    else:
        tables.show_task(routing, source, task_id, console())


def export(source: str, output: Path, *, base: Optional[str], task: Optional[str], force: bool, as_json: bool) -> None:
    """Write one task as a plain LoRA, or every task."""
    config, task_id = _adapter_and_task(source, task)
    name = base_model_name(config, base)
    check_target(output, force)
    quiet_libraries()
    model = with_adapter(hollow_base_model(source, config, name), source, low_cpu_mem_usage=True)
    embeddings = holds_base_weights(model, source)
    if embeddings:  # of the two ends the file may have one, and a hollow model has neither
        model = with_adapter(load_base_model(source, config, name), source)
    printed = io.StringIO()
    with working("Exporting"), contextlib.redirect_stdout(printed):
        written = model.export_lora(task_id, output, overwrite=force, save_embedding_layers=embeddings)
    folders = written if isinstance(written, dict) else {_names(config)[task_id or 0]: written}
    command = printed.getvalue().strip() or None
    if as_json:
        print_json({"folders": {key: str(folder) for key, folder in folders.items()}, "serve": command})
        return
    for folder in folders.values():
        print(folder)
    if command:
        print(f"\n{command}")


def merge(source: str, task: str, output: Path, *, base: Optional[str], safe: bool, force: bool, as_json: bool) -> None:
    """Write the base model with one task merged into its weights."""
    config, task_id = _adapter_and_task(source, task)
    name = base_model_name(config, base)
    with staged(output, force) as folder:
        quiet_libraries()
        model = with_adapter(load_base_model(source, config, name), source)
        merged = model.merge_and_unload(progressbar=sys.stderr.isatty(), safe_merge=safe, task=task_id)
        with working("Saving"):
            merged.save_pretrained(folder)
            has_tokenizer = save_tokenizer(name, folder)
    if as_json:
        print_json({"folder": str(output), "task": _names(config)[task_id or 0], "tokenizer": has_tokenizer})
    else:
        print(output)


def convert(
    source: str, target: Path, to: Any, *, settings: Optional[Sequence[str]], force: bool, as_json: bool
) -> None:
    """Write a checkpoint as one of another type."""
    given = dict(_setting(text) for text in settings or ())
    if not Path(source).is_file():
        read_routing(source)  # says what is wrong with the source
    with working("Converting"):
        written = convert_checkpoint(source, target, to=to, overwrite=force, **given)
    if as_json:
        print_json({"folder": str(written), "peft_type": to})
    else:
        print(written)


def compare(
    data: Path,
    base: Optional[str],
    output: Path,
    settings: dict[str, Any],
    *,
    plot: Optional[Path],
    as_json: bool,
    force: bool,
) -> None:
    """Train the rivals on a folder of tasks, and say whether routing pays there."""
    _check_free(plot, force)
    if plot is not None:
        figure_class(plot)  # said before hours of training
    quiet_libraries()
    found = compare_methods(data, base or default_encoder(), output, Settings(**settings), note)
    if plot is not None:
        save_plot(found, plot)
        note(f"wrote {plot}")
    if as_json:
        print_json(as_numbers(found))
    else:
        console().print(comparison_table(found))
        print(verdict(found))


# ------------------------------------------------------------------------------------------------------------- input
def _adapter_and_task(source: str, task: Optional[str]) -> tuple[PolyConfig, Optional[int]]:
    """The adapter's config and the task's id, checked before anything big is loaded."""
    routing = read_routing(source)
    config = routing.config
    if not isinstance(config, PolyConfig):
        raise ValueError(
            f"{source} is an adapter of PEFT's own POLY. First run: peft-poly convert {source} TARGET --to PEFT_POLY"
        )
    return config, None if task is None else routing.task_id(task)


def _names(config: PeftConfig) -> list[str]:
    return getattr(config, "task_names", None) or [str(task) for task in range(getattr(config, "n_tasks", 1))]


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _check_free(path: Optional[Path], force: bool) -> None:
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file was to be written there. Name a file.")
    if path is not None and path.exists() and not force:
        raise FileExistsError(f"{path} exists. Pass --force to replace it, or choose another name.")
