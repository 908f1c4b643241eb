"""What `peft-poly inspect` says: tables for a terminal (rich), and the same numbers for a machine."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Optional, Union

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..checkpoints.reading import Routing
from ..insight.analysis import (
    GateMetrics,
    Metrics,
    effective_skills,
    layer_metrics,
    mean_metrics,
    nearest_tasks,
    nothing_routed,
    sizes,
    task_similarity,
    task_skill_matrix,
    top_columns,
    top_skills,
)

__all__ = ["as_json", "show_routing", "show_task"]

MOST_ROWS = 40  # of a table in the terminal
MOST_COLUMNS = 8


def as_json(routing: Routing, source: str, task: Optional[int] = None) -> dict[str, Any]:
    """The numbers of a routing as plain lists and dicts; with `task` also its weights, layer by layer."""
    config, unit = routing.config, routing.kind.unit
    counted = {f"n_{name}": size for name, size in sizes(routing).items() if name != "rank"}
    numbers: dict[str, Any] = {
        "source": source,
        "peft_type": getattr(getattr(config, "peft_type", None), "value", None),
        "base_model": getattr(config, "base_model_name_or_path", None),
        "poly_type": routing.kind.name,
        "r": getattr(config, "r", None),
        **counted,
        "task_names": list(routing.task_names),
        "mean": asdict(mean_metrics(routing)),
        "layers": {layer: asdict(metrics) for layer, metrics in layer_metrics(routing).items()},
        f"task_{unit}": task_skill_matrix(routing).tolist(),
        "similarity": task_similarity(routing).tolist(),
        f"effective_{unit}s": effective_skills(routing).tolist(),
    }
    if task is not None:
        weights = {layer: weights[task].tolist() for layer, weights in routing.weights.items()}
        numbers["task"] = {"id": task, "name": routing.task_names[task], "weights": weights}
    return numbers


def show_routing(routing: Routing, source: str, console: Console) -> None:
    """Print the adapter in one line, its layers' metrics, and its tasks; of one skill the tasks' names alone."""
    console.print(_headline(routing, source))
    if reason := nothing_routed(routing):
        more = f", and {len(routing.task_names) - MOST_ROWS} more" if len(routing.task_names) > MOST_ROWS else ""
        console.print(f"{reason}\nTasks: {escape(', '.join(routing.task_names[:MOST_ROWS]))}{more}")
        return
    console.print(_layer_table(routing))
    for field in fields(mean_metrics(routing)):
        console.print(f"  [dim]{field.name.partition('_')[0]}: {field.metadata['meaning']}[/dim]")
    console.print()
    console.print(_task_table(routing))


def show_task(routing: Routing, source: str, task: int, console: Console) -> None:
    """Print one task's mixing weights (gates) layer by layer (mean over splits), and the tasks most like it."""
    console.print(_headline(routing, source))
    if reason := nothing_routed(routing):
        console.print(reason)
        return
    console.print(_one_task_table(routing, task))
    near = ", ".join(f"{escape(name)} ({cosine:.3f})" for name, cosine in nearest_tasks(routing, task, n=5))
    console.print(f"nearest tasks (cosine of the {routing.kind.weights}): {near or 'none, it is the only one'}")


def _headline(routing: Routing, source: str) -> str:
    config, base = routing.config, getattr(routing.config, "base_model_name_or_path", None)
    peft_type = getattr(getattr(config, "peft_type", None), "value", "adapter")
    counted = {**sizes(routing), "routers": len(routing.layers)}
    parts = [f"{name} {size}" if name == "rank" else f"{size} {name[:-1]}(s)" for name, size in counted.items()]
    parts += [f"base {escape(base)}"] if base else []
    return f"[bold]{escape(source)}[/bold]: {peft_type}, {', '.join(parts)}"


def _layer_table(routing: Routing) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for field in fields(mean_metrics(routing)):
        table.add_column(field.metadata["heading"], justify="right")
    table.add_row(f"mean of {len(routing.layers)}", *_numbers(mean_metrics(routing)), style="bold", end_section=True)
    metrics = layer_metrics(routing)
    for layer in routing.layers[:MOST_ROWS]:
        table.add_row(escape(layer), *_numbers(metrics[layer]))
    _say_more(table, len(routing.layers))
    return table


def _task_table(routing: Routing) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Tasks", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("task", overflow="fold")
    table.add_column(_top_heading(routing), no_wrap=True)
    table.add_column("effec-\ntive", justify="right")
    table.add_column("nearest task\n(cosine)", overflow="fold")
    effective = effective_skills(routing)
    for task, name in enumerate(routing.task_names[:MOST_ROWS]):
        near = [f"{escape(other)} ({cosine:.3f})" for other, cosine in nearest_tasks(routing, task, n=1)]
        table.add_row(
            str(task), escape(name), _top(top_skills(routing, task)), f"{effective[task]:.2f}", *(near or ["-"])
        )
    _say_more(table, routing.shape[0], column=1)
    return table


def _one_task_table(routing: Routing, task: int) -> Table:
    name, k = routing.task_names[task], routing.shape[2]
    title = f"{routing.kind.weights.capitalize()} of {escape(name)} (id {task})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    headings = [str(column) for column in range(k)] if k <= MOST_COLUMNS else [_top_heading(routing)]
    for heading in headings:
        table.add_column(heading, justify="right" if k <= MOST_COLUMNS else "left", no_wrap=True)
    rows: list[tuple[str, Optional[str]]] = [("mean", None), *((layer, layer) for layer in routing.layers)]
    for label, layer in rows[: MOST_ROWS + 1]:
        weights = task_skill_matrix(routing, layer)[task]
        cells = [f"{weight:.2f}" for weight in weights.tolist()]
        if k > MOST_COLUMNS:
            cells = [_top(top_columns(routing, weights))]
        table.add_row(escape(label), *cells, style="" if layer else "bold", end_section=layer is None)
    _say_more(table, len(routing.layers))
    return table


def _top_heading(routing: Routing) -> str:
    return f"top {routing.kind.unit}s ({routing.kind.weight})"


def _top(columns: list[tuple[int, float]]) -> str:
    return ", ".join(f"{column} ({weight:.2f})" for column, weight in columns)


def _numbers(metrics: Union[Metrics, GateMetrics]) -> list[str]:
    return [f"{getattr(metrics, field.name):.{field.metadata['digits']}f}" for field in fields(metrics)]


def _say_more(table: Table, rows: int, column: int = 0) -> None:
    if rows > MOST_ROWS:
        table.add_row(*[""] * column, f"... and {rows - MOST_ROWS} more: see --json or --html", style="dim")
