"""What it costs to grow, in tasks, skills and splits: `python -m benchmarks.growth [--docs docs/benchmarks/speed.md]`.

One T5-small shape, all linear layers adapted, r = 8. For each size: bytes of skills and routers, seconds to save and to
load the adapter (the best of three), and CPU milliseconds of an eval forward of 8
rows of 32 tokens and of a training step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console

import peft_poly

from . import results
from .models import SHAPES, make_inputs, make_task_ids

SIZES = [
    *({"tasks": tasks, "skills": 8, "splits": 4} for tasks in (10, 100, 1000, 10_000)),
    *({"tasks": 16, "skills": skills, "splits": 4} for skills in (4, 16, 64)),
    *({"tasks": 16, "skills": 8, "splits": splits} for splits in (1, 16, 64)),
]
COLUMNS = ["tasks", "skills", "splits", "skills MB", "routers MB", "file MB", "save s", "load s", "eval ms", "train ms"]


def best(function: Callable[[], Any], clock: Callable[[], float], times: int = 3) -> float:
    """The least seconds of so many calls."""
    taken = []
    for _ in range(times):
        begin = clock()
        function()
        taken.append(clock() - begin)
    return min(taken)


def measure(tasks: int, skills: int, splits: int) -> dict[str, Any]:
    shape = SHAPES["t5-small"]
    torch.manual_seed(0)
    config = peft_poly.PolyConfig(
        task_type=shape.task_type, target_modules=list(shape.targets), r=8, n_tasks=tasks, n_skills=skills,
        n_splits=splits,
    )  # fmt: skip
    base = shape.make()
    model = peft.get_peft_model(base, config).eval()
    sizes = {name: p.numel() * p.element_size() / 1e6 for name, p in model.named_parameters() if "poly_" in name}
    routers = sum(size for name, size in sizes.items() if name.endswith("module_logits"))
    with tempfile.TemporaryDirectory() as folder:
        saved = best(lambda: model.save_pretrained(folder), time.perf_counter)
        file = sum(path.stat().st_size for path in Path(folder).rglob("*")) / 1e6
        inputs, ids = make_inputs("t5-small", 8, 32), make_task_ids(8, min(8, tasks), tasks)

        def forward() -> None:
            with torch.no_grad():
                model(**inputs, task_ids=ids)

        def step() -> None:
            model(**inputs, task_ids=ids).logits.square().mean().backward()
            model.zero_grad(set_to_none=True)

        forward()
        evaluated = best(forward, time.process_time)
        model.train()
        step()
        trained = best(step, time.process_time)
        base = model.unload()
        loaded = best(lambda: peft.PeftModel.from_pretrained(base, folder).unload(), time.perf_counter)
    figures = [sum(sizes.values()) - routers, routers, file, saved, loaded, 1000 * evaluated, 1000 * trained]
    return dict(zip(COLUMNS, [tasks, skills, splits, *(float(f"{value:.3g}") for value in figures)], strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table is to be replaced")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    console, rows, load = Console(highlight=False), [], round(os.getloadavg()[0], 1)
    for size in SIZES:
        rows.append(measure(**size))
        console.print(", ".join(f"{name} {value:g}" for name, value in rows[-1].items()), soft_wrap=True)
    if args.docs:
        for row in rows:
            row["load"] = load
        results.write_table(args.docs, "growth", rows, results.about("python -m benchmarks.growth"), COLUMNS)


if __name__ == "__main__":
    main()
