"""Throughput of mixed requests: the adapter in `examples/serve.py`, its exported LoRAs in PEFT, and in vLLM.

    python -m benchmarks.serving outputs/assistants/adapter --vllm outputs/servers/vllm

Each way answers the same letters of `examples/data/assistants`, tasks in turn, greedily, from so many clients at once.
PEFT alone has no server, so it gets the requests in batches, as they come. The ways take turns, round after round, so
that what else the machine does meets all of them. CPU time is that of the processes that answer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from .servers import ask, family, started, vllm_server

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the letters and the server are examples

NEW_TOKENS = 48


@dataclass
class Way:
    """Who answers, and what it is sent: a request from each of its clients, or a batch from the one that it has."""

    name: str
    send: Callable[[Any], Any]
    parts: list[Any]
    clients: int
    process: int
    started: bool = True  # a server with processes of its own; else this process, whose children are others' servers

    def __call__(self, parts: list[Any] | None = None) -> tuple[float, float]:
        """Wall and CPU seconds of one round."""
        start, before = time.perf_counter(), self._cpu()
        with ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(self.send, self.parts if parts is None else parts))
        return time.perf_counter() - start, self._cpu() - before

    def _cpu(self) -> float:
        who = family(self.process) if self.started else [psutil.Process(self.process)]
        return sum(sum(one.cpu_times()[:2]) for one in who)


def over_http(adapter: Path, base: Path, requests: list[dict], clients: int, log: Path, stack: ExitStack) -> Way:
    """The adapter itself, behind the server of the examples."""
    command = [sys.executable, EXAMPLES / "serve.py", adapter, "--model", base, "--port", 0, "--max_batch", clients]
    address, process = stack.enter_context(started(command, r"http://127\.0\.0\.1:\d+", log))

    def send(request: dict[str, Any]) -> None:
        ask(f"{address}/generate", {**request, "max_new_tokens": NEW_TOKENS})

    return Way("the adapter, examples/serve.py", send, requests, clients, process)


def in_peft(base: Path, loras: dict[str, Path], requests: list[dict], clients: int) -> Way:
    """The LoRAs in PEFT, in this process, in batches of so many rows."""
    import peft
    from assistants import load

    model, tokenizer = load(base)
    names = {task: f"task{number}" for number, task in enumerate(loras)}
    for task, folder in loras.items():
        if isinstance(model, peft.PeftModel):
            model.load_adapter(folder, adapter_name=names[task])
        else:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=names[task])
    model.eval()

    def send(part: list[dict[str, Any]]) -> None:
        texts, rows = [request["input"] for request in part], [names[request["task"]] for request in part]
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        model.generate(**batch, adapter_names=rows, max_new_tokens=NEW_TOKENS, do_sample=False)

    parts = [requests[first : first + clients] for first in range(0, len(requests), clients)]
    return Way("LoRAs, PEFT with adapter_names", send, parts, 1, os.getpid(), started=False)


def in_vllm(
    environment: Path, base: Path, loras: dict[str, Path], requests: list[dict], clients: int, log: Path,
    stack: ExitStack,
) -> Way:  # fmt: skip
    """The LoRAs in vLLM, over HTTP."""
    address, process = stack.enter_context(vllm_server(environment, base, loras, log, clients))

    def send(request: dict[str, Any]) -> None:
        body = {"model": request["task"], "prompt": request["input"], "max_tokens": NEW_TOKENS, "temperature": 0}
        ask(f"{address}/v1/completions", body)

    return Way("LoRAs, vLLM", send, requests, clients, process)


def table(ways: list[Way], n_requests: int, rounds: int) -> Table:
    """Of each way the mean of all rounds, and their least and most."""
    for way in ways:
        way(way.parts[: way.clients])  # what is done once, at the first requests, is not counted
    taken: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            taken[way.name].append(way())
    found = Table("", "CPU ms of one", "requests/s", title=f"{n_requests} requests, {rounds} rounds")
    found.box = box.SIMPLE_HEAD
    for name, pairs in taken.items():
        cpu, rate = [1000 * cpu / n_requests for _, cpu in pairs], [n_requests / wall for wall, _ in pairs]
        found.add_row(
            name, *(f"{fmean(seen):{form}} ({min(seen):{form}} to {max(seen):{form}})"
                    for seen, form in ((cpu, ".0f"), (rate, ".2f")))
        )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of the adapter of examples/assistants.py")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="folder of its base model")
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM; left out without")
    parser.add_argument("--letters", type=int, default=10, help="letters, sent to every assistant (default: 10)")
    parser.add_argument("--clients", type=int, default=24, help="clients at once, rows of a batch (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way answers all (default: 3)")
    args = parser.parse_args(argv)
    import peft
    from assistant_data import TRAINED, rows_of
    from assistants import load

    letters = {task: rows_of([task], "test")[: args.letters] for task in TRAINED}
    base, tokenizer = load(args.model)
    template = {"add_generation_prompt": True, "tokenize": False}
    requests = [
        {"task": task, "input": tokenizer.apply_chat_template(letters[task][n]["prompt"], **template)}
        for n in range(args.letters)
        for task in TRAINED
    ]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        loras = peft.PeftModel.from_pretrained(base, args.adapter).export_lora(None, folder / "loras")
        ways = [over_http(args.adapter, args.model, requests, args.clients, folder / "serve.log", stack)]
        ways.append(in_peft(args.model, loras, requests, args.clients))
        if args.vllm:
            ways.append(in_vllm(args.vllm, args.model, loras, requests, args.clients, folder / "vllm.log", stack))
        Console().print(table(ways, len(requests), args.rounds))


if __name__ == "__main__":
    main()
