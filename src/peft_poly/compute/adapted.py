"""What this wing needs of an adapted layer, so that it need not import the layer, which imports the wing."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ..tasks.context import TaskContext

__all__ = ["Adapted"]


class Adapted(Protocol):
    """An adapted layer, `peft_poly.layer.Linear`, as the functions of this wing see it."""

    training: bool
    base_layer: nn.Module
    layer_name: str
    row_dim: int
    task_context: TaskContext
    poly_lora_A: nn.ParameterDict
    poly_lora_B: nn.ParameterDict
    poly_router: nn.ModuleDict
    poly_dropout: nn.ModuleDict
    poly_type: dict[str, str]
    n_skills: dict[str, int]
    r: dict[str, int]
    scaling: dict[str, float]
    merged_adapters: list[str]
    merged_tasks: dict[str, int]
    quantization_backend: Any
    cast_input_dtype_enabled: bool
    _modules: Any
    _active_adapter: Any
    _disable_adapters: bool

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that the layer computes with."""

    def mixed_pair(self, adapter_name: str, task_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank pairs of tasks: `(b,) -> (b, in, r), (b, r, out)`."""

    def get_delta_weight(self, adapter: str, task: Any = None) -> torch.Tensor:
        """What a task adds to the base weight, in its layout."""

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer."""

    def get_base_weight(self) -> torch.Tensor:
        """Its weight, dequantised."""

    def set_base_weight(self, weight: torch.Tensor) -> None:
        """Put another weight in."""

    def _cast_input_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
