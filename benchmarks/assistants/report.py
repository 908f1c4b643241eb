"""From results to tables: means over the assistants, with intervals over letters and seeds, or draws of rows.

A letter goes to all assistants, so that its answers are not independent: the intervals are percentile bootstraps over
letters, each with its mean over the assistants, and over the seeds, where there are several.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from ..quality.statistics import crossed_bootstrap, mean_and_error
from .plan import FEW, KEPT, METHODS, OLD_ROWS, QUANTISED, Plan, Result, Unit

__all__ = ["all_table", "few_table", "kept_table", "quantised_table", "served_table", "task_table", "tuning_table"]

Table = list[dict[str, Any]]
NAMES = {"form": "form", "right": "exact"}  # headings, and what they are of a result
TRAINED_ON = "shared LoRA, trained on"  # what ways to learn from a few rows are compared with


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
        row["95 % of draws"] = interval(letters(seeds))
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
    """A line for each way to learn the seventh assistant: answers in form and right ones by the number of rows, over
    the draws; and right ones at most rows, less those of the shared LoRA that is trained on."""
    most, found = max(plan.settings.shots), {way: _by_shots(plan, way) for way in FEW}
    rows = []
    for way, by_shots in found.items():
        units = [results for draws in by_shots.values() for results in draws.values()]
        if not units:
            continue
        row = {"way": way, "numbers that learn": f"{units[0][0].parameters:,}"}
        for shots in plan.settings.shots:
            for heading, what in NAMES.items():
                values = [_mean(results, what) for results in by_shots[shots].values()]
                row[f"{shots} rows, {heading}"] = shown(values)
        rows.append({**row, f"right at {most}, less {TRAINED_ON}": _less(by_shots[most], found[TRAINED_ON][most], way)})
    return rows


def kept_table(plan: Plan) -> Table:
    """A line for each way to learn the seventh assistant from most rows: the seventh, the six after it, and before."""
    rows = []
    for way in KEPT:
        found = plan.store.done.get(Unit("kept", way, 0, max(plan.settings.shots)))
        before = plan.store.done.get(Unit("all", FEW[way.removesuffix(OLD_ROWS)] or "", 0))
        if not found or not before:
            continue
        tasks = {result.task for result in before}
        seventh, six = ([one for one in found if (one.task in tasks) is old] for old in (False, True))
        row = {"way": way}
        for whose, results in (("seventh", seventh), ("the six", six), ("the six before", before)):
            row |= {f"{whose}, {name}": shown([_mean(results, what)]) for name, what in NAMES.items()}
        less = _paired({0: six}, {0: before})
        rows.append({**row, "right, the six less before": f"{fmean(less[0]):.1f} ({interval(less)})"})
    return rows


def quantised_table(plan: Plan) -> Table:
    """The adapter of seed 0 on a quantised base, in training and in serving."""
    plain = plan.store.done.get(Unit("all", "MHR", 0))
    found = {"MHR, plain then plain": plain} | {
        name: plan.store.done.get(Unit("quantised", name, 0)) for name in QUANTISED
    }
    return [
        {
            "base in training, then in serving": name,
            **{what: shown([_mean(one, what)]) for what in ("form", "exact")},
            "95 % of draws": interval(letters({0: one})),
            "exact, less plain": _less_plain(one, plain),
        }
        for name, one in found.items()
        if one
    ]


def served_table(found: dict[str, tuple[list[Result], list[str]]]) -> Table:
    """One adapter on several bases, the first of which the others are compared with."""
    plain, words = next(iter(found.values()))
    return [
        {
            "base": name,
            **{what: shown([_mean(one, what)]) for what in ("form", "exact")},
            "95 % of draws": interval(letters({0: one})),
            "exact, less plain": _less_plain(one, plain),
            "answers equal": f"{sum(a == b for a, b in zip(said, words, strict=True))} of {len(words)}",
        }
        for name, (one, said) in found.items()
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


def letters(seeds: dict[int, list[Result]]) -> list[list[float]]:
    """By seed and letter of the test, per cent of the answers to it that are right, over assistants."""
    return [
        [100 * fmean(map(int, answers)) for answers in zip(*(result.rows for result in results), strict=True)]
        for results in seeds.values()
    ]


def interval(values: list[list[float]]) -> str:
    """The 2.5th and the 97.5th percentile of the mean over draws of letters and seeds."""
    found = crossed_bootstrap(values)
    return f"{found.low:.0f} to {found.high:.0f}"


def _less_plain(one: list[Result], plain: list[Result] | None) -> str:
    if plain is None or one is plain:
        return ""
    less = _paired({0: one}, {0: plain})
    return f"{fmean(less[0]):.1f} ({interval(less)})"


def _by_shots(plan: Plan, way: str) -> dict[int, dict[int, list[Result]]]:
    """By number of rows and draw, what a way to learn from a few rows gave."""
    found: dict[int, dict[int, list[Result]]] = {shots: {} for shots in plan.settings.shots}
    for unit, results in plan.store.done.items():
        if (unit.stage, unit.method) == ("few", way) and unit.shots in found:
            found[unit.shots][unit.draw] = results
    return found


def _by_seed(plan: Plan, method: str) -> dict[int, list[Result]]:
    units = {unit: results for unit, results in plan.store.done.items() if (unit.stage, unit.method) == ("all", method)}
    return {unit.seed: results for unit, results in sorted(units.items(), key=lambda pair: pair[0].seed)}


def _mean(results: list[Result], what: str) -> float:
    return fmean(getattr(result, what) for result in results)


def _less(seeds: dict[int, list[Result]], others: dict[int, list[Result]], method: str) -> str:
    """The difference and its interval, over the seeds (draws of rows) that both have."""
    both = {seed: results for seed, results in seeds.items() if seed in others}
    if method in ("base", "shared LoRA, told", TRAINED_ON) or not both:
        return ""
    less = _paired(both, {seed: others[seed] for seed in both})
    return f"{fmean(map(fmean, less)):.1f} ({interval(less)})"


def _paired(one: dict[int, list[Result]], other: dict[int, list[Result]]) -> list[list[float]]:
    """The differences of two that answered the same letters, by seed and letter."""
    return [
        [a - b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(letters(one), letters(other), strict=True)
    ]
