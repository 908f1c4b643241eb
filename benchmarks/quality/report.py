"""From results to the tables of the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .. import results as markdown
from .lines import BEST, BESTS, FEW, FEW_REFERENCES, FEW_SHOWN, MANY, REFERENCES, SHOWN
from .plan import Plan
from .rates import Rates
from .statistics import Difference, compare, mean_and_error
from .store import Result, Unit

__all__ = [
    "SETTINGS",
    "Accuracies",
    "best_table",
    "few_shot",
    "few_table",
    "many_table",
    "multi_task",
    "task_table",
    "tuning_table",
    "write",
]

SETTINGS = ("parameters", "numbers that learn", "rate", "router", "scale", "seeds")  # columns that are no results
Accuracies = dict[int, dict[str, float]]  # by seed and task
Table = list[dict[str, Any]]


def multi_task(plan: Plan, table: str = "main") -> dict[str, Accuracies]:
    """Test accuracies of each line of a multi-task table (`lines.Line.table`) that has a seed done."""
    found: dict[str, Accuracies] = {}
    for unit, results in _done(plan, "many"):
        found.setdefault(unit.line, {})[unit.seed] = {result.task: result.accuracy for result in results}
    return {line: found[line] for line in MANY if line in found and MANY[line].table == table}


def few_shot(plan: Plan, shots: int, table: str = "main") -> dict[str, Accuracies]:
    """The same for a few-shot table: medians over the draws, of those seeds that have all of them."""
    drawn: dict[str, dict[int, list[list[Result]]]] = {}
    for unit, results in _done(plan, "few"):
        if unit.shots in (0, shots):
            drawn.setdefault(unit.line, {}).setdefault(unit.seed, []).append(results)
    found: dict[str, Accuracies] = {}
    for way in (way for way in FEW if FEW[way].table == table):
        draws = plan.settings.draws if FEW[way].learns else 1
        for seed, runs in sorted(drawn.get(way, {}).items()):
            if len(runs) == draws:
                tasks = {result.task: median(_of(run, result.task) for run in runs) for result in runs[0]}
                found.setdefault(way, {})[seed] = tasks
    return found


def _of(results: Iterable[Result], task: str) -> float:
    return next(result.accuracy for result in results if result.task == task)


def _done(plan: Plan, stage: str) -> list[tuple[Unit, list[Result]]]:
    units = [unit for slot in plan.slots if slot.stage == stage and (unit := plan.unit(slot))]
    return [(unit, plan.store.done[unit]) for unit in units if unit in plan.store.done]


def many_table(plan: Plan, table: str = "main") -> Table:
    """A line each: size, rates, mean accuracy, and the paired difference from the shared LoRA."""
    found = multi_task(plan, table)
    sizes = {unit.line: results[0].parameters for unit, results in _done(plan, "many")}
    rates = {unit.line: Rates.parse(unit.rates) for unit, _ in _done(plan, "many")}
    rows = []
    for line, accuracies in found.items():
        row = {"method": line, "parameters": f"{sizes[line]:,}", **_shown(rates[line]), "accuracy": _mean(accuracies)}
        rows.append({**row, "seeds": len(accuracies), **_against(found, line, REFERENCES[table])})
    return rows


def best_table(plan: Plan, table: str = "main") -> Table:
    """Paired differences from `lines.BESTS`: of its variants in the main table, of all lines in the other."""
    found, best = multi_task(plan, table), BESTS[table]
    if best not in found:
        return []
    lines = [line for line in found if line != best and (table != "main" or MANY[line].method.kind == "poly")]
    return [{"method": line, "accuracy": _mean(found[line]), **_against(found, line, best, BEST)} for line in lines]


def few_table(plan: Plan, table: str = "main") -> Table:
    """A way each: what learns, and mean accuracy at each number of rows."""
    sizes = {unit.line: results[0].parameters for unit, results in _done(plan, "few")}
    rates = {unit.line: Rates.parse(unit.rates) for unit, _ in _done(plan, "few")}
    by_shots = {shots: few_shot(plan, shots, table) for shots in plan.settings.shots}
    rows = []
    for way in FEW:
        if way not in sizes or FEW[way].table != table:
            continue
        row: dict[str, Any] = {"way": way, "numbers that learn": f"{sizes[way]:,}", **_shown(rates[way])}
        row.pop("scale")
        for shots, found in by_shots.items():
            row[f"{shots} rows"] = _mean(found[way]) if way in found else ""
        last = by_shots[plan.settings.shots[-1]]
        row["seeds"] = len(last.get(way, {}))
        rows.append({**row, **_against(last, way, FEW_REFERENCES[table])})
    return rows


def task_table(found: dict[str, Accuracies], lines: list[str], chance: dict[str, float]) -> Table:
    """Accuracy of some lines task by task, mean over the seeds; the best in bold. What chance has comes first."""
    lines = [line for line in lines if line in found]
    if not lines:
        return []
    rows = []
    for task in next(iter(found[lines[0]].values())):
        means = {line: fmean(tasks[task] for tasks in found[line].values()) for line in lines}
        best = max(means.values())
        row = {"task": task, "chance": f"{chance[task]:.1f}"}
        rows.append(row | {line: f"**{m:.1f}**" if m == best else f"{m:.1f}" for line, m in means.items()})
    return rows


def tuning_table(plan: Plan) -> Table:
    """All that was tried on validation rows, in a grid or before it: mean accuracies, the chosen setting in bold."""
    rows = []
    for few, lines in ((False, MANY), (True, FEW)):
        stage = "tune few" if few else "tune"
        for line in lines:
            units = [
                unit for unit in plan.store.done if (unit.setup, unit.stage, unit.line) == (plan.setup, stage, line)
            ]
            tried = {Rates.parse(unit.rates): plan.store.done[unit] for unit in units}
            if not tried:
                continue
            chosen = plan.rates(line, few)
            cells = []
            for rates, results in tried.items():
                text = ", ".join(f"{name} {value}" for name, value in _shown(rates).items() if value)
                text += f": {fmean(result.accuracy for result in results):.1f}"
                cells.append(f"**{text}**" if rates == chosen else text)
            rows.append({"line": line, "settings and validation accuracy": "; ".join(cells)})
    return rows


def _shown(rates: Rates) -> dict[str, str]:
    names = zip(("rate", "router", "scale"), rates, strict=True)
    return {name: f"{value:g}" if value else "" for name, value in names}


def _mean(accuracies: Accuracies) -> str:
    mean, error = mean_and_error([fmean(tasks.values()) for tasks in accuracies.values()])
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _against(
    found: dict[str, Accuracies], line: str, reference: str, called: str = "the shared LoRA"
) -> dict[str, str]:
    head = f"less {called}"
    if line == reference or line not in found or reference not in found or not found[line].keys() & found[reference]:
        return {head: "", "tasks better / equal / worse": "", "sign test": ""}
    d: Difference = compare(found[line], found[reference])
    error = "" if math.isnan(d.error) else f" ± {d.error:.1f}"
    counts = f"{d.better} / {d.equal} / {d.worse}"
    return {head: f"{d.mean:+.1f}{error}", "tasks better / equal / worse": counts, "sign test": f"p = {d.p:.2g}"}


def write(docs: Path, plan: Plan, about: dict[str, str], routing: Table, chance: dict[str, float]) -> None:
    """Replace the tables of a Markdown file, each between its markers; `about`: when and where they were measured."""
    tables = {"quality": many_table(plan), "quality-few": few_table(plan), "quality-tuning": tuning_table(plan)}
    tables |= {"quality-tasks": task_table(multi_task(plan), SHOWN, chance), "quality-routing": routing}
    tables |= {"quality-variants": best_table(plan), "quality-longer-best": best_table(plan, "longer")}
    tables["quality-few-longer"] = few_table(plan, "longer")
    tables |= {f"quality-{table}": many_table(plan, table) for table in REFERENCES if table != "main"}
    if longer := multi_task(plan, "longer"):
        tables["quality-tasks-longer"] = task_table(longer, list(longer), chance)
    if last := few_shot(plan, plan.settings.shots[-1]):
        tables["quality-few-tasks"] = task_table(last, FEW_SHOWN, chance)
    for name, rows in tables.items():
        if rows:
            markdown.write_table(docs, name, rows, about, list(rows[0]))
