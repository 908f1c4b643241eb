"""The grammar of `peft-poly`: look at a saved adapter, turn it into what other programs read, ask whether routing pays.

Beside the package, for `import peft_poly` brings torch, PEFT and transformers: help, a mistyped command and shell
completion need none of them. A command imports the package, and its work from `peft_poly.cli`, when it runs. Bad input
ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["app", "main"]

NAME = "peft-poly"
UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which newer versions of typer bring themselves
BAD_INPUT = (ImportError, OSError, RuntimeError, TypeError, ValueError)
ELSEWHERE = {"plot": "inspect --plot", "report": "inspect --html"}  # what is no command, and looks like another


class PlainFlags:
    """Help that gives a flag no value: newer versions of typer write `<bool>` behind it."""

    def get_params(self, context: Any) -> list[Any]:
        """The arguments and options, and the one for help."""
        params: list[Any] = super().get_params(context)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(PlainFlags, TyperCommand):
    """One of the commands."""


class Commands(PlainFlags, TyperGroup):
    """All of them."""

    def resolve_command(self, context: Any, args: list[str]) -> Any:
        """The command that is asked for."""
        if args and args[0] in ELSEWHERE:
            raise UsageError(f"No such command {args[0]!r}. Did you mean {ELSEWHERE[args[0]]!r}?", context)
        return super().resolve_command(context, args)


app = typer.Typer(
    name=NAME,
    cls=Commands,
    help=(
        "Task-routed adapters (Polytropon, Multi-Head Routing) from the command line: look at their routing, export "
        "or merge one task, convert checkpoints, ask whether routing pays on your tasks."
    ),
    epilog="Exit code 0: done. 2: bad input, told in one line on stderr. 130: interrupted.",
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
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is already there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def main(args: Optional[Sequence[str]] = None) -> NoReturn:
    """Run the command line, and exit with its code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their callers
            code = app(args=args, prog_name=NAME, standalone_mode=False)
    except UsageError as error:
        said = error.format_message().replace("Value error, ", "")  # which pydantic writes before a reason
        help_at = error.ctx.command_path if error.ctx else NAME
        fail(f"{said if said.endswith(('.', '?')) else said + '.'} See '{help_at} --help'.")
    except BAD_INPUT as error:
        fail(str(error) or type(error).__name__)
    except typer.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong with the input, and exit with code 2."""
    print(f"{NAME}: error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Stands in for `warnings.showwarning`: one line, without the place in the code."""
    print(f"{NAME}: warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
) -> None:
    if version:
        from peft_poly import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(cls=Command)
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
    from peft_poly.cli import commands

    commands.inspect(source, task, plot=plot, html=html, as_json=as_json, force=force)


@app.command(cls=Command)
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
    from peft_poly.cli import commands

    commands.export(source, output, base=base, task=task, force=force, as_json=as_json)


@app.command(cls=Command)
def merge(
    source: Adapter,
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="Name or id of the task.")],
    output: Output,
    base: Base = None,
    safe: Annotated[bool, typer.Option("--safe", help="Stop if a merged weight would be NaN or infinite.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the base model with one task merged into its weights: a plain model, at the base model's speed.

    Its tokenizer is written too, if it has one.

    [dim]peft-poly merge ./adapter --base google/flan-t5-large --task rte --output ./flan-t5-rte[/dim]
    """
    from peft_poly.cli import commands

    commands.merge(source, task, output, base=base, safe=safe, force=force, as_json=as_json)


@app.command(cls=Command)
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
    from peft_poly.cli import commands

    commands.convert(source, target, to.value, settings=settings, force=force, as_json=as_json)


@app.command(cls=Command)
def compare(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of *.jsonl files; rows have task, input, output, split.")
    ],
    base: Annotated[
        Optional[str],
        typer.Option("--base", metavar="MODEL", help="A text encoder: Hub id or folder. Default: all-MiniLM-L6-v2."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where runs are kept: a stopped comparison goes on."),
    ] = Path("comparison"),
    epochs: Annotated[float, typer.Option(metavar="NUMBER", help="Passes over the training rows.")] = 8,
    batch_size: Annotated[int, typer.Option(metavar="ROWS", help="Rows of a step, of all tasks together.")] = 32,
    rates: Annotated[
        Optional[list[float]],
        typer.Option("--rate", metavar="NUMBER", help="A learning rate to try. Repeat. Default: 0.001 and 0.003."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="NUMBER", help="Runs of each method.")] = 3,
    max_length: Annotated[int, typer.Option(metavar="TOKENS", help="Longest text; the rest is cut off.")] = 128,
    blocks: Annotated[
        int, typer.Option(metavar="NUMBER", help="Adapt the last blocks of the encoder only, which is quicker; 0: all.")
    ] = 0,
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Draw the table (.png, .svg, .pdf).")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Does routing pay on your tasks? Train one encoder in each way on the same rows, and say which does best.

    A shared LoRA, one that is told the task, one with a head per task, a LoRA per task, gates and Poly: a table with
    intervals, and a verdict. It says first how long it will take; stop it, run it again, and it goes on.

    [dim]peft-poly compare ./my-tasks[/dim]
    [dim]peft-poly compare ./my-tasks --base ./my-encoder --seeds 1 --plot table.png[/dim]
    """
    from peft_poly.cli import commands

    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "seeds": seeds}
    settings |= {"max_length": max_length, "blocks": blocks, **({"rates": tuple(rates)} if rates else {})}
    commands.compare(data, base, output, settings, plot=plot, as_json=as_json, force=force)
