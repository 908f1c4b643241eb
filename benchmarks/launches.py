"""Operators that an adapted layer runs: `python -m benchmarks.launches [--docs docs/benchmarks/speed.md]`.

On a GPU a small kernel costs its launch, whatever it computes, so they are counted: every operator that reaches the
device, views and bare allocations aside, above the bare model's and per adapted layer. A list used as an index counts
too: a GPU copies it over. A Llama of four blocks, its seven linear layers adapted, 8 rows. `decode` is one token within
`generate`; `forward` runs without gradients; `train` is a forward and a backward with all gradients None before. The
bare model's step computes the gradients of its inputs, for it has none without; the others compute what training asks
for. Counts are exact and the same on every machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from . import results
from .cases import Claim
from .models import SHAPES, make_inputs, make_task_ids
from .variants import KINDS, Variant, Variants, kinds_here

__all__ = ["LIMITS", "WORK", "Work", "claims", "count", "counts", "operators"]

ROWS, LENGTH, TASKS = 8, 32, 64
NO_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::new_empty")  # views by another name, and memory not written
FROM_A_LIST = "aten::lift_fresh"  # an alias by its schema, a copy to the device where there is one
RIVALS = ("lora", "adapters", "upstream poly", "upstream mhr")


@dataclass(frozen=True)
class Work:
    """What is counted.

    Attributes:
        mode: decode, forward or train.
        distinct: tasks among the rows.
        serving: None, or what the tasks are to the block: `seen` before together, or a `new mixture` of seen ones.
    """

    mode: str
    distinct: int = 8
    serving: str | None = None

    def __str__(self) -> str:
        tasks = f"{self.distinct} task{'s' if self.distinct > 1 else ''}"
        return f"{self.mode}{f' in serving, {self.serving}' if self.serving else ''}, {tasks}"


DECODE_ONE, DECODE, FORWARD, TRAIN = Work("decode", 1), Work("decode"), Work("forward"), Work("train")
SEEN, MIXTURE = Work("forward", serving="seen"), Work("forward", serving="new mixture")
WORK = (DECODE_ONE, DECODE, FORWARD, SEEN, MIXTURE, TRAIN)


# The most operators of a layer, by work and kind.
LIMITS: dict[tuple[Work, str], float] = {
    (DECODE_ONE, "poly"): 2.0,
    (DECODE_ONE, "mhr"): 2.0,
    (DECODE_ONE, "gates"): 3.0,
    (DECODE, "poly"): 2.0,
    (DECODE, "mhr"): 2.0,
    (DECODE, "gates"): 3.0,
    (FORWARD, "poly"): 4.3,
    (FORWARD, "mhr"): 5.3,
    (FORWARD, "gates"): 3.5,
    (SEEN, "poly"): 2.0,
    (SEEN, "mhr"): 2.0,
    (MIXTURE, "poly"): 4.0,
    (MIXTURE, "mhr"): 4.0,
    (TRAIN, "poly"): 15.0,
    (TRAIN, "mhr"): 20.0,
    (TRAIN, "gates"): 12.0,
}


class operators(TorchDispatchMode):  # noqa: N801  # used as `with operators() as ran:`
    """Counts the operators that run in a block, views and bare allocations aside: `ran.count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count += name == FROM_A_LIST or not (func.is_view or name.startswith(NO_KERNEL))
        return func(*args, **(kwargs or {}))


def ran_by(function: Callable[[], Any]) -> int:
    """Operators of a call, that before it aside: what is made once and kept is no part of it."""
    function()
    with operators() as ran:
        function()
    return ran.count


def count(work: Work, variant: Variant, inputs: Mapping[str, Any], tasks: int = TASKS) -> int:
    """Operators of some work, for the batch of `inputs`."""
    device, rows = inputs["input_ids"].device, len(inputs["input_ids"])
    ids = make_task_ids(rows, work.distinct, tasks).to(device)
    variant.model.train(work.mode == "train")

    def decode(tokens: int) -> Any:
        prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        return variant.generate(ids, **prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def step() -> None:
        for parameter in variant.model.parameters():
            parameter.grad = None
        variant(ids, **inputs).float().square().mean().backward()

    if work.mode == "decode":
        return ran_by(lambda: decode(4)) - ran_by(lambda: decode(3))
    if work.mode == "train":
        return ran_by(step)
    with torch.no_grad(), variant.serving() if work.serving else nullcontext():
        if work.serving != "new mixture":
            return ran_by(lambda: variant(ids, **inputs))
        variant(ids, **inputs)
        with operators() as ran:
            variant(ids.flip(0), **inputs)
        return ran.count


def counts(variants: Variants, inputs: Mapping[str, Any], layers: int) -> dict[Work, dict[str, float]]:
    """Of each work and each variant that can do it: operators per adapted layer above the bare model's.

    To one decimal: what runs once in a forward, such as ids that come over, is a part of no layer.
    """
    found: dict[Work, dict[str, float]] = {}
    variants.load(make_task_ids(len(inputs["input_ids"]), 8, variants.tasks).tolist())
    for work in WORK:
        bare = count(Work(work.mode, work.distinct), variants["base"], inputs, variants.tasks)
        names = [name for name in (*RIVALS, *kinds_here()) if _can(variants[name], work)]
        found[work] = {
            name: round((count(work, variants[name], inputs, variants.tasks) - bare) / layers, 1) for name in names
        }
    return found


def _can(variant: Variant, work: Work) -> bool:
    if work.serving:
        return variant.serves
    return not (variant.name == "adapters" and work.mode == "train")  # PEFT refuses `adapter_names` in training


def counts_here() -> dict[Work, dict[str, float]]:
    """The counts of the model that the table is about."""
    shape = SHAPES["llama-64x4"]
    torch.manual_seed(0)
    variants = Variants(shape.make(), shape.targets, shape.task_type, tasks=TASKS, to_the_bottom=False)
    return counts(variants, make_inputs("llama-64x4", ROWS, LENGTH), layers=4 * len(shape.targets))


def claims(found: Mapping[Work, Mapping[str, float]]) -> list[Claim]:
    """The counts against their aims."""
    return [
        Claim(f"launches: {work}", kind, f"LoRA {found[Work(work.mode, work.distinct)]['lora']:.1f}",
              found[work].get(kind), limit)
        for (work, kind), limit in LIMITS.items()
    ]  # fmt: skip


def rows_of(found: Mapping[Work, Mapping[str, float]]) -> list[dict[str, str]]:
    return [
        {"work": str(work), **{name: f"{of[name]:.1f}" if name in of else "" for name in (*RIVALS, *KINDS)}}
        for work, of in found.items()
        if of
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table is to be replaced")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console, about, found = results.console(), results.about("python -m benchmarks.launches"), counts_here()
    rows, columns = rows_of(found), ["work", *RIVALS, *KINDS]
    console.print(results.table("operators per adapted layer", columns, rows))
    console.print(results.table("against the aims", results.CLAIMS, results.claim_rows(claims(found))))
    if args.docs:
        results.write_table(args.docs, "launches", rows, about, columns)


if __name__ == "__main__":
    main()
