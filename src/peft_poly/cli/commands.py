"""`peft-poly`: look at a saved adapter, and turn it into what other programs read.

The commands import what they need when they run. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from .terminal import NAME, console, fail, note, print_json, quiet_libraries, show_warning, working

if TYPE_CHECKING:
    from peft.config import PeftConfig

__all__ = ["app", "main"]

UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer versions of typer bring themselves
BAD_INPUT = (ImportError, OSError, RuntimeError, TypeError, ValueError)

app = typer.Typer(
    name=NAME,
    help=(
        "Task-routed adapters (Polytropon, Multi-Head Routing) from the command line: look at their routing, export "
        "or merge one task, convert checkpoints."
    ),
    epilog="Exit code 0: done. 2: bad input, told in one line on stderr. 130: interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Kind(str, Enum):
    """Types of checkpoint that can be written."""

    PEFT_POLY = "PEFT_POLY"
    POLY = "POLY"


Adapter = Annotated[
    str, typer.Argument(metavar="FOLDER_OR_HUB_ID", help="The adapter: its folder, or its repository on the Hub.")
]
Base = Annotated[
    Optional[str],
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The base model: Hub id or folder. Default: the one that the adapter's config names.",
    ),
]
OneTask = Annotated[Optional[str], typer.Option("--task", metavar="TASK", help="Name or id of one task.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", "-f", metavar="", help="Replace what is already there.")]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the result as JSON on stdout, and nothing else there.")
]


def main(args: Optional[Sequence[str]] = None) -> NoReturn:
    """Run the command line, and exit with its code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their callers
            code = app(args=args, prog_name=NAME, standalone_mode=False)
    except UsageError as error:
        fail(f"{error.format_message().rstrip('.?')}. See '{error.ctx.command_path if error.ctx else NAME} --help'.")
    except BAD_INPUT as error:
        fail(str(error) or type(error).__name__)
    except typer.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", metavar="", help="Print the version, and exit.")] = False,
) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def inspect(
    source: Adapter,
    task: OneTask = None,
    plot: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Draw heat map and tree of tasks (.png, .svg, .pdf), or --task's layers."),
    ] = None,
    html: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Write a report: one HTML file that needs nothing else.")
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Show what the router has learned: how decided it is, which task uses which skills, which tasks are alike.

    Reads the saved adapter only, no base model. Works for PEFT_POLY and for PEFT's own POLY.

    [dim]peft-poly inspect ./adapter[/dim]
    [dim]peft-poly inspect ./adapter --task rte --plot rte.png[/dim]
    [dim]peft-poly inspect someone/adapter --html report.html --json > routing.json[/dim]
    """
    for path in (plot, html):
        _check_free(path, force)
    from ..checkpoints.reading import read_routing

    routing = read_routing(source)
    task_id = None if task is None else routing.task_id(task)
    if plot is not None:
        from ..insight.plots import save_plots

        with working("Drawing"):
            save_plots(routing, plot, task_id)
        note(f"wrote {plot}")
    if html is not None:
        from ..insight.report import write_report

        with working("Writing the report"):
            write_report(routing, html, title=f"Routing of {source}", task=task_id)
        note(f"wrote {html}")
    from . import tables

    if as_json:
        print_json(tables.as_json(routing, source, task_id))
    elif task_id is None:
        tables.show_routing(routing, source, console())
    else:
        tables.show_task(routing, source, task_id, console())


@app.command()
def export(
    source: Adapter,
    output: Output,
    base: Base = None,
    task: OneTask = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one task as a plain LoRA that PEFT and servers load without peft-poly; without --task every task.

    The outputs equal those of the task. Every task: a subfolder each, and the line with which vLLM serves them all.
    Of the base model only the config is read, not the weights.

    [dim]peft-poly export ./adapter --task rte --output ./rte-lora[/dim]
    [dim]peft-poly export ./adapter --base google/flan-t5-large --output ./loras[/dim]
    """
    config, task_id = _adapter_and_task(source, task)
    from ..checkpoints.staging import check_target
    from .bases import base_model_name, hollow_base_model

    name = base_model_name(config, base)
    check_target(output, force)
    from peft import PeftModel

    quiet_libraries()
    model = PeftModel.from_pretrained(hollow_base_model(source, config, name), source, low_cpu_mem_usage=True)
    printed = io.StringIO()
    with working("Exporting"), contextlib.redirect_stdout(printed):
        written = model.export_lora(task_id, output, overwrite=force)
    folders = written if isinstance(written, dict) else {_names(config)[task_id or 0]: written}
    command = printed.getvalue().strip() or None
    if as_json:
        print_json({"folders": {key: str(folder) for key, folder in folders.items()}, "serve": command})
        return
    for folder in folders.values():
        typer.echo(folder)
    if command:
        typer.echo(f"\n{command}")


@app.command()
def merge(
    source: Adapter,
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="Name or id of the task.")],
    output: Output,
    base: Base = None,
    safe: Annotated[
        bool, typer.Option("--safe", metavar="", help="Stop if a merged weight would be NaN or infinite.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the base model with one task merged into its weights: a plain model, at the base model's speed.

    Its tokenizer is written too, if it has one.

    [dim]peft-poly merge ./adapter --base google/flan-t5-large --task rte --output ./flan-t5-rte[/dim]
    """
    config, task_id = _adapter_and_task(source, task)
    from ..checkpoints.staging import staged
    from .bases import base_model_name, load_base_model, save_tokenizer

    name = base_model_name(config, base)
    with staged(output, force) as folder:
        from peft import PeftModel

        quiet_libraries()
        model = PeftModel.from_pretrained(load_base_model(source, config, name), source)
        merged = model.merge_and_unload(progressbar=sys.stderr.isatty(), safe_merge=safe, task=task_id)
        with working("Saving"):
            merged.save_pretrained(folder)
            has_tokenizer = save_tokenizer(name, folder)
    if as_json:
        print_json({"folder": str(output), "task": _names(config)[task_id or 0], "tokenizer": has_tokenizer})
    else:
        typer.echo(output)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder or Hub id of an adapter, or a Lightning file of the MHR paper."),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write.")],
    to: Annotated[Kind, typer.Option(help="The type to write: PEFT's own POLY, or PEFT_POLY.")],
    settings: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="NAME=VALUE", help="A config setting to write; VALUE is JSON or text. Repeat."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as one of another type; the tensors stay bit-equal.

    What POLY cannot say (lora_alpha, dropout, ...) is refused with the reason.

    [dim]peft-poly convert ./peft-poly-adapter ./out --to PEFT_POLY --set 'task_names=["rte", "sst2"]'[/dim]
    [dim]peft-poly convert ./adapter ./for-peft --to POLY[/dim]
    """
    given = dict(_setting(text) for text in settings or ())
    from ..checkpoints.conversion import convert_checkpoint
    from ..checkpoints.reading import read_routing

    if not Path(source).is_file():
        read_routing(source)  # says what is wrong with the source
    with working("Converting"):
        written = convert_checkpoint(source, target, to=to.value, overwrite=force, **given)
    if as_json:
        print_json({"folder": str(written), "peft_type": to.value})
    else:
        typer.echo(written)


# ------------------------------------------------------------------------------------------------------------- input
def _adapter_and_task(source: str, task: Optional[str]) -> tuple[PeftConfig, Optional[int]]:
    """The adapter's config and the task's id, checked before anything big is loaded."""
    from ..checkpoints.reading import read_routing
    from ..config import PolyConfig

    routing = read_routing(source)
    config = routing.config
    if not isinstance(config, PolyConfig):
        raise ValueError(
            f"{source} is an adapter of PEFT's own POLY. First run: {NAME} convert {source} TARGET --to PEFT_POLY"
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
