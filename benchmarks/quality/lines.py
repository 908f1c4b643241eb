"""The lines of the tables: methods that learn all tasks, and ways to meet a new one; which rates each is tuned over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .methods import SKILLS, Method, R
from .rates import Rates

__all__ = [
    "BARE_REFERENCE",
    "BEST",
    "BESTS",
    "DEEP_REFERENCE",
    "FEW",
    "FEW_REFERENCE",
    "FEW_REFERENCES",
    "FEW_SHOWN",
    "MANY",
    "MATTER",
    "OTHER_SIZES",
    "REFERENCE",
    "REFERENCES",
    "SHOWN",
    "SKILL_SIZED",
    "Line",
    "Way",
]


NONE, NO_ADAPTER = Rates(), Method("none")


@dataclass(frozen=True)
class Line:
    """A method of the multi-task table.

    Attributes:
        method: what is built.
        rates: what it uses if nothing is tuned.
        grid: what is tried on validation rows.
        like: the line whose rates it takes; empty for its own.
        times: how many times the steps of the others.
        all_layers: whether it adapts all layers of the encoder, not only the upper ones.
        instruction: whether a text begins with the instruction of its task.
    """

    method: Method
    rates: Rates = NONE
    grid: tuple[Rates, ...] = ()
    like: str = ""
    times: int = 1
    all_layers: bool = False
    instruction: bool = True

    @property
    def table(self) -> str:
        """Which one it belongs to: main, long or longer (more steps), deep (all layers), bare (no instruction)."""
        if self.times > 1:
            return {3: "long", 9: "longer"}[self.times]
        return "deep" if self.all_layers else "main" if self.instruction else "bare"


@dataclass(frozen=True)
class Way:
    """A way to meet a new task from a few rows.

    Attributes:
        source: the line whose adapter it starts from; empty for none.
        method: what is built where there is no source.
        init: where the new router row starts: mean, uniform, nearest; empty without a router.
        verb: what of the adapter learns: train_all, train_router_only, average_skills; empty for a LoRA.
        learns: False for the score before any training.
        rates: what it uses if nothing is tuned.
        grid: what is tried on validation rows of the new tasks.
        like: the way whose rates it takes; empty for its own.
    """

    source: str = ""
    method: Method = NO_ADAPTER
    init: str = ""
    verb: str = ""
    learns: bool = True
    rates: Rates = NONE
    grid: tuple[Rates, ...] = ()
    like: str = ""

    @property
    def table(self) -> str:
        """Which one it belongs to: main, or that of adapters that were trained longer."""
        return MANY[self.source].table if self.source else "main"


def _grid(
    lrs: tuple[float, ...], router_lrs: tuple[float, ...] = (0.0,), scales: tuple[float, ...] = (1.0,)
) -> tuple[Rates, ...]:
    return tuple(Rates(lr, router_lr, scale) for scale in scales for router_lr in router_lrs for lr in lrs)


REFERENCE = "shared LoRA"  # what the others are compared with
DEEP_REFERENCE = f"{REFERENCE}, all layers"
BARE_REFERENCE = f"{REFERENCE}, no instruction"
REFERENCES = {  # by table
    "main": REFERENCE,
    "long": f"{REFERENCE}, 3 x the steps",
    "longer": f"{REFERENCE}, 9 x the steps",
    "deep": DEEP_REFERENCE,
    "bare": BARE_REFERENCE,
}
BEST = "MHR, 4 splits"  # what the variants are variants of
BESTS = {"main": BEST, "longer": f"{BEST}, 9 x the steps"}  # by table
SKILL_SIZED = "shared LoRA, rank of one skill"
_SIZES = ("", ", 3 x the steps", ", 9 x the steps")
OTHER_SIZES = ("no adapter", *(f"{SKILL_SIZED}{times}" for times in _SIZES), "no adapter, no instruction")
# All others fit the budget. With more seeds, after the longest training:
MATTER = tuple(f"{line}, 9 x the steps" for line in (REFERENCE, "LoRA per task", BEST, "gates"))

_mhr = Method("poly", splits=4, noise=False)
_GRID = _grid((3e-3,), (0.03, 0.1, 0.3, 1.0), (8.0,)) + _grid((1e-3,), (0.3,), (8.0,))
_routed = Line(_mhr, Rates(3e-3, 0.3, 8), _GRID)
_variant = replace(_routed, grid=(), like=BEST)

MANY = {
    "no adapter": Line(Method("none")),
    "LoRA per task": Line(Method("per task"), Rates(3e-3, 0, 4), _grid((1e-3, 3e-3, 1e-2), scales=(4.0,))),
    SKILL_SIZED: Line(Method("lora"), Rates(3e-3, 0, 8), _grid((1e-3, 3e-3, 6e-3), scales=(8.0,))),
    REFERENCE: Line(Method("lora", r=0), Rates(3e-3, 0, 1), _grid((1e-3, 3e-3, 6e-3))),
    "PEFT's Poly, published recipe": Line(Method("peft poly", splits=4), Rates(5e-5)),
    "Poly": replace(_routed, method=replace(_mhr, splits=1)),
    BEST: _routed,
    "MHR, 8 splits": replace(_routed, method=replace(_mhr, splits=8)),
    "gates": Line(Method("gates", r=R * SKILLS), Rates(3e-3, 0.03, 1), _grid((1e-3, 3e-3), (0.03, 0.1))),
    "MHR, one rate": Line(_mhr, Rates(3e-3, 0, 8), _grid((1e-3, 3e-3, 6e-3, 1e-2), scales=(8.0,))),
    "MHR, scale 1": Line(_mhr, Rates(1e-2, 0.3, 1), _grid((3e-3, 1e-2, 3e-2), (0.3,))),
    "MHR, noise": replace(_variant, method=replace(_mhr, noise=True)),
    'MHR, init_weights="mhr"': replace(_variant, method=replace(_mhr, init="mhr")),
    "MHR, router per block": replace(_variant, method=replace(_mhr, granularity="block")),
    "MHR, router for the model": replace(_variant, method=replace(_mhr, granularity="model")),
}


def _under(other: str, condition: dict[str, Any], *lines: str) -> dict[str, Line]:
    """The same lines under another condition, with the rates that they have without it."""
    return {f"{line}, {other}": replace(MANY[line], grid=(), like=line, **condition) for line in lines}


_four = (REFERENCE, "LoRA per task", "Poly", BEST)
MANY |= {
    **_under("3 x the steps", {"times": 3}, *_four, "gates", SKILL_SIZED),
    **_under("9 x the steps", {"times": 9}, *_four, "gates", SKILL_SIZED),
    **_under("all layers", {"all_layers": True}, REFERENCE, BEST),
    **_under("no instruction", {"instruction": False}, "no adapter", *_four),
}

_all = Way(BEST, init="mean", verb="train_all", rates=Rates(1e-3, 0.1), grid=_grid((3e-4, 1e-3, 3e-3), (0.1,), (0.0,)))
_z = Way(
    BEST, init="mean", verb="train_router_only", rates=Rates(0, 0.3), grid=_grid((0.0,), (0.1, 0.3, 1.0, 3.0), (0.0,))
)
_mu = Way(
    BEST, init="mean", verb="average_skills", rates=Rates(1e-3), grid=_grid((3e-4, 1e-3, 3e-3, 1e-2), scales=(0.0,))
)
_zero = Way(BEST, init="mean", verb="train_router_only", learns=False)
FEW_REFERENCE = "shared LoRA, trained on"
FEW_REFERENCES = {"main": FEW_REFERENCE, "longer": f"{FEW_REFERENCE}, 9 x the steps"}  # by table

FEW = {
    "before: no adapter": Way(learns=False),
    "before: shared LoRA": Way(REFERENCE, learns=False),
    "before: MHR, row of the mean": _zero,
    "before: MHR, average of the skills": replace(_zero, verb="average_skills"),
    "LoRA from scratch": Way(method=Method("lora", r=0), rates=Rates(1e-3, 0, 1), grid=_grid((3e-4, 1e-3, 3e-3, 1e-2))),
    FEW_REFERENCE: Way(REFERENCE, rates=Rates(1e-3), grid=_grid((3e-4, 1e-3, 3e-3), scales=(0.0,))),
    "Poly": replace(_all, source="Poly"),
    "Poly-z": replace(_z, source="Poly"),
    "Poly-mu": replace(_mu, source="Poly"),
    "MHR, row of the mean": _all,
    "MHR, row uniform": replace(_all, init="uniform", grid=(), like="MHR, row of the mean"),
    "MHR, row of the nearest task": replace(_all, init="nearest", grid=(), like="MHR, row of the mean"),
    "MHR-z, row of the mean": _z,
    "MHR-z, row uniform": replace(_z, init="uniform", grid=(), like="MHR-z, row of the mean"),
    "MHR-z, row of the nearest task": replace(_z, init="nearest", grid=(), like="MHR-z, row of the mean"),
    "MHR-mu": _mu,
}
FEW |= {
    f"{way}, 9 x the steps": replace(FEW[way], source=f"{FEW[way].source}, 9 x the steps", grid=(), like=way)
    for way in (
        "before: shared LoRA",
        "before: MHR, row of the mean",
        FEW_REFERENCE,
        "MHR, row of the mean",
        "MHR-z, row of the mean",
        "MHR-mu",
    )
}

# Task by task, in the documentation.
FEW_SHOWN = [
    "before: no adapter",
    "before: shared LoRA",
    "LoRA from scratch",
    FEW_REFERENCE,
    "MHR, row of the mean",
    "MHR-z, row of the mean",
    "MHR-mu",
]
SHOWN = ["no adapter", "LoRA per task", SKILL_SIZED, REFERENCE, "Poly", BEST, "MHR, 8 splits", "gates"]
