"""What the routers have learned: do tasks of one family lie together? Pictures, and a number to hold against chance."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from peft_poly.insight import mean_metrics, read_routing, task_similarity

from .data import families
from .lines import MANY
from .plan import Plan
from .plots import plot_routing
from .report import multi_task
from .runs import Run
from .statistics import against_chance, clusters, kinship, rand_index

__all__ = ["best_routed", "look"]


def best_routed(plan: Plan, table: str = "main") -> str:
    """The line of ours with the highest test accuracy in a table, mean over the seeds that all of them have."""
    found = {line: a for line, a in multi_task(plan, table).items() if MANY[line].method.kind == "poly"}
    seeds = set.intersection(*(set(accuracies) for accuracies in found.values())) if found else set()
    if not seeds:
        return ""
    return max(found, key=lambda line: fmean(fmean(found[line][seed].values()) for seed in seeds))


def look(run: Run, plan: Plan, line: str, picture: Path) -> list[dict[str, Any]]:
    """A row for each seed of a line; what is alike in the first one goes into `picture`.

    Families are what names begin with (`data.families`), among the tasks that have kin; categories are what the rows
    say, among those that have company.
    """
    rows: list[dict[str, Any]] = []
    for unit in plan.store.done:
        if unit.setup != plan.setup or unit.stage != "many" or unit.line != line:
            continue
        if not run.file(line, unit.rates, unit.seed, unit.steps).exists():
            continue
        routing = read_routing(run.adapter(line, unit.rates, unit.seed, unit.steps).model)
        if not rows:
            plot_routing(routing, picture)
        metrics = mean_metrics(routing)
        row = {
            "method": line,
            "seed": unit.seed,
            "skills used": f"{metrics.effective_skills:.1f} of {routing.shape[2]}",
        }
        similarity = task_similarity(routing).numpy()
        for kind, label in (("family", families(routing.task_names)), ("category", run.tasks.category)):
            row |= _fits(kind, similarity, [label.get(name, "") for name in routing.task_names])
        rows.append(row)
    return rows


def _fits(kind: str, similarity: np.ndarray, labels: list[str]) -> dict[str, str]:
    """Two numbers for the tasks that have kin: does the tree find the families, and are kin more alike?"""
    kept = [n for n, label in enumerate(labels) if label and labels.count(label) > 1]
    kinds = [labels[n] for n in kept]
    if len(set(kinds)) < 2:
        return {}
    part = similarity[np.ix_(kept, kept)]
    found = clusters(part, len(set(kinds)))
    rand = against_chance(lambda families: rand_index(found, families), kinds)
    kin = against_chance(lambda families: kinship(part, families), kinds)
    return {
        f"{kind}: adjusted Rand index (95 % of chance; p)": f"{rand.value:.2f} ({rand.high:.2f}; {rand.p:.2g})",
        f"{kind}: kin nearer than others (95 % of chance; p)": f"{kin.value:.2f} ({kin.high:.2f}; {kin.p:.2g})",
    }
