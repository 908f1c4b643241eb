"""Give a trained adapter a task it has never seen, from sixteen rows: the regimes of the MHR paper in one table.

One Multi-Head Routing adapter is trained on the tasks of `train_multitask.py` but for those named by `--new_tasks`.
Each of these joins it with `add_tasks`, its router row started in one of three ways, and learns from a few rows:

    router only   MHR-z: the skills are frozen, the new task learns how to mix them
    all           skills and router learn
    average       MHR-mu: the skills become their mean, one LoRA, which learns

A LoRA of the same rank, trained from scratch on the same rows, is there to compare with. The nearest task is the known
one that has the smallest loss on the new task's rows.

    python examples/few_shot.py
    python examples/few_shot.py --new_tasks emotion --rows 32 --draws 5
"""

from __future__ import annotations

import copy
import functools
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig
from ranking import Collator, Ranker, load_tasks, predict, rows_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from train_multitask import Arguments, HelpFormatter, accuracies, adapted, load_encoder, n_trainable, train, with_poly
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from peft_poly import create_poly_optimizer

console = Console(highlight=False)


@dataclass
class FewShotArguments:
    """Settings of the script; what is not here is as `train_multitask.py` has it."""

    model: str = HfArg(default="", help="Hub id or folder of an encoder; empty for MiniLM from its pip package.")
    data: str = HfArg(default=str(Path(__file__).parent / "data"), help="Folder of *.jsonl files.")
    new_tasks: list[str] = field(
        default_factory=lambda: ["emotion", "support_topic"], metadata={"help": "Tasks that come later."}
    )
    epochs: float = HfArg(default=4, help="Passes over the rows of the known tasks, before.")
    max_steps: int = HfArg(default=-1, help="Stop that training after so many steps; -1 goes by the epochs.")
    rows: int = HfArg(default=16, help="Rows of a new task to learn from.")
    draws: int = HfArg(default=2, help="How often these rows are drawn; the table has the mean.")
    steps: int = HfArg(default=10, help="Steps on these rows, all of them in each.")
    lr: float = HfArg(default=3e-3, help="Learning rate of skills, and of the LoRA from scratch, on these rows.")
    router_lr: float = HfArg(default=1.0, help="Learning rate of routers on these rows; 0.1 is for many more steps.")
    eval_split: str = HfArg(default="test", help="Split of the table. Choose settings on `validation`, report `test`.")
    seed: int = HfArg(default=0, help="Seed of everything.")


@dataclass(frozen=True)
class Way:
    """A line of the table: where the new row starts, and the verb that says what learns."""

    name: str
    init: str
    verb: str


TASK_KEYS = ("task_ids", "option_task_ids")  # of a batch of the ranker
SCRATCH = "LoRA from scratch"
WAYS = [
    Way("router only (MHR-z), row uniform", "uniform", "train_router_only"),
    Way("router only (MHR-z), row of the mean task", "mean", "train_router_only"),
    Way("router only (MHR-z), row of the nearest task", "nearest", "train_router_only"),
    Way("all, row of the nearest task", "nearest", "train_all"),
    Way("average of the skills (MHR-mu)", "mean", "average_skills"),
]


@torch.no_grad()
def nearest_task(ranker: Ranker, batch: dict[str, Any]) -> str:
    """The known task that, taken for the new one, has the smallest loss on its rows."""
    ranker.eval()
    losses = {}
    for task in ranker.encoder.task_names:
        known = {key: torch.full_like(batch[key], ranker.encoder.task_id(task)) for key in TASK_KEYS}
        losses[task] = ranker(**{**batch, **known})["loss"].item()
    return min(losses, key=losses.__getitem__)


def meet(verb: str, init: str, trained: Ranker, task: str) -> Ranker:
    """A copy of the trained ranker that knows the new task."""
    ranker = copy.deepcopy(trained)
    ranker.encoder.add_tasks([task], init=init)
    getattr(ranker.encoder, verb)()
    return ranker


def learn(ranker: Ranker, optimizer: torch.optim.Optimizer, batch: dict[str, Any], steps: int) -> None:
    """All rows in every step; the learning rates fall linearly to 0."""
    ranker.train()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ranker(**batch)["loss"].backward()
        optimizer.step()
        schedule.step()


def numbers_that_learn(model: nn.Module, n_tasks: int) -> int:
    """Trainable parameters; of a router only the new task's row, for the gradients of the others are zero."""
    routers = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "poly_router" in n)
    return n_trainable(model) - routers + routers // n_tasks


class Run:
    """The new tasks' rows, what every line of the table scores on them, and how many numbers learned for it."""

    def __init__(self, args: FewShotArguments, demo: Arguments) -> None:
        self.args, self.demo = args, demo
        self.encoder, self.tokenizer = load_encoder(demo)
        self.known, _ = load_tasks(args.data, args.new_tasks)
        self.new = {task: rows for task, rows in load_tasks(args.data)[0].items() if task in args.new_tasks}
        if unfit := [task for task in args.new_tasks if task not in self.new]:
            raise ValueError(f"These tasks have no options to choose from: {', '.join(unfit)}.")
        for task, rows in self.new.items():
            if (found := len(rows_of({task: rows}, "train"))) < args.rows:
                raise ValueError(f"Task {task!r} has {found} training rows, fewer than --rows {args.rows}.")
        self.scores: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        self.sizes: dict[str, int] = {}
        self.untaught: dict[tuple[str, str], float] = {}  # accuracies before learning, which some runs have in common

    def pretrain(self) -> Ranker:
        """The ranker, with an adapter that has learned the known tasks."""
        set_seed(self.args.seed)
        ranker = Ranker(with_poly(self.encoder, list(self.known), self.demo), self.demo.temperature)
        rates = {"lr": self.demo.lr, "router_lr": self.demo.router_lr, "weight_decay": 0.0}
        two_speeds = functools.partial(create_poly_optimizer, optimizer_cls=torch.optim.AdamW, **rates)
        collate = Collator(self.tokenizer, self.known, self.demo.max_length)
        ranker = train(ranker, two_speeds, rows_of(self.known, "train"), collate, self.demo, self.args.seed)
        return ranker.cpu()

    def from_scratch(self) -> Ranker:
        config = {"r": self.demo.r, "lora_alpha": self.demo.lora_alpha}
        return Ranker(adapted(self.encoder, LoraConfig, self.demo, **config), self.demo.temperature)

    def adapt(self, trained: Ranker, task: str, draw: int, progress: Any) -> None:
        """Every line of the table, on one draw of one new task's rows."""
        args = self.args
        rows = Random(f"{args.seed} {task} {draw}").sample(rows_of({task: self.new[task]}, "train"), args.rows)
        collate = Collator(self.tokenizer, [*self.known, task], self.demo.max_length)
        batch, n_tasks = collate(rows), len(self.known) + 1
        set_seed(args.seed + draw)
        lora = self.from_scratch()
        optimizer = torch.optim.AdamW(lora.parameters(), lr=args.lr)
        self.score(SCRATCH, (task, SCRATCH), lora, optimizer, batch, collate)
        self.sizes[SCRATCH] = n_trainable(lora)
        progress()
        nearest = nearest_task(trained, batch)
        for way in WAYS:
            init = nearest if way.init == "nearest" else way.init
            ranker = meet(way.verb, init, trained, task)
            rates = {"lr": args.lr, "router_lr": args.router_lr}
            optimizer = create_poly_optimizer(ranker, torch.optim.AdamW, **rates, weight_decay=0.0)
            start = (task, way.verb if way.verb == "average_skills" else init)
            self.score(way.name, start, ranker, optimizer, batch, collate)
            self.sizes[way.name] = numbers_that_learn(ranker, n_tasks)
            progress()

    def score(
        self, name: str, start: tuple[str, str], ranker: Ranker, optimizer: Any, batch: Any, collate: Any
    ) -> None:
        """Accuracy on the rows of the table before and after the ranker learns; `start` is its task and its start."""
        task = start[0]
        test = rows_of({task: self.new[task]}, self.args.eval_split)
        if start not in self.untaught:
            self.untaught[start] = accuracies(predict(ranker, test, collate), test)["mean"]
        learn(ranker, optimizer, batch, self.args.steps)
        after = accuracies(predict(ranker, test, collate), test)["mean"]
        self.scores[name][task].append((self.untaught[start], after))

    def table(self) -> Table:
        args = self.args
        title = f"Accuracy in % on the {args.eval_split} rows, before → after {args.rows} rows; {args.draws} draw(s)"
        table = Table("", "numbers that learn", *self.new, "mean", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, by_task in self.scores.items():
            pairs = [[fmean(values) for values in zip(*found, strict=True)] for found in by_task.values()]
            pairs.append([fmean(values) for values in zip(*pairs, strict=True)])
            table.add_row(name, f"{self.sizes[name]:,}", *(f"{before:.1f} → {after:.1f}" for before, after in pairs))
        return table


def main(argv: list[str]) -> None:
    start = time.time()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not the user's
    parser = HfArgumentParser(FewShotArguments, description=__doc__, formatter_class=HelpFormatter)
    args = parser.parse_args_into_dataclasses(argv)[0]
    shared = {"model": args.model, "data": args.data, "epochs": args.epochs, "max_steps": args.max_steps}
    try:
        run = Run(args, Arguments(output_dir="outputs/few_shot", **shared))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    console.print(f"Training on {len(run.known)} tasks; to come later: {', '.join(run.new)}")
    trained = run.pretrain()
    with Progress(console=console) as bar:
        bar_task = bar.add_task("Few-shot runs", total=args.draws * len(run.new) * (len(WAYS) + 1))
        for draw in range(args.draws):
            for task in run.new:
                run.adapt(trained, task, draw, lambda: bar.advance(bar_task))
    console.print(run.table())
    console.print(f"{time.time() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main(sys.argv[1:])
