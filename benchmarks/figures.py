"""The figures of a case: its work done in turn by the variants, and what comes out held against the bars."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case, Claim
from .measuring import median, median_ratio, paired, peak_bytes, saved_bytes
from .models import SHAPES, make_inputs, make_task_ids
from .variants import Variant, Variants, kinds_here

__all__ = ["DIFFERENCE", "Figures", "measure", "variants_of"]

TOKENS = 24  # to decode
DIFFERENCE = 1e-4  # the most that outputs of the same work may differ


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        case: the work.
        base: milliseconds or megabytes of the bare model.
        over: cost of each variant over the bare model's.
        claims: the case's bars and what they are held against.
        rounds: how often each variant ran in turn.
        load: of the machine.
        difference: the largest between outputs of ours and of those that compute the same; None: nothing to compare.
    """

    case: Case
    base: float
    over: dict[str, float]
    claims: list[Claim]
    rounds: int
    load: float
    difference: float | None = None

    @property
    def unit(self) -> str:
        return "MB" if self.case.mode in ("saved", "peak") else "ms"


def variants_of(case: Case) -> Variants:
    shape = SHAPES[case.model]
    torch.manual_seed(0)
    sizes = {name: getattr(case, name) for name in ("r", "skills", "splits", "tasks")}
    return Variants(shape.make(), shape.targets, shape.task_type, **sizes)


def measure(case: Case, rounds: int, budget: float, variants: Variants) -> Figures:
    """The figures of a case."""
    load, difference = round(os.getloadavg()[0], 1), None
    ours = [variants[kind] for kind in kinds_here() if kind in case.kinds]
    if case.serving:
        ours = [variant for variant in ours if variant.serves]
    if not ours:  # this version cannot do it yet
        return Figures(case, 0, {}, _claims(case, set(), lambda one, other: 0), 0, load)
    taking = [variants[name] for name in ("base", *case.rivals)] + ours
    if "adapters" in case.rivals:
        variants.load(make_task_ids(case.rows, case.distinct, case.tasks).tolist())
    for variant in taking:
        variant.model.train(case.mode in ("train", "saved", "peak"))
    functions = {variant.name: work(case, variant, case.distinct) for variant in taking}
    if case.beside_one:
        functions |= {f"{variant.name}, one task": work(case, variant, 1) for variant in ours}
    with ExitStack() as stack:
        for variant in ours if case.serving else ():
            stack.enter_context(variant.serving())
        if case.mode in ("saved", "peak"):
            held = {name: _bytes(case.mode, function, variants[name]) for name, function in functions.items()}
            above = {name: size - held["base"] for name, size in held.items()}
            over = {name: size / held["base"] for name, size in held.items()}
            base, rounds, ratio = held["base"] / 1e6, 1, lambda one, other: above[one] / above[other]
        else:
            times = paired(functions, rounds, budget)
            base, rounds = 1000 * median(times["base"]), len(times["base"])
            over = {name: median_ratio(times, name, "base") for name in times}
            ratio = lambda one, other: median_ratio(times, one, other)  # noqa: E731
        if case.mode in ("decode", "forward"):
            difference = _difference(functions)
    return Figures(case, base, over, _claims(case, set(functions), ratio), rounds, load, difference)


def _claims(case: Case, known: set[str], ratio: Callable[[str, str], float]) -> list[Claim]:
    claims = []
    for bar in case.bars:
        against = f"{bar.variant}, one task" if bar.against == "one task" else bar.against
        measured = ratio(bar.variant, against) if {bar.variant, against} <= known else None
        claims.append(Claim(str(case), bar.variant, bar.against, measured, bar.most))
    return claims


def _bytes(mode: str, function: Callable[[], Any], variant: Variant) -> int:
    return saved_bytes(function, variant.model.parameters()) if mode == "saved" else peak_bytes(function)


def _difference(functions: dict[str, Callable[[], torch.Tensor]]) -> float | None:
    """Of logits or tokens, between those who have the same tensors."""
    pairs = [("poly", "upstream poly"), ("mhr", "upstream mhr"), ("mhr", "adapters")]
    found = [
        (functions[one]().float() - functions[other]().float()).abs().max().item()
        for one, other in pairs
        if one in functions and other in functions
    ]
    return max(found, default=None)


def work(case: Case, variant: Variant, distinct: int) -> Callable[[], Any]:
    """What is timed: a call without arguments."""
    ids, inputs = make_task_ids(case.rows, distinct, case.tasks), make_inputs(case.model, case.rows, case.length)
    if case.mode == "decode":
        inputs.pop("decoder_input_ids", None)
        return lambda: variant.generate(ids, **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return variant(ids, **inputs)

    def step() -> None:
        trained = [*variant.model.parameters(), *(x for x in inputs.values() if x.requires_grad)]
        for tensor in trained:
            tensor.grad = None
        variant(ids, **inputs).float().square().mean().backward()

    if case.mode == "forward":
        return forward
    if SHAPES[case.model].size:
        inputs["x"].requires_grad_()
    return step
