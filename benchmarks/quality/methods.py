"""What is compared: a method is a few settings, and an adapter that `build` makes of them.

The budget is that of 8 skills of rank 3 and their routers; a LoRA gets the rank that comes nearest to it, or a rank of
its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

import peft_poly
from peft_poly.layer import PolyLayer

from .rates import Rates

__all__ = ["Adapter", "Method", "build"]

TARGETS = ["query", "key", "value", "dense"]
R, SKILLS, SPLITS = 3, 8, 4  # the routed adapter that the budget is that of
SURE = 40.0  # logit of a choice that is made: its sigmoid is 1 in float32, that of its negative 4e-18


@dataclass(frozen=True)
class Method:
    """One way to adapt the encoder.

    Attributes:
        kind: none, lora (one for all tasks), per task (a LoRA each), peft poly (PEFT's own), poly or gates (ours).
        r: rank of a LoRA or of a skill; 0 for the rank that fits the budget.
        skills, splits, noise, init, granularity: of a routed adapter, as in `PolyConfig`.
    """

    kind: str
    r: int = R
    skills: int = SKILLS
    splits: int = 1
    noise: bool = True
    init: Any = True
    granularity: str = "layer"


class Adapter:
    """An adapted upper half, and how to call it.

    Attributes:
        method: what it was made of.
        model: what holds the parameters.
        task_id: id of each task.
    """

    def __init__(self, method: Method, model: nn.Module, task_id: dict[str, int]) -> None:
        self.method, self.model, self.task_id = method, model, task_id

    def encode(self, hidden: torch.Tensor, mask: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `(n, l, d)` of sequences whose tasks are `task_ids (n,)`."""
        if self.method.kind in ("none", "lora"):
            return self.model(hidden, mask)
        if self.method.kind == "peft poly":  # the tuner itself: a PeftModel hands ids on only if it has a task type
            return self.model.base_model(hidden, mask, task_ids=task_ids)
        return self.model(hidden, mask, task_ids=task_ids)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def n_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def optimizer(self, rates: Rates) -> torch.optim.Optimizer:
        """AdamW without weight decay; our routers have a rate of their own."""
        if self.method.kind in ("poly", "gates"):
            two = {"lr": rates.lr, "router_lr": rates.router_lr or rates.lr}
            return peft_poly.create_poly_optimizer(self.model, torch.optim.AdamW, **two, weight_decay=0.0)
        return torch.optim.AdamW(self.parameters(), lr=rates.lr, weight_decay=0.0)

    def copy(self) -> Adapter:
        return Adapter(self.method, copy.deepcopy(self.model), dict(self.task_id))


def build(method: Method, scale: float, upper: nn.Module, names: list[str], seed: int) -> Adapter:
    """A copy of `upper` with the adapter of a method for the tasks `names`, its parameters drawn by `seed`."""
    torch.manual_seed(seed)
    task_id = {name: n for n, name in enumerate(names)}
    model: nn.Module = copy.deepcopy(upper).requires_grad_(False)
    if method.kind != "none":
        model = peft.get_peft_model(model, _config(method, scale, model, names))
    if method.kind == "per task":
        _one_skill_each(model)
    return Adapter(method, model, task_id)


def _config(method: Method, scale: float, upper: nn.Module, names: list[str]) -> peft.PeftConfig:
    if method.kind == "lora":
        r = method.r or _fitting_rank(upper, len(names))
        return peft.LoraConfig(r=r, lora_alpha=scale * r, target_modules=TARGETS)
    if method.kind == "peft poly":
        sizes = {"r": method.r, "n_skills": method.skills, "n_splits": method.splits, "n_tasks": len(names)}
        return peft.PolyConfig(target_modules=TARGETS, **sizes)
    sizes = {"r": method.r, "n_skills": method.skills, "n_splits": method.splits}
    noise = method.noise
    if method.kind == "gates":
        sizes = {"r": method.r, "poly_type": "gates"}
    if method.kind == "per task":
        r = max(1, round(_fitting_rank(upper, len(names)) / len(names)))
        sizes, noise = {"r": r, "n_skills": len(names), "n_splits": 1}, False
    return peft_poly.PolyConfig(
        target_modules=TARGETS,
        **sizes,
        lora_alpha=scale * sizes["r"],
        task_names=list(names),
        init_weights=method.init,
        router_noise=noise,
        router_granularity=method.granularity,
    )


def _fitting_rank(upper: nn.Module, n_tasks: int) -> int:
    """The rank at which a LoRA is as large as `SKILLS` skills of rank `R` and their routers, as nearly as can be."""
    layers = [m for name, m in upper.named_modules() if name.rpartition(".")[2] in TARGETS]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    return max(1, round(SKILLS * R + len(layers) * n_tasks * SPLITS * SKILLS / per_rank))


@torch.no_grad()
def _one_skill_each(model: nn.Module) -> None:
    """Skill t is task t's own: a LoRA per task, trained in one model on the same batches as the other methods."""
    for layer in model.modules():
        if isinstance(layer, PolyLayer):
            logits = layer.poly_router["default"].module_logits
            logits.copy_(2 * SURE * torch.eye(logits.shape[0]) - SURE)
            logits.requires_grad_(False)
