"""The lines of the tables: ways to learn many tasks, and ways to meet one more; what each is tuned over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..quality.methods import Method
from ..quality.rates import Rates

__all__ = ["CURES", "LINES", "MORE", "REFERENCE", "RIVALS", "ROUTED", "WAYS", "Line", "Way"]

NONE = Rates()
REFERENCE = "one shared LoRA"
TOLD, EACH = "the same, told the name", "a LoRA per task"


@dataclass(frozen=True)
class Line:
    """A method that learns all tasks.

    Attributes:
        method: what is built; None: each task's commonest class, without a model.
        rates, steps: what it uses if nothing is tuned.
        grid: the rates that are tried on held-out training rows.
        like: the line whose rates it takes; its steps are its own. Empty: the grid is tried.
        told: whether a text has the name of its task in it.
        own: what each task adds to the head that all share: nothing, a bias, or a head.
        decay: how fast router rows go back to their mean, in their rate; 0 for not at all.
    """

    method: Method | None
    rates: Rates = NONE
    steps: int = 0
    grid: tuple[Rates, ...] = ()
    like: str = ""
    told: bool = False
    own: str = ""
    decay: float = 0.0


@dataclass(frozen=True)
class Way:
    """A way to meet a task that the adapter has not seen.

    Attributes:
        source: the line whose trained adapter it starts from.
        init: where the new router row starts: mean or nearest; empty without a router.
        verb: what learns: train_all, train_router_only; empty for nothing.
        rates, steps: what it uses if nothing is tuned.
        grid: the rates that are tried, on new tasks that no table has.
    """

    source: str
    init: str = ""
    verb: str = ""
    rates: Rates = NONE
    steps: int = 0
    grid: tuple[Rates, ...] = ()


def _grid(lrs: tuple[float, ...], router_lrs: tuple[float, ...] = (0.0,), scale: float = 1.0) -> tuple[Rates, ...]:
    return tuple(Rates(lr, router_lr, scale) for router_lr in router_lrs for lr in lrs)


def _routed(scale: float) -> tuple[Rates, ...]:
    return Rates(1e-3, 0.03, scale), Rates(3e-3, 0.1, scale)


_lora = Line(Method("lora", r=0), Rates(1e-3, 0, 1), 400, _grid((1e-3, 3e-3)))
_poly = Line(Method("poly", noise=False), Rates(1e-3, 0.03, 8), 400, _routed(8.0))
_gates = Line(Method("gates", r=24), Rates(1e-3, 0.03, 1), 400, _routed(1.0))


def _variant(of: Line, like: str, **changes: Any) -> Line:
    return replace(of, like=like, grid=(), **changes)


_mhr = Method("poly", splits=4, noise=False)


# At a LoRA's rate a bias, one number, hardly moves: it has a rate of its own, as routers have.
_BIASES = (*_grid((1e-3, 3e-3)), *_grid((1e-3,), (0.01, 0.03, 0.1)), Rates(3e-3, 0.03, 1))


LINES = {
    "the task's commonest class": Line(None),
    REFERENCE: _lora,
    TOLD: _variant(_lora, REFERENCE, told=True),
    EACH: Line(Method("per task"), Rates(3e-3, 0, 1), 400, _grid((3e-3, 1e-2))),
    "a bias per task on a shared LoRA": replace(_lora, own="bias", grid=_BIASES),
    "a head per task on a shared LoRA": _variant(_lora, REFERENCE, own="head"),
    "Poly": _poly,
    "MHR, 4 splits": _variant(_poly, "Poly", method=_mhr),
    "MHR, one router": _variant(_poly, "Poly", method=replace(_mhr, granularity="model")),
    "gates": _gates,
    "gates with a head per task": _variant(_gates, "gates", own="head"),
    "Poly, noise": _variant(_poly, "Poly", method=Method("poly", noise=True)),
    "Poly, rows decay to their mean": _variant(_poly, "Poly", decay=0.1),
    "gates, rows decay to their mean": _variant(_gates, "gates", decay=0.1),
    "gates, one router": _variant(_gates, "gates", method=Method("gates", r=24, granularity="model")),
    "Poly, router at 0.1": replace(_poly, grid=(Rates(1e-3, 0.1, 8),)),
    "gates, router at 0.1": replace(_gates, grid=(Rates(1e-3, 0.1, 1),)),
    "Poly, router at 0.01": replace(_poly, grid=(Rates(1e-3, 0.01, 8),)),
    "gates, router at 0.01": replace(_gates, grid=(Rates(1e-3, 0.01, 1),)),
    "Poly, bias per task": _variant(_poly, "Poly", own="bias"),
    "gates, bias per task": _variant(_gates, "gates", own="bias"),
    "Poly, router at 0.3": replace(_poly, grid=(Rates(1e-3, 0.3, 8),)),
    "gates, router at 0.3": replace(_gates, grid=(Rates(1e-3, 0.3, 1),)),
}
RECOMMENDED = ("Poly, router at 0.1", "gates, router at 0.1")  # with the settings that users get
CURES = tuple(line for line in LINES if line.startswith(("Poly, ", "gates, ")) and line not in RECOMMENDED)
MORE = tuple(line for line in LINES if line.startswith("MHR") or line == "gates with a head per task")  # fewer seeds
ROUTED = tuple(line for line in LINES if line.startswith(("Poly", "MHR", "gates")))
RIVALS = (REFERENCE, TOLD, EACH)  # what routing has to beat

_z = Way("Poly", "mean", "train_router_only", Rates(0, 0.1), 30, _grid((0.0,), (0.1, 0.3), 0.0))
_all = Way("Poly", "mean", "train_all", Rates(3e-4, 0.03), 30, _grid((3e-4, 1e-3), (0.1,), 0.0))
WAYS = {
    "before: shared LoRA": Way(REFERENCE),
    "before: Poly, mean row": Way("Poly", "mean"),
    "before: gates, mean row": Way("gates", "mean"),
    "shared LoRA, trained on": Way(REFERENCE, "", "train_all", Rates(3e-4), 30, _grid((3e-4, 1e-3), scale=0.0)),
    "Poly-z, row of the mean": _z,
    "Poly, all": _all,
    "gates-z, row of the mean": replace(_z, source="gates"),
    "gates-z, row of the nearest": replace(_z, source="gates", init="nearest"),
    "gates, all": replace(_all, source="gates"),
}
