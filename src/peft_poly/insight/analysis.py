"""Numbers that say what a router has learned: who uses which skill, how decided it is, which tasks are alike.

    read_routing(model or folder) ─▶ Routing ─┬─▶ task_skill_matrix, top_skills
                                              ├─▶ layer_metrics, mean_metrics
                                              └─▶ task_similarity, task_linkage ─▶ plots, report

Letters: t task, h split, k skill. All numbers are those of eval mode: `p = sigmoid(z)`, `w = p / sum_k p`.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any, Optional, Union

import torch

from ..checkpoints.reading import Routing, read_routing

__all__ = [
    "Metrics",
    "Routing",
    "effective_skills",
    "layer_metrics",
    "mean_metrics",
    "nearest_tasks",
    "read_routing",
    "task_linkage",
    "task_order",
    "task_similarity",
    "task_skill_matrix",
    "top_skills",
]


TINY = 1e-300  # where all of a router's probabilities have underflowed, there is nothing to divide


@dataclass(frozen=True)
class Metrics:
    """How one router, or the mean of them, spreads tasks over skills (the quantities of the papers' code).

    Attributes:
        discreteness: mean binary entropy of p, divided by log 2: 0 if every choice is taken, 1 if none is.
        sparsity: share of p above 0.5; the fewer, the sparser.
        usage: entropy of the skills' shares of all p, divided by log k: 1 if all skills are used alike. Mean over
            splits.
        effective_skills: exp of the entropy of a task's mixing weights, mean over tasks and splits: from 1 (one skill
            per task) to k (all alike).
    """

    discreteness: float
    sparsity: float
    usage: float
    effective_skills: float


def task_skill_matrix(routing: Routing, layer: Optional[str] = None, split: Optional[int] = None) -> torch.Tensor:
    """Mixing weights `(t, k)`, float64, rows summing to 1: of one layer or the mean of all, of one split or the mean.

    Skill 3 of one layer has nothing to do with skill 3 of another; a mean over layers that looks flat may hide layers
    that are not.

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
    """Cosine of the tasks' mixing weights, all layers and splits in one vector.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `(t, t)`, float64, in (0, 1], with ones on the diagonal.
    """
    gram = torch.zeros(routing.shape[0], routing.shape[0], dtype=torch.float64)
    for weights in routing.weights.values():  # layer by layer, for the whole vector can be long
        rows = weights.double().flatten(1)
        gram += rows @ rows.T
    norm = gram.diagonal().sqrt()
    similarity = (gram / (norm[:, None] * norm).clamp_min(TINY)).clamp(0, 1)
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
        raise ImportError("A tree of tasks needs scipy. Run: pip install 'peft-poly[plot]'") from error
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


def layer_metrics(routing: Routing) -> dict[str, Metrics]:
    """Discreteness, sparsity, usage and effective number of skills of each layer's router.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `{layer: Metrics}`, in the order of `routing.layers`.
    """
    return {key: _measure(routing.probabilities[key], weights) for key, weights in routing.weights.items()}


def mean_metrics(routing: Routing) -> Metrics:
    """The mean of `layer_metrics` over the layers.

    Args:
        routing: what `read_routing` returned.
    """
    rows = [astuple(metrics) for metrics in layer_metrics(routing).values()]
    return Metrics(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def effective_skills(routing: Routing) -> torch.Tensor:
    """How many skills each task mixes: exp of the entropy of its weights, mean over layers and splits.

    Args:
        routing: what `read_routing` returned.

    Returns:
        `(t,)`, float64, from 1 to k.
    """
    return torch.stack([_effective(weights).mean(dim=1) for weights in routing.weights.values()]).mean(dim=0)


def top_skills(routing: Routing, task: Union[int, str], n: int = 3) -> list[tuple[int, float]]:
    """The skills that weigh most for a task in `task_skill_matrix`.

    Args:
        routing: what `read_routing` returned.
        task: name or id of the task.
        n: how many, at most.

    Returns:
        `(skill, weight)` pairs, heaviest first.

    Raises:
        ValueError: there is no such task.
    """
    row = task_skill_matrix(routing)[routing.task_id(task)]
    heaviest = row.argsort(descending=True, stable=True)[:n].tolist()
    return [(skill, row[skill].item()) for skill in heaviest]


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


def _measure(probabilities: torch.Tensor, weights: torch.Tensor) -> Metrics:
    p, k = probabilities.double(), probabilities.shape[-1]
    shares = p.sum(dim=0) / p.sum(dim=(0, 2))[:, None].clamp_min(TINY)  # (h, k)
    return Metrics(
        discreteness=((_surprise(p) + _surprise(1 - p)).mean() / math.log(2)).item(),
        sparsity=(p > 0.5).double().mean().item(),
        usage=(_surprise(shares).sum(dim=-1).mean() / math.log(k)).item() if k > 1 else 1.0,
        effective_skills=_effective(weights).mean().item(),
    )


def _effective(weights: torch.Tensor) -> torch.Tensor:
    """`(t, h, k) -> (t, h)`."""
    return _surprise(weights.double()).sum(dim=-1).exp()


def _surprise(p: torch.Tensor) -> torch.Tensor:
    """`-p log p`, 0 at 0."""
    return -torch.special.xlogy(p, p)
