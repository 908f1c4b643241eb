"""From results to tables: mean over the assistants, with the standard error over seeds or draws."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from ..quality.statistics import mean_and_error
from .plan import FEW, METHODS, QUANTISED, Plan, Result, Unit

__all__ = ["all_table", "few_table", "quantised_table", "task_table", "tuning_table"]

Table = list[dict[str, Any]]


def all_table(plan: Plan) -> Table:
    """A line for each method: size, rates, answers in form, right answers, and the difference from the told LoRA."""
    found = {method: _by_seed(plan, method) for method in METHODS}
    rows = []
    for method, seeds in found.items():
        if not seeds:
            continue
        row = {"method": method, "parameters": f"{next(iter(seeds.values()))[0].parameters:,}", "rates": "-"}
        if method != "base":
            row["rates"] = " / ".join(f"{rate:g}" for rate in plan.rates(method) if rate)
        row |= {what: shown([_mean(one, what) for one in seeds.values()]) for what in ("form", "exact")}
        rows.append({**row, "seeds": len(seeds), "exact, less told": _less(seeds, found["shared LoRA, told"], method)})
    return rows


def task_table(plan: Plan) -> Table:
    """Right answers of each assistant, mean over the seeds."""
    found = {method: seeds for method in METHODS if (seeds := _by_seed(plan, method))}
    tasks = [result.task for result in next(iter(next(iter(found.values())).values()))] if found else []
    return [
        {"assistant": task}
        | {
            method: f"{fmean(one.exact for results in seeds.values() for one in results if one.task == task):.0f}"
            for method, seeds in found.items()
        }
        for task in tasks
    ]


def few_table(plan: Plan) -> Table:
    """A line for each way to learn the seventh assistant: right answers by the number of rows, over the draws."""
    rows = []
    for way in FEW:
        units = {
            unit: results for unit, results in plan.store.done.items() if (unit.stage, unit.method) == ("few", way)
        }
        if units:
            row = {"way": way, "numbers that learn": f"{next(iter(units.values()))[0].parameters:,}"}
            for shots in plan.settings.shots:
                row[f"{shots} rows"] = shown(
                    [_mean(found, "exact") for unit, found in units.items() if unit.shots == shots]
                )
            rows.append(row)
    return rows


def quantised_table(plan: Plan) -> Table:
    """The adapter of seed 0 on a quantised base, in training and in serving."""
    plain = plan.store.done.get(Unit("all", "MHR", 0))
    found = {"MHR, plain then plain": plain} | {
        name: plan.store.done.get(Unit("quantised", name, 0)) for name in QUANTISED
    }
    return [
        {"base in training, then in serving": name, **{what: shown([_mean(one, what)]) for what in ("form", "exact")}}
        for name, one in found.items()
        if one
    ]


def tuning_table(plan: Plan) -> Table:
    """What was tried on validation rows."""
    tried = [(unit, results) for unit, results in plan.store.done.items() if unit.stage == "tune"]
    return [
        {
            "method": unit.method,
            "rate": f"{unit.rates[0]:g}",
            "router": f"{unit.rates[1]:g}",
            "exact": shown([_mean(one, "exact")]),
        }
        for unit, one in tried
    ]


def shown(values: list[float]) -> str:
    """Mean and standard error; empty where there is nothing."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _by_seed(plan: Plan, method: str) -> dict[int, list[Result]]:
    units = {unit: results for unit, results in plan.store.done.items() if (unit.stage, unit.method) == ("all", method)}
    return {unit.seed: results for unit, results in sorted(units.items(), key=lambda pair: pair[0].seed)}


def _mean(results: list[Result], what: str) -> float:
    return fmean(getattr(result, what) for result in results)


def _less(seeds: dict[int, list[Result]], others: dict[int, list[Result]], method: str) -> str:
    if method in ("base", "shared LoRA, told"):
        return ""
    return shown([_mean(seeds[seed], "exact") - _mean(others[seed], "exact") for seed in seeds if seed in others])
