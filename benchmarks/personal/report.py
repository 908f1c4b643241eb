"""From results to tables, a verdict in words, and a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..quality.rates import Rates
from ..quality.statistics import Interval, crossed_bootstrap, mean_and_error
from .lines import LINES, REFERENCE, RIVALS, ROUTED, WAYS
from .plan import Plan, Result, Unit

__all__ = ["against", "case_table", "new_table", "plot", "routed_table", "size_table", "tuning_table", "verdict"]

SETTINGS = ("numbers that learn", "rate", "router", "steps", "seeds")  # columns that are no results
OWN = ("a bias per task on a shared LoRA", "a head per task on a shared LoRA")  # rivals that only a classifier has
Table = list[dict[str, Any]]
Scores = dict[int, dict[str, Result]]  # by seed and task


def many(plan: Plan, case: str) -> dict[str, tuple[Unit, Scores]]:
    """Results of each line of a case that has a seed done, in the order of the lines."""
    return _found(plan, "many", case, 0)


def new(plan: Plan, case: str, shots: int) -> dict[str, tuple[Unit, Scores]]:
    """The same of each way to meet a new task; without a verb it is the same for all numbers of rows."""
    return {
        way: found
        for number in {plan.settings.shots[0], shots}
        for way, found in _found(plan, "new", case, number).items()
        if number == shots or not WAYS[way].verb
    }


def _found(plan: Plan, stage: str, case: str, shots: int) -> dict[str, tuple[Unit, Scores]]:
    found: dict[str, tuple[Unit, Scores]] = {}
    for slot in plan.slots:
        if (slot.stage, slot.case, slot.shots) != (stage, case, shots):
            continue
        unit = plan.unit(slot)
        if unit is not None and unit in plan.store.done:
            _, scores = found.setdefault(slot.line, (unit, {}))
            scores[unit.seed] = {result.task: result for result in plan.store.done[unit]}
    order = list(LINES) + list(WAYS)
    return dict(sorted(found.items(), key=lambda pair: order.index(pair[0])))


def by_task(scores: Scores, what: str, seeds: set[int]) -> dict[str, float]:
    """The mean over seeds for each task; tasks that have none are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for task, result in scores[seed].items():
            value = getattr(result, what)
            if not math.isnan(value):
                values[task].append(value)
    return {task: fmean(of_task) for task, of_task in values.items()}


def against(one: Scores, other: Scores, what: str = "accuracy") -> Interval:
    """Paired difference over the seeds and tasks that both have, with an interval over draws of both."""
    seeds = sorted(one.keys() & other.keys())
    whole = [
        {task for task, of in scores[seed].items() if not math.isnan(getattr(of, what))}
        for scores in (one, other)
        for seed in seeds
    ]
    tasks = sorted(set.intersection(*whole))
    return crossed_bootstrap(
        [[getattr(one[s][task], what) - getattr(other[s][task], what) for task in tasks] for s in seeds]
    )


def case_table(plan: Plan, case: str) -> Table:
    """A line each: size, settings, accuracy and area, and what it is ahead of the three rivals."""
    found, rows = many(plan, case), []
    for line, (unit, scores) in found.items():
        row = {"method": line, **_settings(unit, scores), "accuracy": _mean(scores, "accuracy")}
        if not math.isnan(_value(scores, "auc")):
            row["AUC"] = _mean(scores, "auc")
        for rival in RIVALS:
            of = against(scores, found[rival][1]) if rival in found and rival != line else None
            row[f"less {rival}"] = f"{of.mean:+.1f} ± {of.error:.1f}" if of else ""  # the plot has the intervals
        rows.append(row)
    return rows


def routed_table(plan: Plan, case: str) -> Table:
    """Routed lines less the rivals that only a classifier has, and less the routed line that they vary in one thing."""
    found, rows = many(plan, case), []
    for line in ROUTED:
        if line not in found:
            continue
        of = "gates" if line.startswith("gates") else "MHR, 4 splits" if line == "MHR, one router" else "Poly"
        row = {"method": line, "seeds": str(len(found[line][1]))}
        for rival in OWN:
            row[f"less {rival}"] = _shown(against(found[line][1], found[rival][1])) if rival in found else ""
        if REFERENCE in found and not math.isnan(_value(found[line][1], "auc")):
            row[f"AUC, less {REFERENCE}"] = _shown(against(found[line][1], found[REFERENCE][1], "auc"))
        varies = line != of and of in found
        row["less"] = of if varies else ""
        row["by"] = _shown(against(found[line][1], found[of][1])) if varies else ""
        rows.append(row)
    return rows


def new_table(plan: Plan, case: str) -> Table:
    """A way each: accuracy from each number of rows, and the last one less the shared LoRA, trained on."""
    shots, reference = plan.settings.shots, "shared LoRA, trained on"
    by_shots = {number: new(plan, case, number) for number in shots}
    rows = []
    for way in WAYS:
        if way not in by_shots[shots[0]]:
            continue
        unit, scores = by_shots[shots[0]][way]
        row: dict[str, Any] = {"way": way, **_settings(unit, scores)}
        for number in shots:
            found = by_shots[number]
            row[f"{number} rows"] = _mean(found[way][1], "accuracy") if way in found else ""
        last = by_shots[shots[-1]]
        both = way in last and reference in last and way != reference
        row[f"less {reference}"] = _shown(against(last[way][1], last[reference][1])) if both else ""
        rows.append(row)
    return rows


def tuning_table(plan: Plan, case: str) -> Table:
    """Accuracy on held-out training rows of every setting at its best number of steps; the chosen one in bold."""
    rows = []
    for line in plan.lines(case):
        chosen, cells = plan.chosen(case, line), []
        for slot in (slot for slot in plan.slots if (slot.stage, slot.case, slot.line) == ("tune", case, line)):
            unit = plan.unit(slot)
            if unit is None or unit not in plan.store.done:
                continue
            best = max(plan.store.done[unit], key=lambda result: (result.accuracy, -result.loss))
            rates = Rates.parse(unit.rates)
            text = f"{rates.lr:g}{f', router {rates.router_lr:g}' if rates.router_lr else ''}, {best.task} steps"
            text += f": {best.accuracy:.1f}"
            cells.append(f"**{text}**" if chosen == (rates, int(best.task)) else text)
        if cells:
            rows.append({"line": line, "settings and held-out accuracy": "; ".join(cells)})
    return rows


def verdict(plan: Plan, case: str) -> str:
    """Is the best routed line ahead of each rival by more than two standard errors, and of the best other line?"""
    found = many(plan, case)
    if any(rival not in found for rival in RIVALS):
        return f"{case}: not all lines are done."
    seeds = len(found[REFERENCE][1])  # a line of fewer seeds may be the best by chance
    routed = [line for line in ROUTED if line in found and len(found[line][1]) == seeds]
    if not routed:
        return f"{case}: not all lines are done."
    best = max(routed, key=lambda line: _value(found[line][1], "accuracy"))
    ahead = {rival: against(found[best][1], found[rival][1]) for rival in RIVALS}
    level = [rival for rival, of in ahead.items() if of.mean <= 2 * of.error]
    figures = ", ".join(f"{of.mean:+.1f} ± {of.error:.1f} against {rival}" for rival, of in ahead.items())
    said = f"{case}: {best} is ahead of all three rivals by more than two standard errors ({figures})."
    if level:
        said = f"{case}: {best} is not ahead of {' nor of '.join(level)} by two standard errors ({figures})."
    others = [line for line in found if line not in (*ROUTED, *RIVALS) and LINES[line].method is not None]
    if others:
        other = max(others, key=lambda line: _value(found[line][1], "accuracy"))
        less = against(found[best][1], found[other][1])
        said += f" Less {other}, the best of the others: {less.mean:+.1f} ± {less.error:.1f} (seeds of both)."
    return said


def size_table(plan: Plan, case: str, rows: Mapping[str, int]) -> Table:
    """Accuracy of each line by how many training rows a task has; none where all have as many."""
    parts: dict[int, list[str]] = defaultdict(list)  # by powers of two; the last has its end
    for task, number in rows.items():
        parts[min(number, max(rows.values()) - 1).bit_length()].append(task)
    found = {line: by_task(scores, "accuracy", set(scores)) for line, (_, scores) in many(plan, case).items()}
    if len(parts) < 2 or not found:
        return []
    columns: dict[str, list[str]] = {}
    for _, tasks in sorted(parts.items()):
        numbers = [rows[task] for task in tasks]
        columns[f"{min(numbers)} to {max(numbers)} rows ({len(tasks)} tasks)"] = tasks
    return [
        {"method": line, **{column: f"{fmean(of[task] for task in tasks):.1f}" for column, tasks in columns.items()}}
        for line, of in found.items()
    ]


def _settings(unit: Unit, scores: Scores) -> dict[str, str]:
    rates, size = Rates.parse(unit.rates), next(iter(next(iter(scores.values())).values())).parameters
    return {
        "numbers that learn": f"{size:,}" if size else "",
        "rate": f"{rates.lr:g}" if rates.lr else "",
        "router": f"{rates.router_lr:g}" if rates.router_lr else "",
        "steps": str(unit.steps or ""),
        "seeds": str(len(scores)),
    }


def _value(scores: Scores, what: str) -> float:
    values = by_task(scores, what, set(scores))
    return fmean(values.values()) if values else math.nan


def _mean(scores: Scores, what: str) -> str:
    """Mean over the tasks, and its standard error over the seeds."""
    mean, error = mean_and_error([_value({seed: of}, what) for seed, of in scores.items()])
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _shown(of: Interval) -> str:
    return f"{of.mean:+.1f} ± {of.error:.1f} [{of.low:+.1f}, {of.high:+.1f}]"


def plot(plan: Plan, path: Path) -> None:
    """Accuracy of each line of each case less that of the shared LoRA, with the intervals over tasks and seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    cases = {case: found for case in plan.settings.cases if REFERENCE in (found := many(plan, case))}
    if not cases:
        return
    heights = [len(found) for found in cases.values()]
    size = (7.5, 1.2 + 0.32 * sum(heights))
    figure, all_axes = plt.subplots(len(cases), 1, figsize=size, layout="constrained", height_ratios=heights,
                                    squeeze=False)  # fmt: skip
    for axes, (case, found) in zip(all_axes[:, 0], cases.items(), strict=True):
        for place, (line, (_, scores)) in enumerate(found.items()):
            of = against(scores, found[REFERENCE][1])
            colour = "#1d4ed8" if line in ROUTED else "#6b7280"
            axes.errorbar(
                of.mean, place, xerr=[[of.mean - of.low], [of.high - of.mean]], fmt="o", color=colour, capsize=3
            )
        axes.axvline(0, color="#9ca3af", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(found)), list(found), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{case}: points over {REFERENCE}, 95 % over tasks and seeds")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
