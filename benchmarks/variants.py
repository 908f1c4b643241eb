"""The four that are compared: the bare model, PEFT's LoRA, PEFT's own Poly, and this package, with equal tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import nn

import peft_poly

from .models import SHAPES

__all__ = ["Variant", "make_variants", "variants_on"]


class Variant:
    """A model, and how it is told the tasks."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.routed = name in ("poly", "ours")

    def __call__(self, task_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The logits of a forward, or a bare stack's output."""
        model = self.model
        if self.name == "poly" and type(model) is peft.PeftModel:
            model = model.base_model  # a plain PeftModel hands no task ids to PEFT's own Poly
        output = model(**inputs, task_ids=task_ids) if self.routed else model(**inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    def generate(self, task_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return self.model.generate(**inputs, **({"task_ids": task_ids} if self.routed else {}))


def make_variants(shape_name: str, r: int, n_skills: int, n_splits: int, n_tasks: int) -> dict[str, Variant]:
    """The variants of a shape of `models.SHAPES`."""
    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    return variants_on(shape.make(), shape.targets, shape.task_type, r, n_skills, n_splits, n_tasks)


def variants_on(
    base: nn.Module, targets: Sequence[str], task_type: str | None, r: int, skills: int, splits: int, tasks: int
) -> dict[str, Variant]:
    """`base`, `lora`, `poly` (PEFT's own) and `ours`; the last two have the same tensors, drawn as after training."""
    base.requires_grad_(False)
    common: dict[str, Any] = {"task_type": task_type, "r": r, "target_modules": list(targets)}
    routed = {**common, "n_tasks": tasks, "n_skills": skills, "n_splits": splits, "init_weights": False}
    models = {
        "base": base,
        "lora": peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**common, init_lora_weights=False)),
        "poly": peft.get_peft_model(copy.deepcopy(base), peft.PolyConfig(**routed)),
        "ours": peft.get_peft_model(copy.deepcopy(base), peft_poly.PolyConfig(**routed)),
    }
    _share_tensors(models["poly"], models["ours"])
    for model in models.values():
        _let_gradients_reach_the_bottom(model)
    return {name: Variant(name, model) for name, model in models.items()}


def _share_tensors(source: nn.Module, target: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {name: p for name, p in source.named_parameters() if "poly_" in name}
    for name, tensor in tensors.items():
        if name.endswith("module_logits"):  # tasks told apart, as after training
            tensor.data.copy_(2 * torch.randn(tensor.shape, generator=generator))
    for name, tensor in target.named_parameters():
        if "poly_" in name:
            tensor.data.copy_(tensors[name])


def _let_gradients_reach_the_bottom(model: nn.Module) -> None:
    """So that each variant, the bare model too, computes the gradient of every layer's input."""

    def require(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(require)
