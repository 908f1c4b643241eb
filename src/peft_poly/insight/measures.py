"""What is measured of one router: of mixing weights how decided they are, of gates how far they are from one.

Letters: t task, h split, k skill (of gates: rank).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch

from ..compute.kinds import Kind

__all__ = ["GateMetrics", "Metrics", "effective", "measure"]

TINY = 1e-300  # where all of a router's numbers have underflowed, there is nothing to divide


def _shown(heading: str, meaning: str, digits: int = 3) -> Any:
    """A number, with its heading in a narrow table, what it means, and how many of its digits are shown."""
    return field(metadata={"heading": heading, "meaning": meaning, "digits": digits})


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

    discreteness: float = _shown("discrete-\nness", "binary entropy of the probabilities / log 2: 0 decided, 1 not")
    sparsity: float = _shown("spar-\nsity", "share of the probabilities above 0.5")
    usage: float = _shown("usage", "entropy of the skills' shares / log of their number: 1 all alike")
    effective_skills: float = _shown(
        "effec-\ntive", "how many skills a task mixes, exp of the entropy of its weights", 2
    )


@dataclass(frozen=True)
class GateMetrics:
    """How far the gates of one layer, or the mean of them, are from one, and how much of that tells tasks apart.

    Attributes:
        distance: root mean square of `g - 1`: 0 at the start, where every task is the shared LoRA.
        between: the share of the mean square of `g - 1` that differs between tasks: 0 if all tasks have the same
            gates, 1 if the mean of the tasks' gates is one.
        negative: share of gates below 0, ranks that a task turns around.
        effective_ranks: exp of the entropy of a task's squared gates, mean over tasks: from 1 (one rank per task) to
            r (all alike).
    """

    distance: float = _shown("distance", "root mean square of what gates differ from 1 by")
    between: float = _shown("between", "share of that (squared) that differs between tasks: 0 none, 1 all")
    negative: float = _shown("nega-\ntive", "share of gates below 0")
    effective_ranks: float = _shown(
        "effec-\ntive", "how many ranks a task uses, exp of the entropy of its squared gates", 2
    )


def measure(kind: Kind, weights: torch.Tensor, probabilities: Optional[torch.Tensor]) -> Union[Metrics, GateMetrics]:
    """What is measured of a router of this kind.

    Args:
        kind: of the adapter.
        weights: `(t, h, k)`.
        probabilities: `(t, h, k)`; None where there are none.
    """
    if probabilities is not None:
        return _of_mixtures(kind, weights, probabilities.double())
    away = weights.double() - (kind.centre or 0.0)
    square, common = away.square().mean(), away.mean(dim=0).square().mean()
    return GateMetrics(
        distance=square.sqrt().item(),
        between=((square - common).clamp_min(0) / square.clamp_min(TINY)).item(),
        negative=(weights < 0).double().mean().item(),
        effective_ranks=effective(kind, weights).mean().item(),
    )


def _of_mixtures(kind: Kind, weights: torch.Tensor, p: torch.Tensor) -> Metrics:
    k = p.shape[-1]
    shares = p.sum(dim=0) / p.sum(dim=(0, 2))[:, None].clamp_min(TINY)  # (h, k)
    return Metrics(
        discreteness=((_surprise(p) + _surprise(1 - p)).mean() / math.log(2)).item(),
        sparsity=(p > 0.5).double().mean().item(),
        usage=(_surprise(shares).sum(dim=-1).mean() / math.log(k)).item() if k > 1 else 1.0,
        effective_skills=effective(kind, weights).mean().item(),
    )


def effective(kind: Kind, weights: torch.Tensor) -> torch.Tensor:
    """How many skills (ranks) a task uses: `(t, h, k) -> (t, h)`, float64, from 1 to k."""
    shares = weights.double()
    if kind.centre is not None:  # signed, and with any sum
        shares = shares.square()
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(TINY)
    return _surprise(shares).sum(dim=-1).exp()


def _surprise(p: torch.Tensor) -> torch.Tensor:
    """`-p log p`, 0 at 0."""
    return -torch.special.xlogy(p, p)
