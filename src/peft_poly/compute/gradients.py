"""Quantised base layers that pass no gradients on, found before anything is trained in vain: they fail in silence.

bitsandbytes in 4 bits, on CPUs with AVX512-BF16: the first call in eval mode repacks the weight in place for a kernel
that has no backward, and nothing else can read the new layout, a merge neither. A flag of the layer prevents it.

torchao with inputs rounded to int8: the rounding has no gradient.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

__all__ = ["is_repacked", "let_gradients_pass", "warn_of_rounding"]

FLAG = "support_avx512bf16_for_cpu"


def is_repacked(layer: nn.Module) -> bool:
    """Whether the 4-bit weight of a layer lies in the layout that only bitsandbytes' kernel for inference reads."""
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def let_gradients_pass(model: nn.Module) -> None:
    """Have no 4-bit layer of a model repack its weight; all of them pass gradients on, adapted or not.

    Raises:
        ValueError: a weight was repacked before. The model is left as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if FLAG in vars(layer)}
    if repacked := [name for name, layer in layers.items() if is_repacked(layer)]:
        raise ValueError(
            f"The 4-bit weight of {repacked[0]} (one of {len(repacked)}) gives no gradients any more: the base model "
            "was called in eval mode before, and on this CPU bitsandbytes repacks 4-bit weights then. Load the base "
            f"model again, and add the adapter before the first call; or set `{FLAG} = False` on every Linear4bit "
            "after loading."
        )
    for layer in layers.values():
        setattr(layer, FLAG, False)


def warn_of_rounding(model: nn.Module) -> None:
    """Warn if layers of a model round their input, through which nothing is trained."""
    if rounding := [name for name, layer in model.named_modules() if _rounds_its_input(layer)]:
        warnings.warn(
            f"{rounding[0]} (one of {len(rounding)}) rounds its input to int8, through which torchao passes no "
            "gradients on: what comes before it in the model is not trained. Quantise the base model with "
            "`Int8WeightOnlyConfig` for training."
        )


def _rounds_its_input(layer: nn.Module) -> bool:
    weight: Any = vars(layer).get("_parameters", {}).get("weight")
    return type(weight).__name__ == "Int8Tensor" and getattr(weight, "act_quant_kwargs", None) is not None
