"""What `peft-poly inspect` says: tables for a terminal (rich), and the same numbers for a machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..checkpoints.reading import Routing
from ..insight.analysis import (
    Metrics,
    effective_skills,
    layer_metrics,
    mean_metrics,
    nearest_tasks,
    task_similarity,
    task_skill_matrix,
    top_skills,
)

__all__ = ["as_json", "show_routing", "show_task"]

MOST_ROWS = 40  # of a table in the terminal
MOST_COLUMNS = 8
MEANINGS = {
    "discreteness": "binary entropy of the probabilities / log 2: 0 decided, 1 not",
    "sparsity": "share of the probabilities above 0.5",
    "usage": "entropy of the skills' shares / log of their number: 1 all alike",
    "effective": "how many skills a task mixes, exp of the entropy of its weights",
}


def as_json(routing: Routing, source: str, task: Optional[int] = None) -> dict[str, Any]:
    """The numbers of a routing as plain lists and dicts; with `task` also its weights, layer by layer."""
    config, (t, h, k) = routing.config, routing.shape
    numbers: dict[str, Any] = {
        "source": source,
        "peft_type": getattr(getattr(config, "peft_type", None), "value", None),
        "base_model": getattr(config, "base_model_name_or_path", None),
        "r": getattr(config, "r", None),
        "n_tasks": t,
        "n_splits": h,
        "n_skills": k,
        "task_names": list(routing.task_names),
        "mean": asdict(mean_metrics(routing)),
        "layers": {layer: asdict(metrics) for layer, metrics in layer_metrics(routing).items()},
        "task_skill": task_skill_matrix(routing).tolist(),
        "similarity": task_similarity(routing).tolist(),
        "effective_skills": effective_skills(routing).tolist(),
    }
    if task is not None:
        weights = {layer: weights[task].tolist() for layer, weights in routing.weights.items()}
        numbers["task"] = {"id": task, "name": routing.task_names[task], "weights": weights}
    return numbers


def show_routing(routing: Routing, source: str, console: Console) -> None:
    """Print the adapter in one line, its layers' metrics, and its tasks."""
    console.print(_headline(routing, source))
    console.print(_layer_table(routing))
    for name, meaning in MEANINGS.items():
        console.print(f"  [dim]{name}: {meaning}[/dim]")
    console.print()
    console.print(_task_table(routing))


def show_task(routing: Routing, source: str, task: int, console: Console) -> None:
    """Print one task's mixing weights layer by layer (mean over splits), and the tasks most like it."""
    console.print(_headline(routing, source))
    console.print(_one_task_table(routing, task))
    near = ", ".join(f"{escape(name)} ({cosine:.3f})" for name, cosine in nearest_tasks(routing, task, n=5))
    console.print(f"nearest tasks (cosine of the mixing weights): {near or 'none, it is the only one'}")


def _headline(routing: Routing, source: str) -> str:
    config, (t, h, k) = routing.config, routing.shape
    kind = getattr(getattr(config, "peft_type", None), "value", "adapter")
    rank, base = getattr(config, "r", None), getattr(config, "base_model_name_or_path", None)
    parts = [f"{t} task(s)", f"{k} skill(s)", f"{h} split(s)", f"rank {rank}", f"{len(routing.layers)} router(s)"]
    parts += [f"base {escape(base)}"] if base else []
    return f"[bold]{escape(source)}[/bold]: {kind}, {', '.join(parts)}"


def _layer_table(routing: Routing) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("discrete-\nness", "spar-\nsity", "usage", "effec-\ntive"):
        table.add_column(name, justify="right")
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
    table.add_column("top skills (weight)", no_wrap=True)
    table.add_column("effec-\ntive", justify="right")
    table.add_column("nearest task\n(cosine)", overflow="fold")
    effective = effective_skills(routing)
    for task, name in enumerate(routing.task_names[:MOST_ROWS]):
        near = [f"{escape(other)} ({cosine:.3f})" for other, cosine in nearest_tasks(routing, task, n=1)]
        top = ", ".join(f"{skill} ({weight:.2f})" for skill, weight in top_skills(routing, task))
        table.add_row(str(task), escape(name), top, f"{effective[task]:.2f}", *(near or ["-"]))
    _say_more(table, routing.shape[0], column=1)
    return table


def _one_task_table(routing: Routing, task: int) -> Table:
    name, k = routing.task_names[task], routing.shape[2]
    table = Table(box=box.SIMPLE_HEAD, title=f"Mixing weights of {escape(name)} (id {task})", title_justify="left")
    table.add_column("layer", overflow="fold")
    headings = [str(skill) for skill in range(k)] if k <= MOST_COLUMNS else ["top skills (weight)"]
    for heading in headings:
        table.add_column(heading, justify="right" if k <= MOST_COLUMNS else "left", no_wrap=True)
    rows: list[tuple[str, Optional[str]]] = [("mean", None), *((layer, layer) for layer in routing.layers)]
    for label, layer in rows[: MOST_ROWS + 1]:
        weights = task_skill_matrix(routing, layer)[task]
        top = weights.argsort(descending=True, stable=True)[:3].tolist()
        cells = [f"{weight:.2f}" for weight in weights.tolist()]
        if k > MOST_COLUMNS:
            cells = [", ".join(f"{skill} ({cells[skill]})" for skill in top)]
        table.add_row(escape(label), *cells, style="" if layer else "bold", end_section=layer is None)
    _say_more(table, len(routing.layers))
    return table


def _numbers(metrics: Metrics) -> list[str]:
    return [
        f"{metrics.discreteness:.3f}",
        f"{metrics.sparsity:.3f}",
        f"{metrics.usage:.3f}",
        f"{metrics.effective_skills:.2f}",
    ]


def _say_more(table: Table, rows: int, column: int = 0) -> None:
    if rows > MOST_ROWS:
        table.add_row(*[""] * column, f"... and {rows - MOST_ROWS} more: see --json or --html", style="dim")
