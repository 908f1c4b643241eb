"""For `integration/test_many_processes.py`, what ranks run: `torchrun ... ranks_steps.py STEP ... FOLDER`.

Each step leaves `STEP-RANK.pt` in FOLDER. Rows lie in a fixed order, so that ranks together see the global batches of
`batches`, and miss tasks: rank 0 has one task, rank 1 two others, and the last task nobody has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate.utils import set_seed
from adapters import GATES
from packaging.version import Version
from tiny import VOCAB, llama
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_poly import PolyConfig, PolyLayer, create_poly_optimizer

TASKS = ["rte", "sst2", "boolq", "unseen"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS, GLOBAL_BATCH = 4, 4


def build(**settings: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    defaults = {"r": 2, "n_skills": 3, "n_splits": 2, "init_weights": False, "router_noise": False}
    config = PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, task_names=TASKS, **{**defaults, **settings})
    return peft.get_peft_model(llama(), config)


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(3, VOCAB, (STEPS * GLOBAL_BATCH, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100  # no token is before it to tell it; transformers 4 counts it in the mean if it is not masked
    tasks = [[0, 0, 1, 2][n % 4] for n in range(len(ids))]
    return [
        dict(zip(("input_ids", "labels", "task_ids"), row, strict=True)) for row in zip(ids, labels, tasks, strict=True)
    ]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return create_poly_optimizer(model, torch.optim.AdamW, lr=1e-2, router_lr=0.1, weight_decay=0.1)


class InOrder(Trainer):
    """The stock Trainer on rows in their order, with an optimizer that is made when the model is where it will be."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = optimizer_of(self.model if model is None else model)
        return self.optimizer


def trainer(folder: Path, model: nn.Module, **settings: Any) -> Trainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {"use_cpu": True, "save_strategy": "no", "max_steps": STEPS}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=GLOBAL_BATCH // world, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], disable_tqdm=True, seed=0, **{**defaults, **settings},
    )  # fmt: skip
    return InOrder(model=model, args=args, train_dataset=rows())


def losses_of(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "poly_" in name}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


# ----------------------------------------------------------------------------------------------------------------- DDP
def ddp(folder: Path) -> dict[str, Any]:
    model = build()
    trained = trainer(folder, model, ddp_find_unused_parameters=False)
    trained.train()
    trained.save_model(str(folder / "ddp"))
    return {
        "world": torch.distributed.get_world_size(),
        "wrapped": type(trained.model_wrapped).__name__,
        "losses": losses_of(trained),
        "adapter": adapter_of(model),
        "samples": {"as is": samples(folder), "by rank": samples(folder, OwnDraws(0))},
    }


class OwnDraws(TrainerCallback):
    """Gives each rank a seed of its own: the recipe of the guide."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_seed(self.seed, device_specific=True)


def samples(folder: Path, *callbacks: TrainerCallback) -> list[torch.Tensor]:
    """The routing noise that this rank draws, with the stock Trainer's random order of rows, and the rows."""
    model = build(router_noise=True)
    router = next(module for module in model.modules() if isinstance(module, PolyLayer)).poly_router["default"]
    drawn, draw = [], router._draw  # of all layers at once
    router._draw = lambda *rows: drawn.append(draw(*rows)) or drawn[-1]
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    args = trainer(folder, model, max_steps=1).args
    Trainer(model=model, args=args, train_dataset=rows(), callbacks=list(callbacks)).train()
    return [drawn[0], seen[0]]


# --------------------------------------------------------------------------------------------------- raw `fully_shard`
def raw(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = sharded()
    optimizer = optimizer_of(model)
    losses = [raw_step(model, optimizer, step) for step in range(2)]
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(parts, checkpoint_id=str(folder / "raw-checkpoint"))
    losses += [raw_step(model, optimizer, step) for step in range(2, STEPS)]

    errors = {
        "save": error_of(lambda: model.save_pretrained(folder / "raw-error")),
        "given": error_of(lambda: model.save_pretrained(folder / "raw-error", state_dict=model.state_dict())),
        "merge": error_of(lambda: model.merge_adapter(task="rte")),
        "routing": error_of(lambda: model.routing_weights()),
        "export": error_of(lambda: model.export_lora("rte", folder / "raw-error")),
        "grow": error_of(lambda: model.add_tasks(["new"])),
    }
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model.save_pretrained(folder / "raw", state_dict=get_model_state_dict(model, options=options))  # {} on rank 1

    again = sharded()
    optimizer = optimizer_of(again)
    parts = dict(zip(("model", "optimizer"), get_state_dict(again, optimizer), strict=True))
    load(parts, checkpoint_id=str(folder / "raw-checkpoint"))
    set_state_dict(again, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    resumed = losses[:2] + [raw_step(again, optimizer, step) for step in range(2, STEPS)]
    state = get_model_state_dict(again, options=options)
    again.save_pretrained(folder / "raw-resumed", state_dict=state, is_main_process=rank == 0)
    return {
        "world": torch.distributed.get_world_size(),
        "sharded": all(hasattr(p, "full_tensor") for p in model.parameters()),
        "losses": losses,
        "resumed": resumed,
        "errors": errors,
        "folder": (folder / "raw-error").exists(),
    }


def gated(folder: Path) -> dict[str, Any]:
    """Gates under DDP, and under `fully_shard`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    trained = trainer(folder, build(**GATES), ddp_find_unused_parameters=False)
    trained.train()
    model = sharded(**GATES)
    optimizer = optimizer_of(model)
    losses = [raw_step(model, optimizer, step) for step in range(STEPS)]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model.save_pretrained(folder / "gated", state_dict=get_model_state_dict(model, options=options))
    return {"ddp": losses_of(trained), "adapter": adapter_of(trained.model), "fully_shard": losses}


def sharded(**settings: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = build(**settings).train()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def raw_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on this rank's half of a global batch; the mean of the ranks' losses."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = GLOBAL_BATCH // world
    mine = rows()[step * GLOBAL_BATCH + rank * size :][:size]
    ids = torch.stack([row["input_ids"] for row in mine])
    loss = model(input_ids=ids, labels=ids, task_ids=[row["task_ids"] for row in mine]).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total.item() / world


# ------------------------------------------------------------------------------------- Trainer, sharded by a launcher
def sharding_trainer(folder: Path) -> dict[str, Any]:
    """FSDP or DeepSpeed as the launcher says: train, save, resume in a second Trainer, save again."""
    where = {"use_cpu": False}  # the launcher of the tests says that the CPU is the accelerator
    settings = {**where, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    first = trainer(folder / "out", build(), **settings)
    shard_all(first)
    first.train()
    first.save_model(str(folder / "whole"))
    error = error_of(lambda: first.accelerator.unwrap_model(first.model).save_pretrained(folder / "sharded-error"))
    tasks = {"task_ids": ["rte", "boolq"], "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    model = first.deepspeed if first.is_deepspeed_enabled else first.model_wrapped
    model.eval()
    if first.accelerator.is_fsdp2 and Version(transformers.__version__).major < 5:  # the Trainer of 5 does so itself
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    tokens = model.generate(input_ids=rows()[0]["input_ids"].repeat(2, 1), **tasks)
    again = trainer(folder / "out", build(), **settings)
    shard_all(again)
    again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    again.save_model(str(folder / "resumed"))
    return {
        "world": torch.distributed.get_world_size(),
        "type": first.accelerator.distributed_type.value,
        "fsdp2": first.accelerator.is_fsdp2,
        "losses": losses_of(first),
        "resumed": losses_of(again),
        "error": error,
        "tokens": tokens,
    }


def shard_all(trainer: Trainer) -> None:
    """Have ZeRO-3 shard small parameters, too, and these are all small."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[-1])
    for step in sys.argv[1:-1]:
        result = globals()[step](folder)
        torch.save(result, folder / f"{step}-{os.environ['RANK']}.pt")
