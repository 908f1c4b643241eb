"""The same comparison on a GPU, in half precision: `python -m benchmarks.gpu [--docs docs/benchmarks/speed.md]`.

A Llama of the 1B shape in bfloat16, attention and MLP adapted, against the bare model, PEFT's LoRA and PEFT's own Poly:
milliseconds of decoding, of an eval forward and of a training step, as ratios of medians taken in turn; kernels that an
adapted layer launches above the bare one; whether a forward waits for the device; whether a decoding step can be
captured as a CUDA graph; the ratio under `torch.compile`. On a machine without a GPU, `--device cpu --tiny` shows that
it runs: operations stand for kernels, and what is CUDA's alone is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from . import results
from .measuring import median_ratio, paired
from .models import VOCAB, make_task_ids
from .variants import Variant, variants_on

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLUMNS = ["what", "base", "lora/base", "poly/lora", "ours/base", "ours/lora", "ours/poly"]


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
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        base = llama_1b(tiny).to(self.device, torch.bfloat16)
        self.variants: dict[str, Variant] = variants_on(base, LINEARS, "CAUSAL_LM", r=8, skills=8, splits=4, tasks=16)
        self.n_adapted = sum(isinstance(module, nn.Linear) for module in base.modules()) - 1  # all but the head
        tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3)).to(self.device)
        self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.ids = make_task_ids("distinct", rows, 16).to(self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def call(self, variant: Variant, mode: str) -> Callable[[], Any]:
        """What is timed, device time included."""
        variant.model.train(mode == "train")

        def decode() -> None:
            variant.generate(self.ids, **self.inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
            self.wait()

        @torch.no_grad()
        def forward() -> None:
            variant(self.ids, **self.inputs)
            self.wait()

        def step() -> None:
            variant(self.ids, **self.inputs).float().square().mean().backward()
            for parameter in variant.model.parameters():
                parameter.grad = None
            self.wait()

        return {"decode": decode, "eval": forward, "train": step}[mode]

    def ratios(self, mode: str, variants: dict[str, Variant], rounds: int, budget: float) -> dict[str, Any]:
        functions = {name: self.call(variant, mode) for name, variant in variants.items()}
        times = paired(functions, rounds, budget, clock=time.perf_counter)
        row: dict[str, Any] = {"what": mode, "base": f"{1000 * sorted(times['base'])[len(times['base']) // 2]:.2f} ms"}
        for one, other in (pair.split("/") for pair in COLUMNS[2:]):
            known = one in times and other in times
            row[f"{one}/{other}"] = f"{median_ratio(times, one, other):.3f}" if known else ""
        return row

    def launches(self) -> dict[str, Any]:
        """Kernels (without a GPU: operations) of an eval forward above the bare model's, for each adapted layer."""
        counts = {}
        for name, variant in self.variants.items():
            forward = self.call(variant, "eval")
            forward()
            with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as profiler:
                forward()
            counts[name] = sum(event.count for event in profiler.key_averages())
        above = {name: (count - counts["base"]) / self.n_adapted for name, count in counts.items()}
        what = "kernels" if self.cuda else "operations"
        shown = {f"{one}/{other}": "" for one, other in (pair.split("/") for pair in COLUMNS[2:])}
        shown |= {"lora/base": f"+{above['lora']:.1f}", "ours/base": f"+{above['ours']:.1f}"}
        shown["poly/lora"] = f"{above['poly'] / above['lora']:.2f}"
        return {"what": f"{what} of a layer", "base": str(counts["base"]), **shown}

    def without_waiting(self) -> str:
        """Whether an eval forward and a training step of ours never wait for the device."""
        ours = self.variants["ours"]
        for mode in ("eval", "train"):
            self.call(ours, mode)()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                ours.model.eval()(**self.inputs, task_ids=self.ids)
            ours.model.train()(**self.inputs, task_ids=self.ids).logits.float().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "a forward and a training step of ours never wait for the device"

    @torch.no_grad()
    def captured(self) -> str:
        """One token of each row as a CUDA graph, whose replay must give what the call gives."""
        model = self.variants["ours"].model.eval()
        token = self.inputs["input_ids"][:, :1].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with model.use_task(self.ids):
            with torch.cuda.stream(stream):
                for _ in range(3):
                    expected = model(input_ids=token, use_cache=False).logits
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(input_ids=token, use_cache=False).logits
        graph.replay()
        self.wait()
        return f"captured as a CUDA graph; its replay differs by {(logits - expected).abs().max().item():.1e}"


def compiled(variants: dict[str, Variant]) -> dict[str, Variant]:
    """LoRA, ours and the bare model as one graph each; PEFT's own Poly is none."""
    chosen = {name: variant for name, variant in variants.items() if name != "poly"}
    return {name: Variant(name, torch.compile(variant.model, fullgraph=True)) for name, variant in chosen.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="a model of no size")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20, help="seconds of a case after its third round")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose table `gpu` is to be replaced")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny shows that the program runs.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console, bench = Console(highlight=False), Bench(args.device, args.tiny, args.rows, args.length)
    rows = [bench.ratios(mode, bench.variants, args.rounds, args.budget) for mode in ("decode", "eval", "train")]
    rows.append(bench.launches())
    notes = [bench.without_waiting(), bench.captured()] if bench.cuda else []
    if bench.cuda:
        rows.append(
            {**bench.ratios("eval", compiled(bench.variants), args.rounds, args.budget), "what": "eval, compiled"}
        )
    for row in rows:
        console.print(", ".join(f"{name} {row[name]}" for name in COLUMNS if row.get(name)), soft_wrap=True)
    console.print(*notes, sep="\n")
    if args.docs:
        about = results.about("python -m benchmarks.gpu")
        about["machine"] = torch.cuda.get_device_name() if bench.cuda else about["machine"]
        results.write_table(args.docs, "gpu", rows, about, COLUMNS)


if __name__ == "__main__":
    main()
