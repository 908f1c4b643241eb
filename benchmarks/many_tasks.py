"""How many exported tasks fit: 10, 100 and 1,000 LoRAs of a chat model, beside the adapter that they come from.

    python -m benchmarks.many_tasks --tasks 10 100 --folder outputs/many-tasks [--vllm outputs/servers/vllm]

For each number of tasks: bytes on disk of the adapter (MHR and gates) and of the exported LoRAs, seconds to load them
into one PEFT model, each in a process of its own, and its memory less that of the base model (LoRAs up to a hundred);
the same of a running vLLM that is told of one LoRA after the other. A figure that is in the CSV file is not taken
again. The tensors are random, for they cost what trained ones do.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from .servers import ask, family, post, vllm_server

RESULTS = Path(__file__).parent / "results" / "many-tasks.csv"
WAYS = ("MHR", "gates", "LoRAs")
MOST_IN_PEFT = 100  # LoRAs: ten times as many took sixty times as long to load
RANK = 4  # of MHR, and so of its exported LoRAs
IN_A_BATCH = 8  # of vLLM's, --max-loras
COLUMNS = ("way", "tasks", "rank", "disk_mb", "export_s", "load_s", "memory_mb")


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def write(way: str, n: int, model: Path, folder: Path) -> dict[str, Any]:
    """Save an adapter of `n` tasks; for LoRAs, export all tasks of one with MHR."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from peft_poly import PolyConfig

    torch.manual_seed(0)
    kind = {"poly_type": "gates", "r": 16} if way == "gates" else {"r": RANK, "n_skills": 4, "n_splits": 4}
    names = [f"task{number}" for number in range(n)]
    config = PolyConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", task_names=names, init_weights=False, **kind
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.get_peft_model(base, config).eval()
    start = time.perf_counter()
    if way == "LoRAs":
        adapted.export_lora(None, folder, overwrite=folder.exists())
    else:
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return {"rank": config.r, "export_s": round(time.perf_counter() - start, 1), "disk_mb": round(size_mb(folder), 1)}


def load(way: str, model: Path, folder: Path) -> dict[str, Any]:
    """Load what `write` wrote, and say what it took."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    if way != "LoRAs":
        import peft_poly  # noqa: F401  # registers the adapter

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sum(float(p.sum()) for p in base.parameters())  # the file's pages are in memory now, so that they are not counted
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    folders = sorted(folder.iterdir()) if way == "LoRAs" else [folder]
    adapted = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="lora0")
    for number, path in enumerate(folders[1:], 1):
        adapted.load_adapter(path, adapter_name=f"lora{number}")
    seconds = time.perf_counter() - start
    return {"load_s": round(seconds, 1), "memory_mb": round((psutil.Process().memory_info().rss - before) / 1e6, 1)}


def load_in_vllm(environment: Path, model: Path, folder: Path, n: int) -> dict[str, Any]:
    """Have a running vLLM load what `write` exported, all of it kept in memory; the last one answers."""
    log, loras = folder.with_suffix(".log"), sorted(folder.iterdir())
    how = {"max_loras": IN_A_BATCH, "max_cpu_loras": max(n, IN_A_BATCH)}
    with vllm_server(environment, model, {}, log, **how) as (address, process):
        question = {"prompt": "The capital of France is", "max_tokens": 1}
        ask(f"{address}/v1/completions", {"model": str(model), **question})
        before, start = _memory_mb(process), time.perf_counter()
        for path in loras:
            post(f"{address}/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path.resolve())})
        seconds, memory = time.perf_counter() - start, _memory_mb(process) - before
        ask(f"{address}/v1/completions", {"model": loras[-1].name, **question})
    return {"rank": RANK, "load_s": round(seconds, 1), "memory_mb": round(memory, 1)}


def _memory_mb(process: int) -> float:
    return sum(one.memory_info().rss for one in family(process)) / 1e6


def child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.many_tasks", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_done(path: Path) -> set[tuple[str, int]]:
    """Ways and numbers of tasks that the CSV file has."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["way"], int(row["tasks"])) for row in csv.DictReader(file)}


def add(path: Path, row: dict[str, Any]) -> None:
    """A line more for the CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def measured(way: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the CSV file."""
    folder = args.folder / f"{'LoRAs' if way == 'vLLM' else way}-{n}"
    if way == "vLLM":
        if not folder.exists():
            child("--step", "write", "LoRAs", n, args.model, folder)
        return load_in_vllm(args.vllm, args.model, folder, n)
    steps = ("write", "load") if way != "LoRAs" or n <= MOST_IN_PEFT else ("write",)
    found: dict[str, Any] = {}
    for step in steps:
        found |= child("--step", step, way, n, args.model, folder)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000], help="numbers of tasks")
    parser.add_argument("--folder", type=Path, default=Path("outputs/many-tasks"), help="where adapters are written")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="folder of the base model")
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM; left out without")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--step", nargs="*", help="internal: one measurement, in a process of its own")
    args = parser.parse_args(argv)
    if args.step:
        what, way, n, model, folder = args.step
        step = (way, int(n), Path(model), Path(folder)) if what == "write" else (way, Path(model), Path(folder))
        print(json.dumps({"write": write, "load": load}[what](*step)))
        return
    done = rows_done(args.results)
    for n in args.tasks:
        for way in (*WAYS, "vLLM") if args.vllm else WAYS:
            if (way, n) not in done:
                add(args.results, {"way": way, "tasks": n, **measured(way, n, args)})


if __name__ == "__main__":
    main()
