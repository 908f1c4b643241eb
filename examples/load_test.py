"""What mixing tasks in a batch gains: `serve.py` under load, on this machine, in three settings.

For each setting it starts the server, sends the same requests from so many clients at once, each client one after the
other, tasks in turn, and stops the server. Settings: no batching; batches of one task each; mixed batches.

    python examples/load_test.py outputs/multitask
    python examples/load_test.py my-adapter --clients 8 --model my-base --device cuda

What is not a setting of this script goes to `serve.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
from ranking import load_tasks, rows_of
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SETTINGS = {
    "no batching": ["--max_batch", "1"],
    "batches of one task": ["--one_task_batches"],
    "mixed batches": [],
}
console = Console(highlight=False)


@dataclass
class Figures:
    """Of one run: seconds in all and of each request, and what the server counted."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    batches: int = 0
    kinds: int = 0
    cpu_seconds: float = 0.0

    def cells(self) -> list[str]:
        """What the table says of it."""
        done = sorted(self.latencies)
        middle, late = (f"{1000 * done[int(share * (len(done) - 1))]:.0f}" for share in (0.5, 0.95))
        sizes = [f"{count / self.batches:.1f}" for count in (len(done), self.kinds)]
        cost = f"{1000 * self.cpu_seconds / len(done):.1f}"
        return [f"{len(done) / self.seconds:.0f}", middle, late, cost, *sizes, str(self.failures)]


@contextmanager
def server(arguments: list[str], threads: int) -> Iterator[str]:
    """A server of its own on a free port of this machine; gives its address, and ends it."""
    command = [sys.executable, str(HERE / "serve.py"), *arguments, "--host", "127.0.0.1", "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                yield found[1]
                return
        raise SystemExit(f"The server did not start:\n{''.join(lines)}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def requests_of(tasks: list[dict[str, Any]], data: str, n: int) -> list[dict[str, Any]]:
    """Tasks in turn, each with the texts of its test rows, or with those of all where it has none."""
    rows = rows_of(load_tasks(data)[0], "test")
    texts = {task: [row["input"] for row in rows if row["task"] == task] for task in {row["task"] for row in rows}}
    every = [row["input"] for row in rows]
    turns = cycle([(task["task"], cycle(texts.get(task["task"], every))) for task in tasks])
    return [{"task": task, "input": next(inputs)} for task, inputs in islice(turns, n)]


async def load(address: str, data: str, n: int, clients: int, seconds: float) -> Figures:
    """Send the requests; stop after `seconds`, whatever is left."""
    figures = Figures()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=seconds, trust_env=False) as http:
        served = (await http.get("/tasks")).json()
        bodies = requests_of(served["tasks"], data, n)
        for body in requests_of(served["tasks"], data, len(served["tasks"])):  # a task's first is slower
            await http.post(served["endpoint"], json=body)
        before, todo = (await http.get("/stats")).json(), iter(bodies)

        async def client() -> None:
            for body in todo:
                start = time.perf_counter()
                response = await http.post(served["endpoint"], json=body)
                figures.latencies.append(time.perf_counter() - start)
                figures.failures += response.status_code != 200

        start = time.perf_counter()
        done, left = await asyncio.wait([asyncio.create_task(client()) for _ in range(clients)], timeout=seconds)
        figures.seconds = time.perf_counter() - start
        for task in [*done, *left]:
            task.cancel() if task in left else task.result()
        after = (await http.get("/stats")).json()
    for key in ("batches", "kinds", "cpu_seconds"):
        setattr(figures, key, after[key] - before[key])
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="as for serve.py")
    parser.add_argument("--clients", type=int, default=32, help="clients at once (default: 32)")
    parser.add_argument("--requests", type=int, default=2000, help="requests in all, per setting (default: 2000)")
    parser.add_argument("--seconds", type=float, default=60, help="stop a setting after so long (default: 60)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the server's computation (default: 1)")
    parser.add_argument("--data", default=str(HERE / "data"), help="folder of *.jsonl files with texts to send")
    args, others = parser.parse_known_args(argv)
    table = Table(
        *("", "requests/s", "median", "95 %", "CPU", "rows", "tasks", "failed"),
        title=f"{args.requests} requests from {args.clients} clients: latencies and CPU time of one in ms, "
        "rows and tasks of a batch",
        box=box.SIMPLE_HEAD,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, settings in SETTINGS.items():
        with console.status(name), server([args.adapter, *settings, *others], args.threads) as address:
            figures = asyncio.run(load(address, args.data, args.requests, args.clients, args.seconds))
        table.add_row(name, *figures.cells())
    console.print(table)


if __name__ == "__main__":
    main()
