"""One HTML file that shows what a router has learned: no script, nothing fetched, readable on a phone and in print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

import torch

from ..checkpoints.reading import Routing
from ..checkpoints.staging import staged_file
from .analysis import (
    effective_skills,
    farthest,
    layer_metrics,
    mean_metrics,
    nothing_routed,
    sizes,
    span,
    task_linkage,
    task_similarity,
    task_skill_matrix,
    top_columns,
)

__all__ = ["render_report", "write_report"]

MOST_TASKS = 400  # rows of a report; a tree of more can be neither drawn nor read
ROW = 26  # pixels that a task's row is high

STYLE = """
:root { color-scheme: light dark; --ink: #1b2433; --soft: #5c6b80; --line: #d8dee8; --paper: #fff;
  --accent: 30,70,140; --below: 165,45,35; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf1; --soft: #9aa7ba; --line: #36404f; --paper: #141a23; --accent: 122,162,224;
    --below: 226,132,116; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 1rem 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--paper); font-weight: 600; }
th:first-child, .text { text-align: left; }
thead th:first-child { left: 0; z-index: 3; }
tbody th { font-weight: 400; position: sticky; left: 0; z-index: 1; background: var(--paper);
  min-width: min(12rem, 36vw); max-width: 28rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr.mean > * { font-weight: 600; border-bottom: 2px solid var(--line); }
.heat td, .heat th:not(:first-child) { text-align: center; min-width: 2.7rem; padding: .2rem .3rem; }
.heat td { background: rgba(var(--accent), var(--w)); }
.heat td.below { background: rgba(var(--below), var(--w)); }
.heat td.dark { color: #fff; }
@media (prefers-color-scheme: dark) { .heat td.dark { color: #10151d; } }
.tree { display: grid; grid-template-columns: fit-content(45%) minmax(8rem, 1fr); column-gap: .6rem; }
.tree ol { list-style: none; margin: 0; padding: 0; text-align: right; min-width: 0; }
.tree li { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: .87rem; }
.tree svg { width: 100%; display: block; fill: none; stroke: rgb(var(--accent)); stroke-width: 1.6; }
.tree .axis { grid-column: 2; display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem;
  border-top: 1px solid var(--line); }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

TEMPLATE = """\
{%- macro heat(rows, columns, corner) %}
<div class="scroll"><table class="heat">
<thead><tr><th>{{ corner }}</th>{% for column in range(columns) %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in rows %}
<tr><th scope="row">{{ name | breakable }}</th>{% for value, shade in cells -%}
<td style="--w:{{ '%.2f' % (shade | abs) }}"{% if shade < 0 or shade > 0.7 %} class="{{ 'below ' if shade < 0 }}\
{{ 'dark' if shade | abs > 0.7 }}"{% endif %}>{{ '%.2f' % value }}</td>
{%- endfor %}</tr>{% endfor %}
</tbody></table></div>
{%- endmacro %}
{%- macro numbers(metrics) %}{% for m in measured %}<td>{{ '%.*f' % (m.metadata.digits, metrics[m.name]) }}</td>\
{% endfor %}{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<dl>{% for name, value in summary %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% if reason %}<p>{{ reason }}</p>{% endif %}

<h2>Tasks by {{ kind.unit }}s</h2>
<p>{{ kind.weights | capitalize }} in eval mode, mean of the layers{% if splits > 1 %} and splits{% endif %}\
{% if kind.centre is none %}; an even share is {{ '%.3g' % (1 / columns) }}{% else %}; at {{ '%g' % kind.centre }} a \
task is the LoRA that all share, and below it a cell is red{% endif %}. Like tasks are side by side. \
{{ kind.unit | capitalize }} 3 of one layer has nothing to do with {{ kind.unit }} 3 of another, so a flat mean \
may hide layers that are not flat.</p>
{{ heat(mean, columns, "task") }}
{% if more %}<p>... and {{ more }} more tasks, which are left out here and below.</p>{% endif %}
{% if chosen %}
<h2>{{ chosen.name }}, layer by layer</h2>
{{ heat(chosen.rows, columns, "layer") }}
{% endif %}
{% if tree %}
<h2>Tree of tasks</h2>
<p>The further to the right two branches meet, the less alike are the tasks' {{ kind.weights }} (1 - cosine,
average linkage).</p>
<div class="tree">
<ol>{% for name in tree.names %}<li style="height:{{ row }}px;line-height:{{ row }}px" title="{{ name }}">{{ name }}\
</li>{% endfor %}</ol>
<svg viewBox="0 0 100 {{ tree.names | length * row }}" style="height:{{ tree.names | length * row }}px" \
preserveAspectRatio="none" role="img" aria-label="tree of tasks">
{%- for points in tree.lines %}<polyline points="{{ points }}" vector-effect="non-scaling-stroke"/>{% endfor %}</svg>
<div class="axis"><span>0</span><span>{{ '%.3g' % (tree.top / 2) }}</span><span>{{ '%.3g' % tree.top }}</span></div>
</div>
{% endif %}
<h2>Tasks</h2>
<p>{% if kind.centre is none %}The skills that weigh most for each task, how many skills it mixes in effect \
(exp of the entropy of its weights){% else %}The {{ kind.unit }}s whose {{ kind.weights }} are furthest from \
{{ '%g' % kind.centre }}, how many {{ kind.unit }}s each task uses in effect (exp of the entropy of its squared \
{{ kind.weights }}){% endif %}, and the task that is most like it.</p>
<div class="scroll"><table>
<thead><tr><th>task</th><th class="text">top {{ kind.unit }}s ({{ kind.weight }})</th>\
<th>effective {{ kind.unit }}s</th><th class="text">nearest task (cosine)</th></tr></thead>
<tbody>{% for task in tasks %}
<tr><th scope="row">{{ task.name | breakable }}</th><td class="text">{{ task.top }}</td>
<td>{{ '%.2f' % task.effective }}</td>
<td class="text">{{ task.nearest }}</td></tr>{% endfor %}
</tbody></table></div>

<h2>Layers</h2>
<p>{% for m in measured %}<b>{{ m.name | replace("_", " ") | capitalize }}</b>: {{ m.metadata.meaning }}. \
{% endfor %}</p>
<div class="scroll"><table>
<thead><tr><th>layer</th>{% for m in measured %}<th>{{ m.name | replace("_", " ") }}</th>{% endfor %}</tr></thead>
<tbody>
<tr class="mean"><th scope="row">mean of {{ layers | length }}</th>{{ numbers(mean_metrics) }}</tr>
{% for name, metrics in layers %}<tr><th scope="row">{{ name | breakable }}</th>{{ numbers(metrics) }}</tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""


def render_report(routing: Routing, *, title: str = "Routing", task: Union[int, str, None] = None) -> str:
    """The report as HTML: summary, heat map, tree of tasks, tasks and their top skills, metrics per layer.

    Args:
        routing: what to report on. Of more than 400 tasks the first are shown, and no tree.
        title: heading, text and not markup, as are task names.
        task: also show this task layer by layer.

    Raises:
        ImportError: scipy is missing (for the tree).
        ValueError: there is no such task.
    """
    from jinja2 import Environment

    n_tasks, n_splits, n_columns = routing.shape
    tree = _tree(routing) if 2 <= n_tasks <= MOST_TASKS else None
    order = tree["order"] if tree else list(range(min(n_tasks, MOST_TASKS)))
    matrix = task_skill_matrix(routing)
    environment = Environment(autoescape=True)
    environment.filters["breakable"] = _breakable
    return environment.from_string(TEMPLATE).render(
        title=title,
        style=STYLE,
        summary=_summary(routing),
        reason=nothing_routed(routing),
        kind=routing.kind,
        measured=fields(mean_metrics(routing)),
        splits=n_splits,
        columns=n_columns,
        row=ROW,
        mean=_cells(routing, matrix[order], [routing.task_names[task_id] for task_id in order]),
        more=n_tasks - len(order),
        chosen=None if task is None else _by_layer(routing, routing.task_id(task)),
        tree=tree,
        tasks=_tasks(routing, matrix, sorted(order)),
        layers=list(layer_metrics(routing).items()),
        mean_metrics=mean_metrics(routing),
    )


def write_report(routing: Routing, path: Union[str, Path], **kwargs: Any) -> Path:
    """Write `render_report(routing, ...)` to a file, which replaces one that was there only once it is complete.

    Args:
        routing: what to report on.
        path: the file, UTF-8; its folder is made if it is not there.
        kwargs: `title` and `task` of `render_report`.

    Returns:
        `path`.

    Raises:
        ImportError: scipy is missing (for the tree).
        ValueError: there is no such task.
    """
    path = Path(path)
    text = render_report(routing, **kwargs)
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")
    return path


def _summary(routing: Routing) -> list[tuple[str, Any]]:
    config = routing.config
    about = [
        ("base model", getattr(config, "base_model_name_or_path", None)),
        ("adapter", getattr(getattr(config, "peft_type", None), "value", None)),
        *sizes(routing).items(),
        ("routers", len(routing.layers)),
    ]
    return [(name, value) for name, value in about if value]


def _breakable(name: str) -> Any:
    """A name, escaped, with places where a narrow screen may break it."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[._/])", name))


def _cells(routing: Routing, matrix: torch.Tensor, names: Sequence[str]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Rows of a heat map: name and, for each cell, its value and how dark it is, 0 to 1; below the centre, 0 to -1."""
    low, high = span(routing, matrix)
    pale = low if routing.kind.centre is None else routing.kind.centre
    shades = ((matrix - pale) / (high - pale)).tolist()
    return [(name, list(zip(*cells, strict=True))) for name, *cells in zip(names, matrix.tolist(), shades, strict=True)]


def _by_layer(routing: Routing, task_id: int) -> dict[str, Any]:
    rows = torch.stack([task_skill_matrix(routing, layer)[task_id] for layer in routing.layers])
    return {"name": routing.task_names[task_id], "rows": _cells(routing, rows, routing.layers)}


def _tree(routing: Routing) -> dict[str, Any]:
    """Leaves from top to bottom, and the branches as SVG points, 100 units wide and `ROW` high per leaf."""
    linkage = task_linkage(routing)
    from scipy.cluster import hierarchy

    drawn = hierarchy.dendrogram(linkage, no_plot=True)
    top = farthest(routing)
    lines = [
        " ".join(f"{99 * distance / top:.2f},{place / 10 * ROW:.1f}" for distance, place in zip(*branch, strict=True))
        for branch in zip(drawn["dcoord"], drawn["icoord"], strict=True)
    ]
    order = drawn["leaves"]
    return {"order": order, "names": [routing.task_names[task] for task in order], "lines": lines, "top": top}


def _tasks(routing: Routing, matrix: torch.Tensor, task_ids: Sequence[int]) -> list[dict[str, Any]]:
    effective, similarity = effective_skills(routing), task_similarity(routing).fill_diagonal_(-torch.inf)
    tasks = []
    for task_id in task_ids:
        near = int(similarity[task_id].argmax())
        nearest = f"{routing.task_names[near]} ({similarity[task_id, near]:.2f})" if near != task_id else "-"
        tasks.append(
            {
                "name": routing.task_names[task_id],
                "top": ", ".join(f"{column} ({w:.2f})" for column, w in top_columns(routing, matrix[task_id])),
                "effective": effective[task_id].item(),
                "nearest": nearest,
            }
        )
    return tasks
