"""Which layers can be adapted: those whose `forward` the model calls, and whose features we know; and their names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any, Optional, Union

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..compute.base_layers import is_linear

__all__ = ["check_architecture", "check_target", "exact_targets", "warn_of_fused_experts"]

# The fused kernels of these models read the weights of these modules and never call them.
MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
MAMBA_MODULES = {"conv1d", "out_proj"}
BACKENDS = ("bitsandbytes", "HQQ", "torchao", "GPTQ", "AWQ", "AQLM", "EETQ", "INC", "Transformer Engine")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_architecture(model: nn.Module, target_name: str) -> None:
    """Raise `ValueError` for a target that its architecture bypasses."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MAMBA_TYPES and target_name in MAMBA_MODULES:
        raise ValueError(
            f"{target_name!r} cannot be adapted in a {model_type} model: its fused kernel reads the weight and never "
            f"calls the layer. Remove {sorted(MAMBA_MODULES)} from `target_modules`."
        )


def warn_of_fused_experts(model: nn.Module, targets: Any) -> None:
    """Say what is left out where experts are one parameter, so that their layers are there by no name."""
    if not isinstance(targets, (set, list, tuple)):
        return
    names = {name for name, _ in model.named_modules()}
    missing = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name] if missing else []
    if fused:
        warnings.warn(
            f"`target_modules` names {missing}, of which this model has no layer. Its experts are one parameter each, "
            f"such as `{fused[0]}`, which task-routed adapters do not reach: they stay as they are."
        )


def check_target(target: nn.Module, name: str, parent: nn.Module, **quantisation: Any) -> None:
    """Check that a layer can be adapted.

    Args:
        target: the layer, or another tuner's layer around it.
        name: its name in the model.
        parent: the module that holds it.
        quantisation: what PEFT's quantisation backends want to know.

    Raises:
        TypeError: it is no linear layer, or one whose `forward` is never called.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = resolve_quantization_backend(base, **quantisation)
    advice = "Change `target_modules`, or leave it out with `exclude_modules`."
    if not is_linear(base, backend):
        raise TypeError(
            f"Target module {name} is not supported: it is of type {type(base).__name__}. Supported are "
            f"`torch.nn.Linear`, `transformers.pytorch_utils.Conv1D` and quantised linear layers. {advice}"
        )
    if backend is None and not _is_plain(base):
        raise TypeError(
            f"Target module {name} is not supported: it is a quantised {type(base).__name__}, its weight is "
            f"{_described(base)}, and PEFT has no backend for that. Load the base model unquantised, or quantised with "
            f"one of {', '.join(BACKENDS)}. {advice}"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"Target module {name} is not supported: `torch.nn.MultiheadAttention` reads its weight and "
            f"never calls it, so an adapter would do nothing. {advice}"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"Target module {name} is not supported: in eval mode the fast path of `torch.nn.TransformerEncoderLayer` "
            "reads its weight and never calls it. Turn it off with `torch.backends.mha.set_fastpath_enabled(False)` "
            f"before the adapter is added. {advice}"
        )
    if getattr(base, "_hf_tp_plan", None):
        raise TypeError(
            f"Target module {name} is not supported: it is sharded by tensor parallelism. Load the base model without "
            "`tp_plan`, or train with DDP or FSDP."
        )


def _is_plain(base: nn.Module) -> bool:
    """Whether the weight is the matrix itself: numbers of an ordinary dtype, in a tensor of PyTorch's own."""
    weight = getattr(base, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype in DTYPES
        and type(weight).__module__.partition(".")[0] in ("deepspeed", "torch")  # a shard may be of a class of its own
    )


def _described(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return "packed into other tensors"
    return f"a {type(weight).__name__} of {weight.dtype}"


def exact_targets(
    model: nn.Module, layers: Iterable[str], modules_to_save: Optional[list[str]] = None
) -> Union[list[str], str]:
    """`target_modules` with which PEFT adapts exactly these layers of a model.

    Args:
        model: the base model, with or without adapters in it.
        layers: names of the layers.
        modules_to_save: modules that PEFT leaves out because they are saved as they are.

    Returns:
        The last parts of the names where those single out the layers, else the full names, else (where a full name is
        also the ending of another layer's) a regular expression.
    """
    wanted = set(layers)
    modules = dict(model.named_modules())
    adapters = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, adapters))
    names = {name.replace("_orig_mod.", "") for name in modules if name and not name.startswith(inside)}
    for targets in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        config = LoraConfig(target_modules=targets, modules_to_save=modules_to_save)
        if {name for name in names if check_target_module_exists(config, name)} == wanted:
            return targets
    return "|".join(re.escape(name) for name in sorted(wanted))
