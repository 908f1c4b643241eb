"""Evaluation by task, and a run sampled by task that is resumed in its second epoch; alone, or as one rank of several.

Called as `trainer_steps.py folder`; each rank writes what it saw to `folder/rank<n>.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import adapt, poly
from peft import PeftModel, get_peft_model
from rows import TorchRows, arguments, rows
from tiny import CASES, TASKS, llama
from transformers import EvalPrediction, Trainer, TrainerCallback

from peft_poly import DataCollatorWithTaskIds, PerTaskMetrics, PolyConfig, TaskSamplingMixin

COLLATE = DataCollatorWithTaskIds(task_names=TASKS)


class BalancedTrainer(TaskSamplingMixin, Trainer):
    """Epochs with as many rows of each task."""


class Seen(TrainerCallback):
    """Notes the tasks of each batch on their way into the model."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if "forward" in vars(model):
            return  # a run that begins again
        forward = model.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.batches.append(kwargs["task_ids"].tolist())
            return forward(*args, **kwargs)

        model.forward = noting

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        del model.forward


def unequal(n: int = 24) -> list[dict]:
    """Of eight rows, six are of the first task, one each of the others."""
    return [{**row, "task": TASKS[max(0, index % 8 - 5)]} for index, row in enumerate(rows(n))]


def balanced(folder: Any, data: Any, **settings: Any) -> tuple[BalancedTrainer, Seen]:
    """A run of two epochs of six steps, sampled uniformly by task unless said otherwise."""
    torch.manual_seed(0)
    config = PolyConfig(task_type="CAUSAL_LM", r=2, n_skills=2, task_names=TASKS, router_noise=False)
    balance = settings.pop("task_balance", "uniform")
    settings = {"max_steps": -1, "num_train_epochs": 2, "seed": 5, **settings}
    model: PeftModel = get_peft_model(llama(), config)
    seen = Seen()
    trainer = BalancedTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=data,
        data_collator=COLLATE,
        callbacks=[seen],
        task_balance=balance,
    )
    return trainer, seen


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of a classifier."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def steps(folder: Path, processes: int) -> dict[str, Any]:
    """What is compared between one process and several."""

    def classifier() -> PeftModel:
        torch.manual_seed(0)
        return adapt(CASES["bert"].make(), poly("bert", task_names=TASKS, router_noise=False))

    found = TorchRows([{**row, "labels": index % 3} for index, row in enumerate(rows(11))])  # of no even share
    metrics = PerTaskMetrics(accuracy, TASKS)
    settings = arguments(folder / "evaluated", per_device_eval_batch_size=4)
    Trainer(classifier(), settings, eval_dataset=found, data_collator=COLLATE, compute_metrics=metrics).evaluate()

    model = classifier()  # one that was evaluated is not wrapped for DDP any more
    model.get_base_model().accepts_loss_kwargs = False  # or transformers doubles the loss of a classifier
    settings = arguments(
        folder / "classified", per_device_train_batch_size=4 // processes, logging_steps=1, optim="sgd",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trained = Trainer(model, settings, train_dataset=found, data_collator=COLLATE)
    trained.train()
    losses = [(log["loss"], log["grad_norm"]) for log in trained.state.log_history if "loss" in log]

    saved = {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4 // processes}
    whole, seen = balanced(folder / "balanced", unequal(), **saved)
    assert whole.args.world_size == processes
    whole.train()
    again, rest = balanced(folder / "balanced", unequal(), **saved)
    again.train(resume_from_checkpoint=str(folder / "balanced" / "checkpoint-8"))
    weights = [{n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad} for run in (whole, again)]
    return {"table": metrics.table, "losses": losses, "seen": seen.batches, "rest": rest.batches, "weights": weights}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.save(steps(out, int(os.environ["WORLD_SIZE"])), out / f"rank{os.environ['RANK']}.pt")
