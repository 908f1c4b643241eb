"""What is measured, and the bars that are held against it: one case is some work, done in turn by several variants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .variants import KINDS

__all__ = ["SETS", "Bar", "Case", "Claim", "bars"]


@dataclass(frozen=True)
class Bar:
    """The most that `variant` may cost, as a part of what `against` costs.

    Bytes count above the bare model's. `against` may be `one task`: the variant's own cost for a batch of one task.
    """

    variant: str
    against: str
    most: float


def bars(variants: str, **most: float) -> tuple[Bar, ...]:
    """Equal bars of several variants: `bars("poly mhr", lora=0.98, upstream=0.72)`."""
    return tuple(
        Bar(variant, f"upstream {variant}" if name == "upstream" else name.replace("_", " "), value)
        for name, value in most.items()
        for variant in variants.split()
    )


@dataclass(frozen=True)
class Case:
    """Some work, and who does it.

    Attributes:
        mode: decode (24 tokens, greedy), forward (no gradients), train (a step), saved (bytes kept for the backward)
            or peak (bytes allocated at once).
        rivals: the variants beside the bare model and ours.
        bars: what is held against the figures.
        model: a key of `models.SHAPES`.
        rows: of the batch.
        length: tokens of a row; of the prompt when decoding.
        distinct: tasks in the batch.
        tasks: of the adapter.
        r, skills, splits: of the adapters.
        kinds: of ours.
        serving: within `model.serving()`, ours alone.
        beside_one: measure each variant with a batch of one task too, as `one task`.
    """

    mode: str
    rivals: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    model: str = "t5-small"
    rows: int = 8
    length: int = 32
    distinct: int = 8
    tasks: int = 64
    r: int = 8
    skills: int = 8
    splits: int = 4
    kinds: tuple[str, ...] = KINDS
    serving: bool = False
    beside_one: bool = False

    def __str__(self) -> str:
        shape = "" if self.model == "t5-small" else f", {self.model}"
        tasks = f"{self.distinct} of {self.tasks:,} tasks"
        return f"{self.mode}{' in serving' if self.serving else ''}{shape}, {self.rows:,} x {self.length}, {tasks}"

    @property
    def sizes(self) -> str:
        return f"r {self.r}, {self.skills} skills, {self.splits} splits"


@dataclass(frozen=True)
class Claim:
    """A bar and what was measured; None: this version cannot do it yet."""

    what: str
    variant: str
    against: str
    measured: float | None
    most: float

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "to come"
        return "hit" if self.measured <= self.most else f"miss by {self.measured - self.most:.2f}"


UPSTREAM = ("upstream poly", "upstream mhr")
ONE_TASK = {"distinct": 1}
# What must be shown, each with its bar. Differences of a ratio of equal models are noise: hence 1.03 of a merged one.
QUICK = [
    Case("decode", ("lora", "adapters"), bars("poly mhr", adapters=0.56, lora=0.98) + bars("gates", lora=1.0)),
    Case("forward", ("lora", "adapters"), bars("poly mhr", adapters=0.78, lora=1.02) + bars("gates", lora=1.0)),
    Case("decode", ("lora", *UPSTREAM), bars("poly mhr", lora=0.95, upstream=0.72), **ONE_TASK),
    Case("forward", ("lora", "merged"), bars("merged", base=1.03), **ONE_TASK),
    Case("forward", ("lora",), bars("poly mhr", lora=0.98), serving=True, **ONE_TASK),
    Case("forward", ("lora",), bars("poly mhr", lora=0.98), serving=True, rows=1, length=1, **ONE_TASK),
    Case("train", ("lora", *UPSTREAM), bars("poly mhr", lora=1.02, upstream=0.88) + bars("gates", lora=1.05)),
    Case("saved", ("lora", *UPSTREAM), bars("poly mhr", lora=1.02) + bars("gates", lora=1.03)),
    Case("train", ("lora",), bars("poly", lora=1.15) + bars("mhr", lora=1.20) + bars("gates", lora=1.08), "llama-64x4"),
    Case("forward", (), bars("gates", one_task=1.05), rows=1000, length=1, distinct=1000, tasks=1000,
         kinds=("gates",), beside_one=True),
]  # fmt: skip
# The same work by everyone: batches of several tasks of few and of many. Of the LoRAs only those in use are loaded.
SAME_WORK = [
    Case(mode, (*(("merged",) if distinct == 1 else ()), "lora", "adapters", "upstream mhr"), (), rows=32, length=8,
         distinct=distinct, tasks=tasks)
    for tasks in (64, 1000) for mode in ("decode", "forward") for distinct in (1, 2, 8, 32)
]  # fmt: skip
IN_SERVING = [
    replace(case, serving=True, rivals=("lora",)) for case in SAME_WORK if case.mode == "forward" and case.tasks == 64
]
PLAIN = ("lora", *UPSTREAM)
SHAPES_TOO = [
    Case(mode, PLAIN, (), model, length=length)
    for model in ("bert-384x6", "llama-1024x4", "linear-256", "linear-768", "linear-2048")
    for mode, length in (("forward", 32), ("forward", 128), ("train", 32), ("train", 128), ("saved", 32), ("peak", 32))
]
SMALL = [Case(mode, PLAIN, (), "llama-64x24", rows=1, length=1, distinct=1) for mode in ("decode", "forward")]
SIZES = [
    replace(Case(mode, PLAIN), **change)
    for mode in ("forward", "train")
    for change in (
        {"r": 4}, {"r": 16}, {"skills": 4}, {"skills": 16}, {"splits": 8}, {"length": 128}, {"rows": 1, "distinct": 1},
        {"rows": 32, "distinct": 32},
    )
]  # fmt: skip
SETS = {"quick": QUICK, "same-work": [*SAME_WORK, *IN_SERVING], "shapes": [*SMALL, *SHAPES_TOO, *SIZES]}
