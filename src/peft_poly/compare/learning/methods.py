"""What is compared: ways to adapt one encoder to many tasks, about as many numbers that learn in each.

The budget is the size of `PolyConfig.recommended`. A shared LoRA gets the rank that makes it as large; LoRAs per task
share that rank out, one at least each, so that of many tasks they are larger than all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from torch import nn

from ...config import PolyConfig
from ...layer import PolyLayer
from ...training.optimizer import create_poly_optimizer

__all__ = ["METHODS", "Method", "adapt", "n_trainable", "optimizer_of"]

BIAS_RATE = 10.0  # times that of the LoRA, at which a single number hardly moves
SURE = 40.0  # logit of a choice that is made: its sigmoid is 1 in float32, that of its negative 4e-18


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: what the table calls it.
        advice: what to do if it is the choice.
        kind: lora (one for all tasks), each (one per task), poly or gates.
        told: whether the name of the task stands in the text.
        own_heads: whether labels of two tasks with one text are two classes.
        own_biases: whether each task adds numbers of its own to the logits of classes that all share.
    """

    name: str
    advice: str
    kind: str
    told: bool = False
    own_heads: bool = False
    own_biases: bool = False

    @property
    def routed(self) -> bool:
        """Whether a router learns."""
        return self.kind in ("poly", "gates")


RECOMMENDED = "train `PolyConfig.recommended"
# The simplest first: where several do as well, the verdict names the first of them.
METHODS = (
    Method("one shared LoRA", "train one LoRA on all rows", "lora"),
    Method("shared LoRA, told the task", "train one LoRA, and put the task's name before each text", "lora", told=True),
    Method(
        "shared LoRA, bias per task",
        "train one LoRA, with a bias for each task and label beside its head",
        "lora",
        own_biases=True,
    ),
    Method("shared LoRA, head per task", "train one LoRA, with a head for each task", "lora", own_heads=True),
    Method("a LoRA per task", "train a LoRA for each task", "each", own_heads=True),
    Method("gates, head per task", f'{RECOMMENDED}(poly_type="gates", task_labels=...)`', "gates", own_heads=True),
    Method("Poly, head per task", f"{RECOMMENDED}(task_labels=...)`", "poly", own_heads=True),
)
REFERENCE = METHODS[0]


def adapt(method: Method, encoder: nn.Module, targets: list[str], tasks: list[str]) -> Any:
    """The encoder with the adapter of a method, changed in place; `unload()` of what is returned gives it back.

    Args:
        method: what is built.
        encoder: a model of transformers.
        targets: names of the layers to adapt.
        tasks: names of the tasks.

    Raises:
        ValueError: a layer cannot be adapted.
    """
    if method.routed:
        return _with(encoder, targets, PolyConfig.recommended(task_names=tasks, poly_type=cast(Any, method.kind)))
    rank = _fitting_rank(encoder, targets, tasks)
    if method.kind == "lora":
        return _with(encoder, targets, peft.LoraConfig(r=rank, lora_alpha=rank))
    r = max(1, round(rank / len(tasks)))
    config = PolyConfig(r=r, lora_alpha=r, n_skills=len(tasks), task_names=tasks, router_noise=False)
    return _one_skill_each(_with(encoder, targets, config))


def _with(encoder: nn.Module, targets: list[str], config: Any) -> Any:
    config.target_modules, config.task_type = set(targets), peft.TaskType.FEATURE_EXTRACTION
    return peft.get_peft_model(cast(Any, encoder), config)


def _fitting_rank(encoder: nn.Module, targets: list[str], tasks: list[str]) -> int:
    """The rank at which a LoRA is as large as the routed adapter, as nearly as can be."""
    routed = _with(encoder, targets, PolyConfig.recommended(task_names=tasks))
    layers = [module for module in routed.modules() if isinstance(module, PolyLayer)]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    size = n_trainable(routed)
    routed.unload()
    return max(1, round(size / per_rank))


@torch.no_grad()
def _one_skill_each(model: nn.Module) -> nn.Module:
    """Skill t is task t's own: a LoRA per task, trained in one model on the same batches as the other methods."""
    for layer in model.modules():
        if isinstance(layer, PolyLayer):
            logits = cast(nn.Parameter, layer.poly_router["default"].module_logits)
            logits.copy_(2 * SURE * torch.eye(len(logits)) - SURE)
            logits.requires_grad_(False)
    return model


def n_trainable(model: nn.Module) -> int:
    """Numbers that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_of(
    method: Method, model: nn.Module, lr: float, biases: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """AdamW without weight decay; routers have the rate of their config, and biases of tasks ten times the others'."""
    if method.routed:
        return create_poly_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad and p is not biases]}]
    groups += [] if biases is None else [{"params": [biases], "lr": BIAS_RATE * lr}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
