"""What a comparison says, in words."""

from __future__ import annotations

from .comparison import MAJORITY, Comparison
from .learning.methods import METHODS, Method
from .statistics import Interval

__all__ = ["points", "verdict"]

LEVEL = 0.02  # two points of accuracy: a difference that is surely smaller is none


def verdict(comparison: Comparison) -> str:
    """Whether routing pays on these tasks, by how much, and what to do.

    Routing pays if the routed method that did best on validation rows is ahead of every rival, each interval above 0.
    It does not if one of them is ahead of it, and of the other routed methods too. Else the simplest of those that it
    is not ahead of is advised, either because it does as well, within two points, or because the rows do not tell.
    """
    routed = max((m for m in METHODS if m.routed), key=lambda method: comparison.validation(method.name))
    best = max(METHODS, key=lambda method: comparison.validation(method.name))
    learnt = comparison.difference(best.name, MAJORITY)
    if not _is_ahead(learnt):
        return (
            f"Nothing was learnt that the commonest label does not say: {best.name} is {points(learnt)} points from it."
            " More training rows, more epochs or another encoder come before the choice of a method."
        )
    rivals = {m: comparison.difference(routed.name, m.name) for m in METHODS if not m.routed}
    ahead = [method for method, found in rivals.items() if _is_ahead(_turned(found))]
    level = [method for method, found in rivals.items() if not _is_ahead(found) and method not in ahead]
    if ahead:
        winner = max(ahead, key=lambda method: comparison.validation(method.name))
        for other in METHODS:  # which of the routed did best on validation rows may be a matter of one row
            if other.routed and not _is_ahead(found := comparison.difference(winner.name, other.name)):
                return _simplest(other, winner, _turned(found))
        return (
            f"For these tasks routing does not pay: {winner.name} is ahead of {routed.name} by "
            f"{points(_turned(rivals[winner]))} points. So {winner.advice}."
        )
    if level:
        return _simplest(routed, level[0], rivals[level[0]])
    nearest = min(rivals, key=lambda method: rivals[method].low)
    return (
        f"For these tasks routing pays: {routed.name} is ahead of every rival, of the nearest, {nearest.name}, by "
        f"{points(rivals[nearest])} points. So {routed.advice}."
    )


def _simplest(routed: Method, rival: Method, difference: Interval) -> str:
    if difference.low > -LEVEL and difference.high < LEVEL:
        return (
            f"For these tasks {rival.name} does as well: {routed.name} is {points(difference)} points from it. So "
            f"{rival.advice}."
        )
    return (
        f"These test rows do not tell {routed.name} from {rival.name}: it is {points(difference)} points from it. "
        f"Until more test rows or seeds decide, take the simpler: {rival.advice}."
    )


def _is_ahead(difference: Interval) -> bool:
    """Whether the interval is above 0 as it is printed: `+0.0` says that it is not."""
    return round(100 * difference.low, 1) > 0


def points(interval: Interval) -> str:
    """`+1.2 (95 % interval -0.3 to +2.6)`, in points of per cent."""
    return f"{100 * interval.mean:+.1f} (95 % interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def _turned(interval: Interval) -> Interval:
    return Interval(-interval.mean, -interval.high, -interval.low)
