"""Throughput of mixed requests: the adapter in `examples/serve.py`, its exported LoRAs in PEFT, and in vLLM.

    python -m benchmarks.serving outputs/assistants/adapter --vllm outputs/servers/vllm

Each way answers the same letters of `examples/data/assistants`, tasks in turn, greedily, from so many clients at once.
PEFT alone has no server, so it gets the requests in batches, as they come. CPU time is that of the processes that
answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the letters and the server are examples

NEW_TOKENS = 48


@contextmanager
def started(command: list[object], ready: str, log: Path, **environment: str) -> Iterator[tuple[str, int]]:
    """A server in a process group of its own, until the block ends; gives what `ready` found in its log, and its id.

    Raises:
        RuntimeError: it ended before it was ready; the message has the end of its log.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            while not (found := re.search(ready, log.read_text(errors="replace"))):
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                raise RuntimeError(f"The server ended: {log.read_text(errors='replace')[-5000:]}")
            yield found[0], process.pid
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=120)


@contextmanager
def vllm_server(
    environment: Path, base: Path, loras: dict[str, Path], log: Path, rows: int = 24
) -> Iterator[tuple[str, int]]:
    """vLLM with the exported tasks, on a port of this machine; gives its address and its process.

    It is what `vllm serve` starts; that script does not find its own version in the wheel for CPUs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [environment / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--max-model-len",
        256,
        "--max-num-seqs",
        rows,
        "--enforce-eager",
    ]
    command += ["--enable-lora", "--max-lora-rank", 8, "--max-loras", len(loras), "--lora-modules"]
    command += [f"{task}={path}" for task, path in loras.items()]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    with started(command, "Application startup complete", log, **settings) as (_, process):
        yield f"http://127.0.0.1:{port}", process


def ask(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that an address of this machine answers; a body is posted."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever proxy is set
    with opener.open(request, timeout=3600) as response:
        return json.load(response)


def cpu_seconds(process: int) -> float:
    """Of a process and those that it started."""
    family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def measured(send: Callable[[Any], Any], requests: list[Any], clients: int, process: int) -> list[str]:
    """Requests per second and CPU seconds of one, after one request for each client that is not counted."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, requests[:clients]))
        start, before = time.perf_counter(), cpu_seconds(process)
        list(pool.map(send, requests))
        seconds, cpu = time.perf_counter() - start, cpu_seconds(process) - before
    return [f"{len(requests) / seconds:.2f}", f"{1000 * cpu / len(requests):.0f}"]


def with_peft(base: Path, loras: dict[str, Path], requests: list[dict[str, Any]], rows: int) -> list[str]:
    """The same of PEFT's LoRA, in this process: batches of so many rows."""
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
        texts = [request["input"] for request in part]
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        rows = [names[request["task"]] for request in part]
        model.generate(**batch, adapter_names=rows, max_new_tokens=NEW_TOKENS, do_sample=False)

    send(requests[:rows])
    start, before = time.perf_counter(), cpu_seconds(os.getpid())
    for first in range(0, len(requests), rows):
        send(requests[first : first + rows])
    seconds, cpu = time.perf_counter() - start, cpu_seconds(os.getpid()) - before
    return [f"{len(requests) / seconds:.2f}", f"{1000 * cpu / len(requests):.0f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of the adapter of examples/assistants.py")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="folder of its base model")
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM; left out without")
    parser.add_argument("--letters", type=int, default=10, help="letters, sent to every assistant (default: 10)")
    parser.add_argument("--clients", type=int, default=24, help="clients at once, rows of a batch (default: 24)")
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
    table = Table("", "requests/s", "CPU ms of one", title=f"{len(requests)} requests", box=box.SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        loras = peft.PeftModel.from_pretrained(base, args.adapter).export_lora(None, folder / "loras")
        serve = [sys.executable, EXAMPLES / "serve.py", args.adapter, "--model", args.model, "--port", 0]
        serve += ["--max_batch", args.clients]
        with started(serve, r"http://127\.0\.0\.1:\d+", folder / "serve.log") as (address, process):
            found = measured(
                lambda request: ask(f"{address}/generate", {**request, "max_new_tokens": NEW_TOKENS}),
                requests, args.clients, process,
            )  # fmt: skip
            table.add_row("the adapter, examples/serve.py", *found)
        table.add_row("LoRAs, PEFT with adapter_names", *with_peft(args.model, loras, requests, args.clients))
        if args.vllm:
            with vllm_server(args.vllm, args.model, loras, folder / "vllm.log", args.clients) as (address, process):
                body = {"max_tokens": NEW_TOKENS, "temperature": 0}
                found = measured(
                    lambda request: ask(
                        f"{address}/v1/completions", {"model": request["task"], "prompt": request["input"], **body}
                    ),
                    requests, args.clients, process,
                )  # fmt: skip
                table.add_row("LoRAs, vLLM", *found)
    Console().print(table)


if __name__ == "__main__":
    main()
