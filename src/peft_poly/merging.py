"""One task's update into a layer's base weight, and out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional, Union

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

if TYPE_CHECKING:
    from .layer import Linear

__all__ = ["merge", "unmerge"]


@torch.no_grad()
def merge(layer: Linear, safe_merge: bool, adapter_names: Optional[list[str]], task: Union[int, str, None]) -> None:
    """`Linear.merge`; with `safe_merge` a layer keeps its weight if the result would not be finite."""
    backend = layer.quantization_backend
    for name in check_adapters_to_merge(layer, adapter_names):
        if name not in layer.poly_lora_A:
            continue
        task_id = layer.task_context.one_task(name, task)
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"The {backend.backend_name} quantised layer {layer.layer_name} cannot be merged into. Merge into the "
                "unquantised base model instead."
            )
        weight = layer.get_base_weight()
        merged = weight + layer.get_delta_weight(name, task_id).to(weight)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"The merged weight of {layer.layer_name} is not finite: adapter {name!r} (or the base weight) holds "
                "NaN or infinity. Nothing was merged into this layer."
            )
        layer.set_base_weight(merged)
        layer.merged_adapters.append(name)
        layer.merged_tasks[name] = layer.task_context.merged[name] = task_id


@torch.no_grad()
def unmerge(layer: Linear, keep: Sequence[str] = ()) -> None:
    """Take merged adapters out of the base weight, the last one first, down to those in `keep`."""
    while len(layer.merged_adapters) > len(keep):
        name = layer.merged_adapters.pop()
        if name in layer.poly_lora_A:
            weight = layer.get_base_weight()
            layer.set_base_weight(weight - layer.get_delta_weight(name, layer.merged_tasks.pop(name)).to(weight))
            layer.task_context.merged.pop(name, None)
