"""Numbers that say what a router has learned: who uses which skill, how decided it is, which tasks are alike; with
gates: which ranks a task turns up, down or around, and how far.

    read_routing(model or folder) ─▶ Routing ─┬─▶ task_skill_matrix, top_skills
                                              ├─▶ layer_metrics, mean_metrics
                                              └─▶ task_similarity, task_linkage ─▶ plots, report

Letters: t task, h split, k skill. All numbers are those of eval mode: `p = sigmoid(z)`, `w = p / sum_k p`. With gates
the weights are the gates `g = 1 + z`, h is 1 and k the rank.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, Optional, Union

import torch

from ..checkpoints.reading import Routing, read_routing
from .measures import TINY, GateMetrics, Metrics, effective, measure

__all__ = [
    "GateMetrics",
    "Metrics",
    "Routing",
    "effective_skills",
    "layer_metrics",
    "mean_metrics",
    "nearest_tasks",
    "nothing_routed",
    "read_routing",
    "task_linkage",
    "task_order",
    "task_similarity",
    "task_skill_matrix",
    "top_skills",
]


def task_skill_matrix(routing: Routing, layer: Optional[str] = None, split: Optional[int] = None) -> torch.Tensor:
    """Mixing weights `(t, k)`, float64, rows summing to 1: of one layer or the mean of all, of one split or the mean.
    With gates: the gates `(t, r)`.

    Skill (rank) 3 of one layer has nothing to do with skill 3 of another; a mean over layers that looks flat may hide
    layers that are not.

    Args:
        routing: what `read_routing` returned.
        layer: name of one layer. Default: the mean of all.
        split: number of one split, from 0. Default: the mean of all.

    Raises:
        ValueError: there is no such layer or split.
    """
    if layer is not None and layer not in routing.weights:
        raise ValueError(f"There is no layer {layer!r} with a router. There are: {', '.join(routing.layers)}.")
    if split is not None and not 0 <= split < routing.shape[1]:
        raise ValueError(f"`split` must lie in [0, {routing.shape[1] - 1}], got {split}.")
    weights = list(routing.weights.values()) if layer is None else [routing.weights[layer]]
    mean = torch.stack([w.double().mean(dim=1) if split is None else w[:, split].double() for w in weights])
    return mean.mean(dim=0)


def task_similarity(routing: Routing) -> torch.Tensor:
    """Cosine of the tasks' mixing weights (gates), all layers and splits in one vector.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `(t, t)`, float64, with ones on the diagonal; in (0, 1], with gates, which may be negative, in [-1, 1].
    """
    gram = torch.zeros(routing.shape[0], routing.shape[0], dtype=torch.float64)
    for weights in routing.weights.values():  # layer by layer, for the whole vector can be long
        rows = weights.double().flatten(1)
        gram += rows @ rows.T
    norm = gram.diagonal().sqrt()
    similarity = (gram / (norm[:, None] * norm).clamp_min(TINY)).clamp(-1, 1)
    return similarity.fill_diagonal_(1)


def task_linkage(routing: Routing, method: str = "average") -> Any:
    """Hierarchical clustering of the tasks by the distance `1 - cosine`.

    Args:
        routing: what `read_routing` returned.
        method: scipy's name of the way to cluster.

    Returns:
        scipy's linkage matrix, a float64 array `(t - 1, 4)`.

    Raises:
        ImportError: scipy is missing.
        ValueError: there is only one task.
    """
    if routing.shape[0] < 2:
        raise ValueError("A tree of tasks needs at least two of them, got one.")
    try:
        from scipy.cluster import hierarchy
    except ImportError as error:
        raise ImportError("A tree of tasks needs scipy. Run: pip install matplotlib scipy") from error
    upper = torch.triu_indices(routing.shape[0], routing.shape[0], offset=1)
    distances = 1 - task_similarity(routing)[upper[0], upper[1]]
    return hierarchy.linkage(distances.numpy(), method=method, optimal_ordering=routing.shape[0] <= 200)


def task_order(routing: Routing) -> list[int]:
    """Task ids in the order of the tree's leaves, like tasks side by side; one task needs no tree.

    Args:
        routing: what `read_routing` returned.

    Returns:
        All `t` ids, once each.

    Raises:
        ImportError: scipy is missing.
    """
    if routing.shape[0] < 2:
        return [0]
    linkage = task_linkage(routing)
    from scipy.cluster import hierarchy

    return hierarchy.leaves_list(linkage).tolist()


def layer_metrics(routing: Routing) -> dict[str, Union[Metrics, GateMetrics]]:
    """What is measured of each layer's router.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `{layer: Metrics}`, with gates `{layer: GateMetrics}`, in the order of `routing.layers`.
    """
    return {key: measure(routing.kind, w, routing.probabilities.get(key)) for key, w in routing.weights.items()}


def mean_metrics(routing: Routing) -> Union[Metrics, GateMetrics]:
    """The mean of `layer_metrics` over the layers.

    Args:
        routing: what `read_routing` returned.
    """
    measured = list(layer_metrics(routing).values())
    columns = zip(*map(astuple, measured), strict=True)
    return type(measured[0])(*(sum(column) / len(measured) for column in columns))


def effective_skills(routing: Routing) -> torch.Tensor:
    """How many skills each task mixes: exp of the entropy of its weights, mean over layers and splits. With gates: how
    many ranks it uses, by the squares of its gates.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `(t,)`, float64, from 1 to k.
    """
    return torch.stack([effective(routing.kind, w).mean(dim=1) for w in routing.weights.values()]).mean(dim=0)


def top_skills(routing: Routing, task: Union[int, str], n: int = 3) -> list[tuple[int, float]]:
    """The skills that weigh most for a task in `task_skill_matrix`; with gates the ranks whose gates are furthest from
    one.

    Args:
        routing: what `read_routing` returned.
        task: name or id of the task.
        n: how many, at most.

    Returns:
        `(skill, weight)` or `(rank, gate)` pairs, heaviest (furthest) first.

    Raises:
        ValueError: there is no such task.
    """
    return top_columns(routing, task_skill_matrix(routing)[routing.task_id(task)], n)


def top_columns(routing: Routing, row: torch.Tensor, n: int = 3) -> list[tuple[int, float]]:
    """`top_skills` of one row `(k,)` of a `task_skill_matrix`."""
    told = (row - (routing.kind.centre or 0.0)).abs()
    return [(column, row[column].item()) for column in told.argsort(descending=True, stable=True)[:n].tolist()]


def span(routing: Routing, matrix: torch.Tensor) -> tuple[float, float]:
    """The least and the greatest weight that the colours of a heat map have room for.

    They run from 0 to the largest weight, at least to twice an even share, so that a router that has not decided looks
    pale and even; with gates as far below one as above it, at least 0.1.
    """
    centre = routing.kind.centre
    if centre is None:
        return 0.0, min(1.0, max(matrix.max().item(), 2 / matrix.shape[1]))
    reach = max((matrix - centre).abs().max().item(), 0.1)
    return centre - reach, centre + reach


def farthest(routing: Routing) -> float:
    """The greatest distance `1 - cosine` that two tasks can have: gates can point away from each other."""
    return 1.0 if routing.kind.centre is None else 2.0


def sizes(routing: Routing) -> dict[str, Any]:
    """How much of what the adapter has; the rank is None where the config is not known."""
    t, h, k = routing.shape
    if routing.kind.centre is not None:
        return {"tasks": t, "rank": k}
    return {"tasks": t, "skills": k, "splits": h, "rank": getattr(routing.config, "r", None)}


def nothing_routed(routing: Routing) -> Optional[str]:
    """What a reader of tables should know first, where all tasks mix the one skill alike; None elsewhere."""
    if routing.kind.centre is not None or routing.shape[2] > 1:
        return None
    return (
        "There is one skill, so nothing is routed: every task computes the same LoRA. Where tasks have heads or labels "
        "of their own, these are what tells them apart."
    )


def nearest_tasks(routing: Routing, task: Union[int, str], n: int = 3) -> list[tuple[str, float]]:
    """The other tasks most like a task, by `task_similarity`.

    Args:
        routing: what `read_routing` returned.
        task: name or id of the task.
        n: how many, at most.

    Returns:
        `(name, cosine)` pairs, nearest first.

    Raises:
        ValueError: there is no such task.
    """
    task_id = routing.task_id(task)
    row = task_similarity(routing)[task_id]
    order = [other for other in row.argsort(descending=True, stable=True).tolist() if other != task_id]
    return [(routing.task_names[other], row[other].item()) for other in order[:n]]
