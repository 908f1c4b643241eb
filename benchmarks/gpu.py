"""The same comparison on a GPU, in half precision: `python -m benchmarks.gpu [--docs docs/benchmarks/speed.md]`.

A Llama of the 1B shape in bfloat16, all linear layers adapted, 64 rows of 1, 8 and 64 distinct tasks: tokens a second
of decoding, of a forward (in `serving` too), of a training step, of one token as a replayed CUDA graph and of a forward
under `torch.compile`, in turn; operators and kernels of an adapted layer; whether a forward waits for the device. One
run takes six minutes of one card (`--seconds`): what no time is left for is left out, and said. Without a GPU,
`--device cpu --tiny` shows that it runs; what is CUDA's alone is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from . import launches, results
from .measuring import median, paired
from .models import LINEARS, VOCAB, make_task_ids
from .variants import KINDS, Variant, Variants, kinds_here

NAMES = ("base", "merged", "lora", "adapters", "upstream mhr", *KINDS)
COLUMNS = ["work", *NAMES]
TOKENS = 8  # to decode; `adapters` with 64 tasks launches 640 operators a layer for each
DISTINCT = (1, 8, 64)


def llama_1b(tiny: bool) -> nn.Module:
    """Random weights in the shape of Llama 3.2 1B with a small vocabulary, or a tiny model of the same make."""
    width, layers, heads = (64, 2, 4) if tiny else (2048, 16, 32)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Bench:
    """The variants on their device, and a batch for them."""

    def __init__(self, device: str, tiny: bool, rows: int, length: int) -> None:
        self.device, self.rows = torch.device(device), rows
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        base = llama_1b(tiny).to(self.device, torch.bfloat16)
        self.variants = Variants(base, LINEARS, "CAUSAL_LM", tasks=max(DISTINCT), to_the_bottom=False)
        self.layers = len(LINEARS) * base.config.num_hidden_layers
        tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3)).to(self.device)
        self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def ids(self, distinct: int) -> torch.Tensor:
        return make_task_ids(self.rows, distinct, max(DISTINCT)).to(self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def call(self, variant: Variant, mode: str, distinct: int) -> Callable[[], Any]:
        """What is timed, device time included."""
        ids = self.ids(distinct)
        variant.model.train(mode == "train")

        def decode() -> None:
            variant.generate(ids, **self.inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            self.wait()

        @torch.no_grad()
        def forward() -> None:
            variant(ids, **self.inputs)
            self.wait()

        def step() -> None:
            for parameter in variant.model.parameters():
                parameter.grad = None
            output = variant(ids, **self.inputs)
            if output.requires_grad:  # all but the bare model's
                output.float().square().mean().backward()
            self.wait()

        return {"decode": decode, "forward": forward, "train": step}[mode]

    def row(self, mode: str, distinct: int, names: Sequence[str], rounds: int, budget: float, serving: bool = False):
        """Tokens a second of each variant, from medians of times that were taken in turn."""
        chosen = [self.variants[name] for name in names]
        with ExitStack() as stack:
            for variant in chosen if serving else ():
                stack.enter_context(variant.serving())
            functions = {variant.name: self.call(variant, mode, distinct) for variant in chosen}
            tokens = self.rows * TOKENS if mode == "decode" else self.inputs["input_ids"].numel()
            work = f"{mode}{' in serving' if serving else ''}, {distinct} task{'s' if distinct > 1 else ''}"
            return self.rates(work, tokens, functions, rounds, budget)

    @staticmethod
    def rates(
        work: str, tokens: int, functions: dict[str, Callable[[], Any]], rounds: int, budget: float
    ) -> dict[str, str]:
        times = paired(functions, rounds, budget, clock=time.perf_counter)
        return {"work": f"{work}: tokens/s", **{name: f"{tokens / median(taken):.0f}" for name, taken in times.items()}}

    def operators(self) -> Iterator[dict[str, str]]:
        """Operators of an adapted layer above the bare model's, exact; 8 rows, as in `launches`."""
        inputs = {name: tensor[:8] for name, tensor in self.inputs.items()}
        for work, of in launches.counts(self.variants, inputs, self.layers).items():
            if of:
                yield {"work": f"operators a layer, {work}", **{name: f"{of[name]:.1f}" for name in of}}

    def kernels(self, names: Sequence[str]) -> dict[str, str]:
        """Kernels, copies and fills that the device ran in a forward, per adapted layer above the bare model's."""
        ran = {}
        for name in names:
            forward = self.call(self.variants[name], "forward", DISTINCT[1])
            forward()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                forward()
            ran[name] = sum(event.count for event in profiler.key_averages())
        above = {name: f"{(ran[name] - ran['base']) / self.layers:.1f}" for name in names if name != "base"}
        return {"work": f"kernels a layer, forward, {DISTINCT[1]} tasks", **above}

    def without_waiting(self, name: str) -> str:
        """Whether a forward and a training step of ours never wait for the device; raises where they do."""
        ours, ids = self.variants[name], self.ids(DISTINCT[1])
        for mode in ("forward", "train"):
            self.call(ours, mode, DISTINCT[1])()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                ours.model.eval()(**self.inputs, task_ids=ids)
            ours.model.train()(**self.inputs, task_ids=ids).logits.float().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return f"{name}: a forward and a training step never wait for the device"

    @torch.no_grad()
    def captured(self, names: Sequence[str], rounds: int, budget: float) -> tuple[dict[str, str], list[str]]:
        """One token of each row as a CUDA graph: tokens a second of replays, and that they give what the call gives."""
        token, ids, replays, notes = self.inputs["input_ids"][:, :1].clone(), self.ids(DISTINCT[1]), {}, []
        for name in names:
            variant, stream = self.variants[name], torch.cuda.Stream()
            variant.model.eval()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    expected = variant(ids, input_ids=token, use_cache=False)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = variant(ids, input_ids=token, use_cache=False)
            graph.replay()
            self.wait()
            notes.append(f"{name}: a replayed CUDA graph differs by {(logits - expected).abs().max().item():.1e}")
            replays[name] = lambda graph=graph: (graph.replay(), self.wait())
        return self.rates(f"one token as a CUDA graph, {DISTINCT[1]} tasks", self.rows, replays, rounds, budget), notes

    def compiled(self, names: Sequence[str], rounds: int, budget: float) -> dict[str, str]:
        """A forward as one graph of the compiler."""
        functions = {}
        for name in names:
            whole = Variant(name, torch.compile(self.variants[name].model, fullgraph=True))
            functions[name] = self.call(whole, "forward", DISTINCT[1])
        tokens = self.inputs["input_ids"].numel()
        return self.rates(f"forward, compiled, {DISTINCT[1]} tasks", tokens, functions, rounds, budget)


def works(bench: Bench, rounds: int) -> list[Callable[[float], tuple[list[dict[str, str]], list[str]]]]:
    """All that is measured, the most telling first; each is given its seconds and returns rows and notes."""
    ours = kinds_here()
    served = [name for name in ours if bench.variants[name].serves]
    everyone, trained = ["base", "merged", "lora", "adapters", "upstream mhr", *ours], ["base", "lora", *ours]

    def timed(mode: str, distinct: int, names: Sequence[str], serving: bool = False) -> Callable[[float], Any]:
        def run(seconds: float) -> Any:
            if "adapters" in names:
                bench.variants.load(bench.ids(distinct).tolist())
            chosen = [name for name in names if name != "merged" or distinct == 1]
            return [bench.row(mode, distinct, chosen, rounds, seconds, serving)], []

        return run

    found: list[Callable[[float], Any]] = [lambda _: (list(bench.operators()), [])]
    if bench.cuda:
        found.append(lambda _: ([bench.kernels(["base", "lora", "adapters", *ours])], []))
        found.append(lambda _: ([], [bench.without_waiting(name) for name in ours]))
    found += [timed(mode, distinct, everyone) for mode in ("decode", "forward") for distinct in DISTINCT[:2]]
    if served:
        found.append(timed("forward", DISTINCT[1], ["base", "lora", *served], serving=True))
    found.append(timed("train", DISTINCT[1], trained))
    if bench.cuda:

        def graphs(seconds: float) -> Any:
            row, notes = bench.captured(trained, rounds, seconds)
            return [row], notes

        found += [graphs, lambda seconds: ([bench.compiled(trained, rounds, seconds)], [])]
    return [*found, *(timed(mode, DISTINCT[2], everyone) for mode in ("decode", "forward"))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="a model of no size")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=330, help="of the whole run; what does not fit is left out")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table `gpu` is to be replaced")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny shows that the program runs.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    begin, console = time.perf_counter(), Console(highlight=False)
    bench = Bench(args.device, args.tiny, args.rows, args.length)
    rows: list[dict[str, str]] = []
    todo = works(bench, args.rounds)
    for i, work in enumerate(todo):
        left = args.seconds - (time.perf_counter() - begin)
        if left <= 0:
            console.print(f"{len(todo) - i} of {len(todo)} left out: {args.seconds:.0f} seconds are gone")
            break
        found, notes = work(0.5 * left / (len(todo) - i))  # half, for warming up and three rounds come on top
        for row in found:
            console.print(", ".join(f"{name} {row[name]}" for name in COLUMNS if row.get(name)), soft_wrap=True)
        console.print(*notes, sep="\n", end="\n" if notes else "")
        rows += found
    loaded = bench.variants.loading
    console.print(f"{len(loaded)} LoRAs for `adapters` took {sum(loaded):.1f} s to load, the last {loaded[-1]:.2f} s")
    if args.docs:
        about = results.about("python -m benchmarks.gpu")
        about["machine"] = torch.cuda.get_device_name() if bench.cuda else about["machine"]
        results.write_table(args.docs, "gpu", [dict.fromkeys(COLUMNS, "") | row for row in rows], about, COLUMNS)


if __name__ == "__main__":
    main()
