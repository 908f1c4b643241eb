"""What the routers have learned: do tasks of one family lie together? Pictures, and a number to hold against chance."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from peft_poly.analysis import mean_metrics, read_routing, task_linkage

from .data import families
from .lines import MANY
from .plan import Plan
from .report import multi_task
from .runs import Run
from .statistics import Fit, clusters, fit_of_families

__all__ = ["best_routed", "look"]


def best_routed(plan: Plan) -> str:
    """The line of ours with the highest test accuracy, mean over the seeds that all of them have."""
    found = {line: a for line, a in multi_task(plan).items() if MANY[line].method.kind == "poly"}
    seeds = set.intersection(*(set(accuracies) for accuracies in found.values())) if found else set()
    if not seeds:
        return ""
    return max(found, key=lambda line: fmean(fmean(found[line][seed].values()) for seed in seeds))


def look(run: Run, plan: Plan, line: str, picture: Path) -> list[dict[str, Any]]:
    """A row for each seed of a line; the heat map and the tree of the first one go into `picture`.

    Families are what names begin with (`data.families`), among tasks that have kin; categories are what the rows say,
    among all tasks. The tree is cut into as many clusters as there are families among its leaves.
    """
    from peft_poly.plots import save_plots

    rows = []
    for unit in (unit for unit in plan.store.done if unit.setup == plan.setup):
        if unit.stage != "many" or unit.line != line or not run.file(line, unit.rates, unit.seed, unit.steps).exists():
            continue
        routing = read_routing(run.adapter(line, unit.rates, unit.seed, unit.steps).model)
        metrics = mean_metrics(routing)
        if not rows:
            save_plots(routing, picture)
        row = {
            "seed": unit.seed,
            "discreteness": f"{metrics.discreteness:.2f}",
            "skills used": f"{metrics.effective_skills:.2f}",
        }
        linkage, names = task_linkage(routing), routing.task_names
        for kind, label in (("family", families(names)), ("category", run.tasks.category)):
            row |= _cells(kind, _fit(linkage, names, label))
        rows.append(row)
    return rows


def _fit(linkage: Any, names: list[str], label: dict[str, str]) -> Fit | None:
    """Clusters of the whole tree, compared on the tasks that have a label."""
    kept = [n for n, name in enumerate(names) if label.get(name)]
    kinds = [label[names[n]] for n in kept]
    number = len(set(kinds)) + len(names) - len(kept)  # tasks without kin are families of one
    if len(set(kinds)) < 2:
        return None
    found = clusters(linkage, number)
    return fit_of_families([found[n] for n in kept], kinds)


def _cells(kind: str, fit: Fit | None) -> dict[str, str]:
    if fit is None:
        return {}
    return {
        f"{kind}: Rand index": f"{fit.index:.2f}",
        f"{kind}: by chance, 95 %": f"{fit.random:.2f}, {fit.high:.2f}",
        f"{kind}: p": f"{fit.p:.2g}",
    }
