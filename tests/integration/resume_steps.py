"""A run with all that is random: order of rows, router noise, dropout. As a script, runs of it kill themselves.

Called as `resume_steps.py folder sampling [sampling ...]`; each run has a folder of its own in there.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rows import TorchRows, arguments, rows
from tiny import TASKS, llama
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_poly import DataCollatorWithTaskIds, PolyConfig, TaskSamplingMixin, create_poly_optimizer

KILLED_AT = 10  # of 12 steps, in the second of two epochs; checkpoints are at 4 and 8


class BalancedTrainer(TaskSamplingMixin, Trainer):
    """Epochs with as many rows of each task."""


class Killing(TrainerCallback):
    """Ends the process as a power failure would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder: Any, sampling: str, **settings: Any) -> Trainer:
    """The same run each time, for the kind of sampling, or for gates."""
    torch.manual_seed(0)
    kind = {"poly_type": "gates"} if sampling == "gates" else {"n_skills": 3, "n_splits": 2}
    config = PolyConfig(task_type="CAUSAL_LM", r=2, task_names=TASKS, lora_dropout=0.2, **kind)
    model: PeftModel = get_peft_model(llama(), config)
    settings = {
        "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1,
        **settings,
    }  # fmt: skip
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-2, router_lr=0.1, weight_decay=0.1)
    return (BalancedTrainer if sampling == "uniform" else Trainer)(
        model,
        arguments(folder, **settings),
        train_dataset=TorchRows(rows(24)),
        data_collator=DataCollatorWithTaskIds(task_names=TASKS),
        optimizers=(optimizer, None),
        **({"task_balance": "uniform"} if sampling == "uniform" else {}),
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What was trained."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if os.fork() == 0:  # the imports are done once
            run = trainer(os.path.join(sys.argv[1], name), name)
            run.add_callback(Killing())
            run.train()
            os._exit(0)
        print(name, os.WTERMSIG(os.wait()[1]), flush=True)
