"""What is measured, one row of figures a case, and the bars that the figures are held against."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .measuring import median_ratio, paired, peak_bytes, saved_bytes
from .models import SHAPES, make_inputs, make_task_ids
from .variants import Variant, make_variants

__all__ = ["BARS", "FULL", "QUICK", "Case", "Row", "measure", "variants_of"]

Row = dict[str, Any]

# The most that a figure may be; `merged` has the noise of a ratio of two equal models.
BARS = {
    "decode": {"ours/lora": 0.92, "ours/poly": 0.72},
    "eval": {"ours/lora": 0.98},
    "train": {"ours/lora": 1.05, "ours/poly": 0.90},
    "saved": {"ours/lora": 1.02},
    "merged": {"ours/base": 1.03},
    "cost": {"ours/lora": 1.0},
    "cost of decoding": {"ours/lora": 1.0},
}
DIFFERENCE = 1e-4  # the most that outputs may differ from those of PEFT's own Poly


@dataclass(frozen=True)
class Case:
    """One row of figures.

    Attributes:
        mode: decode, eval, train, saved (bytes kept for the backward), peak (bytes allocated), merged, cost (one token
            of one row in a model so small that Python is most of it) or cost of decoding (the same in `generate`).
        model: a key of `SHAPES`.
        rows: of the batch.
        length: tokens of a row; of the prompt when decoding.
        ids: one, few, distinct or mixed tasks in the batch.
        r, skills, splits, tasks: of the adapters.
    """

    mode: str
    model: str = "t5-small"
    rows: int = 8
    length: int = 32
    ids: str = "mixed"
    r: int = 8
    skills: int = 8
    splits: int = 4
    tasks: int = 16


T5 = Case("eval")
# The table of figures that the algorithm was chosen by.
QUICK = [
    replace(T5, mode="decode", ids="distinct"),
    replace(T5, mode="decode", ids="distinct", rows=1),
    replace(T5, mode="decode", ids="one"),
    T5,
    replace(T5, length=128),
    replace(T5, mode="train"),
    Case("saved", "linear-2048"),
    Case("saved"),
    Case("peak"),
    Case("merged", ids="one"),
    Case("cost", "tiny-64x24", rows=1, length=1, ids="one"),
    Case("cost of decoding", "tiny-64x24", rows=1, length=1, ids="one"),
]
SHAPES_TOO = [
    Case(mode, model, length=length)
    for model in ("bert-384x6", "llama-1024x4", "linear-256", "linear-768", "linear-2048")
    for mode, length in (("eval", 32), ("eval", 128), ("train", 32), ("train", 128), ("saved", 32), ("peak", 32))
]
LLAMA_DECODES = [
    Case("decode", "llama-1024x4", rows, ids=ids) for rows, ids in ((1, "one"), (8, "distinct"), (8, "one"))
]
SIZES = [
    replace(T5, mode=mode, **change)
    for mode in ("eval", "train")
    for change in (
        {"r": 4}, {"r": 16}, {"skills": 4}, {"skills": 16}, {"splits": 1}, {"splits": 8}, {"tasks": 8}, {"tasks": 64},
        {"ids": "one"}, {"ids": "few"}, {"ids": "distinct"}, {"rows": 1}, {"rows": 32},
    )
]  # fmt: skip
DECODES = [replace(T5, mode="decode", ids=ids, **change) for ids, change in (
    ("few", {}), ("mixed", {"rows": 32}), ("distinct", {"r": 4}), ("distinct", {"r": 16}), ("distinct", {"tasks": 64}),
)]  # fmt: skip
FULL = list(dict.fromkeys([*QUICK, *DECODES, *LLAMA_DECODES, *SHAPES_TOO, *SIZES]))


def measure(case: Case, rounds: int, budget: float, variants: dict[str, Variant]) -> Row:
    """The figures of a case: ratios, the bare model's milliseconds or megabytes, and the load of the machine."""
    row: Row = {**asdict(case), "load": round(os.getloadavg()[0], 1)}
    for variant in variants.values():
        variant.model.train(case.mode in ("train", "saved", "peak"))
    if case.mode == "merged":
        for name in ("lora", "ours"):
            variants[name].model.merge_adapter(**({"task": case.tasks - 1} if name == "ours" else {}))
    functions = {name: _function(case, variant) for name, variant in variants.items()}
    if case.mode == "merged":
        del functions["poly"]  # cannot be merged
    try:
        row |= (
            _bytes(case, variants, functions) if case.mode in ("saved", "peak") else _times(functions, rounds, budget)
        )
        if case.mode in ("eval", "decode", "cost", "cost of decoding"):
            row["difference"] = (functions["ours"]().float() - functions["poly"]().float()).abs().max().item()
    finally:
        if case.mode == "merged":
            variants["lora"].model.unmerge_adapter()
            variants["ours"].model.unmerge_adapter()
    return row


def _times(functions: dict[str, Callable[[], Any]], rounds: int, budget: float) -> Row:
    times = paired(functions, rounds, budget)
    middle = sorted(times["base"])[len(times["base"]) // 2]
    row: Row = {"rounds": len(times["base"]), "base": round(1000 * middle, 3), "unit": "ms"}
    for one, other in (("lora", "base"), ("poly", "lora"), ("ours", "base"), ("ours", "lora"), ("ours", "poly")):
        if one in times and other in times:
            row[f"{one}/{other}"] = round(median_ratio(times, one, other), 3)
    return row


def _bytes(case: Case, variants: dict[str, Variant], functions: dict[str, Callable[[], Any]]) -> Row:
    """Megabytes above those of the bare model, as ratios."""
    held = {}
    for name, function in functions.items():
        parameters = list(variants[name].model.parameters())
        held[name] = saved_bytes(function, parameters) if case.mode == "saved" else peak_bytes(function)
    above = {name: size - held["base"] for name, size in held.items()}
    row: Row = {"rounds": 1, "base": round(held["base"] / 1e6, 2), "unit": "MB", "lora above": above["lora"] / 1e6}
    for one, other in (("poly", "lora"), ("ours", "lora"), ("ours", "poly")):
        row[f"{one}/{other}"] = round(above[one] / above[other], 3)
    return row


def _function(case: Case, variant: Variant) -> Callable[[], Any]:
    """What is timed: a call without arguments."""
    ids, inputs = make_task_ids(case.ids, case.rows, case.tasks), make_inputs(case.model, case.rows, case.length)
    if case.mode == "merged" and variant.routed:
        ids = ids[:1].expand(case.rows)
    if case.mode.startswith(("decode", "cost of")):
        inputs.pop("decoder_input_ids", None)
        tokens = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        return lambda: variant.generate(ids, **inputs, **tokens)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return variant(ids, **inputs)

    def step() -> None:
        variant(ids, **inputs).float().square().mean().backward()
        for parameter in variant.model.parameters():
            parameter.grad = None

    if not SHAPES[case.model].size:
        return step if case.mode in ("train", "saved", "peak") else forward
    x = inputs["x"].requires_grad_()
    return (lambda: (step(), setattr(x, "grad", None))) if case.mode in ("train", "saved", "peak") else forward


def variants_of(case: Case) -> dict[str, Variant]:
    return make_variants(case.model, case.r, case.skills, case.splits, case.tasks)
