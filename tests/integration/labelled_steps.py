"""Runs over tasks of different kinds; alone, or as one rank of several: `labelled_steps.py folder`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from labelled import ATTENTION, LABELS, NAMES, bert, targets, text
from peft import PeftModel, get_peft_model
from rows import TorchRows, arguments
from tiny import VOCAB
from transformers import Trainer

from peft_poly import DataCollatorWithTaskIds, PerTaskMetrics, PolyConfig, create_poly_optimizer
from peft_poly.training import TaskPrediction

FOUND = {"sentiment": [0, "good"], "topic": [3, 1], "stars": [2.5, 4], "genres": [[1, 0, 1], ["war"]]}


def rows(n: int = 24, tasks: list[str] = NAMES) -> TorchRows:
    """Rows of tokens whose tasks take turns, with labels by number and by name; every seventh has none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (n, 6), generator=generator).tolist()
    kept = [
        {"input_ids": ids, "task": tasks[i % len(tasks)], "labels": FOUND[tasks[i % len(tasks)]][i // 4 % 2]}
        for i, ids in enumerate(tokens)
    ]
    return TorchRows([{**row, "labels": None} if i % 7 == 6 else row for i, row in enumerate(kept)])


def measure(prediction: TaskPrediction) -> dict[str, float]:
    """A metric for each kind, from the task's own logits."""
    logits, truth = prediction.predictions, prediction.label_ids
    if prediction.labels.kind == "regression":
        return {"error": float(abs(logits[:, 0] - truth).mean())}
    if prediction.labels.kind == "multi_label":
        return {"cells": float(((logits > 0) == truth).mean())}
    return {"accuracy": float((logits.argmax(-1) == truth).mean())}


def model() -> PeftModel:
    torch.manual_seed(0)
    config = PolyConfig(task_type="SEQ_CLS", task_labels=LABELS, target_modules=ATTENTION, r=2, router_noise=False)
    return get_peft_model(bert(), config)


def trainer(folder: Any, made: Any = None, **settings: Any) -> Trainer:
    """Four steps of eight rows over all processes, by AdamW with decay unless said otherwise."""
    made = model() if made is None else made
    settings = {"max_steps": 4, "logging_steps": 1, "seed": 3, "lr_scheduler_type": "constant", **settings}
    args = arguments(folder, **settings)
    adamw = create_poly_optimizer(made, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Trainer(
        made,
        args,
        train_dataset=rows(),
        eval_dataset=rows(10),
        data_collator=DataCollatorWithTaskIds(task_names=NAMES),
        compute_metrics=PerTaskMetrics(measure, NAMES),
        optimizers=(adamw, None),
    )


def steps(folder: Path, processes: int) -> dict[str, Any]:
    """What is compared between one process and several: with DDP told that all is used, and not."""
    found = {}
    for name, unused in (("told", False), ("asked", True)):
        run = trainer(folder / name, per_device_train_batch_size=8 // processes, ddp_find_unused_parameters=unused)
        few = TorchRows([row for row in rows(44) if row["task"] != "genres"][:32])
        run.train_dataset = few if unused else run.train_dataset  # a head that nobody asks for, on any process
        run.train()
        weights = {key: p.detach().clone() for key, p in run.model.named_parameters() if p.requires_grad}
        table = run.evaluate() and run.compute_metrics.table
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        found[name] = {"weights": weights, "table": table, "losses": losses}
    return found


def sharded(rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """A loop of one's own, whose model is spread over several processes by `fully_shard`; four rows a step."""
    made = model().train()
    if processes > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (processes,))
        fully_shard(made.get_base_model().classifier, mesh=mesh)
        fully_shard(made, mesh=mesh)
    adamw, losses, inputs = create_poly_optimizer(made, torch.optim.AdamW, lr=0.01, weight_decay=0.1), [], text()
    for batch in ([0, 1, 2, 3], [0, 1, 0, 1], [1, 1, 2, 2]):  # most heads are asked for by one process, or none
        mine = batch[rank * 4 // processes : (rank + 1) * 4 // processes]
        rows = {name: x[mine] for name, x in inputs.items()}
        loss = made(**rows, task_ids=[NAMES[task] for task in mine], labels=targets()[mine]).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        total = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / processes)
    weights = {name: p for name, p in made.named_parameters() if p.requires_grad}
    whole = {name: p.full_tensor() if processes > 1 else p for name, p in weights.items()}
    return {"losses": losses, "weights": {name: p.detach().clone() for name, p in whole.items()}}


if __name__ == "__main__":
    out, place, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.save({**steps(out, world), "sharded": sharded(place, world)}, out / f"rank{place}.pt")
