"""What is compared, by name: the bare model, PEFT's ways to do the same work, and each kind of this package's adapters.

base        the bare model                 merged    one task's update in the weights
lora        one LoRA for all rows: it cannot tell tasks apart, so it does the same work only where there is one
adapters    a LoRA for each task in use and `adapter_names` for the rows: the tasks of `mhr`, exported
upstream poly, upstream mhr                PEFT's own Poly, with the very tensors of ours
poly, mhr, gates                           ours; a kind that this version does not accept is left out
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from torch import nn

import peft_poly

__all__ = ["KINDS", "Variant", "Variants", "kinds_here"]

KINDS = ("poly", "mhr", "gates")


def _settings(kind: str, skills: int, splits: int) -> dict[str, Any]:
    """What makes an adapter one of a kind."""
    return {
        "poly": {"poly_type": "poly", "n_skills": skills, "n_splits": 1},
        "mhr": {"poly_type": "poly", "n_skills": skills, "n_splits": splits},
        "gates": {"poly_type": "gates"},
    }[kind]


def kinds_here() -> tuple[str, ...]:
    """The kinds that `PolyConfig` accepts."""

    def accepted(kind: str) -> bool:
        try:
            peft_poly.PolyConfig(**_settings(kind, 8, 4))
        except ValueError:
            return False
        return True

    return tuple(kind for kind in KINDS if accepted(kind))


class Variant:
    """A model, and how it is told the tasks of the rows."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model

    def __call__(self, task_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The logits of a forward, or a bare stack's output."""
        model = self.model
        if self.name.startswith("upstream") and type(model) is peft.PeftModel:
            model = model.base_model  # a plain PeftModel hands no task ids to PEFT's own Poly
        output = model(**inputs, **self._told(task_ids))
        return output if isinstance(output, torch.Tensor) else output.logits

    def generate(self, task_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return self.model.generate(**inputs, **self._told(task_ids))

    def _told(self, task_ids: torch.Tensor) -> dict[str, Any]:
        if self.name == "adapters":
            return {"adapter_names": [str(task) for task in task_ids.tolist()]}
        return {} if self.name in ("base", "merged", "lora") else {"task_ids": task_ids}

    def serving(self) -> AbstractContextManager[Any]:
        """A block in which no parameter changes; for others than ours, no block."""
        return self.model.serving() if self.name in KINDS else nullcontext()

    @property
    def serves(self) -> bool:
        return self.name in KINDS and hasattr(self.model, "serving")


class Variants:
    """The variants on one base model, each made when it is first asked for; all but `merged` share its weights.

    Args:
        base: the model; it is frozen.
        targets: names of the layers to adapt.
        task_type: PEFT's.
        r, skills, splits, tasks: sizes of the adapters.
        to_the_bottom: every variant computes the gradient of every layer's input; False: the bare model alone, which
            has no backward without.
    """

    def __init__(
        self,
        base: nn.Module,
        targets: Sequence[str],
        task_type: str | None,
        r: int = 8,
        skills: int = 8,
        splits: int = 4,
        tasks: int = 64,
        to_the_bottom: bool = True,
    ) -> None:
        self._base, self.tasks, self.to_the_bottom = base.requires_grad_(False), tasks, to_the_bottom
        self._common: dict[str, Any] = {"task_type": task_type, "r": r, "target_modules": list(targets)}
        self._sizes = (skills, splits)
        self._made: dict[str, Variant] = {}
        self.loading: list[float] = []  # seconds to load each LoRA of `adapters`

    def __getitem__(self, name: str) -> Variant:
        if name not in self._made:
            torch.manual_seed(0)
            model = self._make(name)
            if self.to_the_bottom or name == "base":
                _let_gradients_reach_the_bottom(model)
            self._made[name] = Variant(name, model)
        return self._made[name]

    def _make(self, name: str) -> nn.Module:
        if name == "base":
            return self._bare()
        if name == "lora":
            return self._adapted(self._bare(), peft.LoraConfig(**self._common, init_lora_weights=False))
        if name == "adapters":
            return self._exported([0])
        if name == "merged":
            model = self._ours("mhr", copy.deepcopy(self._base))
            model.merge_adapter(task=self.tasks - 1)
            return model
        if name.startswith("upstream "):
            kind = name.removeprefix("upstream ")
            settings = {**_settings(kind, *self._sizes), **self._common, "n_tasks": self.tasks}
            model = self._adapted(self._bare(), peft.PolyConfig(**settings))
            ours = dict(self[kind].model.named_parameters())
            for key, tensor in model.named_parameters():
                if "poly_" in key:
                    tensor.data.copy_(ours[key])
            return model
        return self._ours(name, self._bare())

    def _bare(self) -> nn.Module:
        return copy.deepcopy(self._base, {id(t): t for t in (*self._base.parameters(), *self._base.buffers())})

    def _adapted(self, base: nn.Module, config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(base, config, autocast_adapter_dtype=False)  # all in the base model's dtype

    def _ours(self, kind: str, base: nn.Module) -> Any:
        """An adapter as after training: skills drawn, tasks told apart."""
        settings = {**_settings(kind, *self._sizes), **self._common, "n_tasks": self.tasks, "init_weights": False}
        model = self._adapted(base, peft_poly.PolyConfig(**settings))
        generator = torch.Generator().manual_seed(2)
        for name, tensor in model.named_parameters():
            if name.endswith("module_logits"):
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.data.copy_(drawn * (0.5 if kind == "gates" else 2))
        return model

    def load(self, tasks: Iterable[int]) -> None:
        """Give `adapters` the LoRAs of these tasks: of the many, only those in use."""
        model: Any = self["adapters"].model
        self._exported([task for task in tasks if str(task) not in model.peft_config], model)

    def _exported(self, tasks: Sequence[int], model: Any = None) -> Any:
        for task in tasks:
            with tempfile.TemporaryDirectory() as folder:
                self["mhr"].model.export_lora(task, folder, overwrite=True)
                how = {"adapter_name": str(task), "autocast_adapter_dtype": False}
                begin = time.perf_counter()
                if model is None:
                    model = peft.PeftModel.from_pretrained(self._bare(), folder, **how)
                else:
                    model.load_adapter(folder, **how)
                self.loading.append(time.perf_counter() - begin)
        return model


def _let_gradients_reach_the_bottom(model: nn.Module) -> None:
    def require(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(require)
