"""One task's update into a layer's base weight, and out again."""

from __future__ import annotations

from typing import Any, Optional, Union, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from .adapted import Adapted
from .gradients import is_repacked
from .states import lasting

__all__ = ["merge", "merged_weight", "unmerge"]


@lasting()
def merge(layer: Adapted, safe_merge: bool, adapter_names: Optional[list[str]], task: Union[int, str, None]) -> None:
    """`Linear.merge`; with `safe_merge` a layer keeps its weight if the result would not be finite."""
    names = [name for name in check_adapters_to_merge(cast(Any, layer), adapter_names) if name in layer.poly_lora_A]
    tasks = {name: layer.task_context.one_task(name, task) for name in names}
    if not tasks:
        return
    layer.set_base_weight(merged_weight(layer, tasks, safe_merge))
    layer.merged_adapters.extend(tasks)
    layer.merged_tasks.update(tasks)
    layer.task_context.merged.update(tasks)


@lasting()
def merged_weight(layer: Adapted, tasks: dict[str, int], finite: bool) -> torch.Tensor:
    """The base weight with one task of each adapter added, in the weight's layout and dtype; the layer stays as it is.

    Args:
        layer: the layer.
        tasks: the task's id, by adapter.
        finite: check for NaN and infinity.

    Raises:
        ValueError: the weight would not be finite; the quantised layer cannot be merged into.
    """
    backend = layer.quantization_backend
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"The {backend.backend_name} quantised layer {layer.layer_name} cannot be merged into. Merge into the "
            "unquantised base model instead."
        )
    weight = _base_weight(layer)
    for name, task_id in tasks.items():
        weight = _plus(weight, layer.get_delta_weight(name, task_id))
        if finite and not torch.isfinite(weight).all():
            raise ValueError(
                f"The merged weight of {layer.layer_name} is not finite: adapter {name!r} (or the base weight) holds "
                "NaN or infinity. Nothing was merged."
            )
    return weight


@lasting()
def unmerge(layer: Adapted) -> None:
    """Take all merged adapters out of the base weight, the last one first."""
    while layer.merged_adapters:
        name = layer.merged_adapters[-1]
        if name in layer.poly_lora_A:
            delta = layer.get_delta_weight(name, layer.merged_tasks[name])
            layer.set_base_weight(_plus(_base_weight(layer), -delta))
            del layer.merged_tasks[name]
            layer.task_context.merged.pop(name, None)
        layer.merged_adapters.pop()


def _base_weight(layer: Adapted) -> torch.Tensor:
    """The weight of the base layer, dequantised; an error where bitsandbytes has put it out of PEFT's reach."""
    if is_repacked(layer.get_base_layer()):
        raise ValueError(
            f"The 4-bit weight of {layer.layer_name} cannot be read any more: on this CPU bitsandbytes repacks it in "
            "the first call in eval mode. Set `support_avx512bf16_for_cpu = False` on every Linear4bit after loading "
            "the base model, or merge before the first call."
        )
    return layer.get_base_weight()


def _plus(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum in the dtype of `weight`, rounded once."""
    return (weight + delta.to(weight.device)).to(weight.dtype)
