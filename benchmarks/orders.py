"""Ways to compute one token of each row: `python -m benchmarks.orders [--docs docs/benchmarks/speed.md]`.

Sixty layers of 512 features one after another, as in a decoder, so that their tensors come from memory, not from a
cache. Every row has a task of its own. `lora` is one pair for all rows, without the overhead of modules; `pairs` reads
a mixed pair for each task, as is kept within `generate`; `outputs` applies all skills to x and mixes what comes out,
which needs no mixed pairs but reads the whole inventory. Microseconds of CPU a layer above those of the base product.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import linear

from . import results
from .measuring import paired

FEATURES, LAYERS, RANK = 512, 60, 8
SIZES = [(rows, k, h) for rows in (1, 8, 32) for k, h in ((4, 4), (8, 1), (8, 4), (16, 4))]
COLUMNS = ["rows", "skills", "splits", "base", "lora", "pairs", "outputs"]
SCALE = 1 / RANK


class Layer:
    """Base weight, skills, mixing weights `(b, h, k)` of the rows, and the pairs mixed with them."""

    def __init__(self, rows: int, k: int, h: int) -> None:
        self.weight = torch.randn(FEATURES, FEATURES)
        self.w = torch.rand(rows, h, k)
        self.A = torch.randn(h, FEATURES // h, k * RANK)  # the skills side by side, the best that `outputs` can have
        self.B = torch.randn(h, k * RANK, FEATURES // h)
        A, B = self.A.view(h, -1, k, RANK), self.B.view(h, k, RANK, -1)
        self.pairs = (
            torch.einsum("bhk,hdkr->bhdr", self.w, A).reshape(rows, FEATURES, RANK),
            torch.einsum("bhk,hkro->brho", self.w, B).reshape(rows, RANK, FEATURES),
        )
        self.pair = (torch.randn(FEATURES, RANK), torch.randn(RANK, FEATURES))
        self.w_of_splits = self.w.transpose(0, 1).unsqueeze(-1).contiguous()  # (h, b, k, 1)

    def of_base(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)

    def of_lora(self, x: torch.Tensor) -> torch.Tensor:
        return self.of_base(x).addmm_(torch.mm(x, self.pair[0]), self.pair[1], alpha=SCALE)

    def of_pairs(self, x: torch.Tensor) -> torch.Tensor:
        u = torch.bmm(x.unsqueeze(1), self.pairs[0])
        return self.of_base(x).unsqueeze(1).baddbmm_(u, self.pairs[1], alpha=SCALE).squeeze(1)

    def of_outputs(self, x: torch.Tensor) -> torch.Tensor:
        b, (h, _, kr) = x.shape[0], self.A.shape
        of_skills = torch.bmm(x.view(b, h, -1).transpose(0, 1), self.A).view(h, b, -1, RANK)
        u = (of_skills * self.w_of_splits).sum((0, 2))
        y = self.of_base(x)
        y.view(b, h, -1).transpose(0, 1).baddbmm_(
            (self.w_of_splits * u.unsqueeze(1)).view(h, b, kr), self.B, alpha=SCALE
        )
        return y


def measure(rows: int, k: int, h: int, rounds: int = 40, budget: float = 10) -> dict[str, str]:
    torch.manual_seed(0)
    layers, x = [Layer(rows, k, h) for _ in range(LAYERS)], torch.randn(rows, FEATURES)
    ways = {name: [getattr(layer, f"of_{name}") for layer in layers] for name in COLUMNS[3:]}
    torch.testing.assert_close(ways["outputs"][0](x), ways["pairs"][0](x), rtol=1e-3, atol=1e-2)
    times = paired({name: lambda ways=way: [f(x) for f in ways] for name, way in ways.items()}, rounds, budget)
    micros = {name: [1e6 * second / LAYERS for second in seconds] for name, seconds in times.items()}
    row = {"rows": str(rows), "skills": str(k), "splits": str(h), "base": f"{statistics.median(micros['base']):.0f}"}
    for name in COLUMNS[4:]:
        above = statistics.median(a - b for a, b in zip(micros[name], micros["base"], strict=True))
        row[name] = f"{above:.0f}"
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table is to be replaced")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, rows = Console(highlight=False), []
    for size in SIZES:
        rows.append(measure(*size))
        console.print(", ".join(f"{name} {rows[-1][name]}" for name in COLUMNS))
    if args.docs:
        results.write_table(args.docs, "orders", rows, results.about("python -m benchmarks.orders"), COLUMNS)


if __name__ == "__main__":
    main()
