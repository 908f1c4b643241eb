"""What must be known of a base layer: whether it is linear, whether anything watches it, whose its output is."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from torch.nn.modules import module as module_internals
from transformers.pytorch_utils import Conv1D

__all__ = ["PLAIN_TENSORS", "base_output", "frozen_product", "is_linear", "is_watched"]

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def is_linear(base: nn.Module, backend: Any) -> bool:
    """Whether a layer, with PEFT's quantisation backend for it or None, is one that can be adapted."""
    return isinstance(base, (nn.Linear, Conv1D)) or getattr(backend, "layer_type", None) == "linear"


def base_output(base: Any, x: torch.Tensor, args: Any, kwargs: Any) -> tuple[torch.Tensor, bool]:
    """The base layer's output `(b, ..., out)`, and whether nobody else can hold it."""
    if is_watched(base) or type(base) not in (nn.Linear, Conv1D):
        return base(x, *args, **kwargs), False
    weight = base._parameters.get("weight")
    if weight is None or args or kwargs or type(base) is Conv1D:
        return base(x, *args, **kwargs), True
    return nn.functional.linear(x, weight, base._parameters["bias"]), True


def frozen_product(base: Any) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Weight and bias of a base layer that does nothing but `linear` with tensors that take no gradient, or Nones."""
    if type(base) is not nn.Linear or is_watched(base):
        return None, None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if (
        weight is None
        or type(weight) not in PLAIN_TENSORS
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None, None
    return (None, None) if bias is None and base.bias is not None else (weight, bias)


def _torchs_own(method: Any, file_of: Any) -> Any:
    """A method of a class if it is still the one that its file defines, else a mark that nothing equals."""
    same = getattr(method, "__code__", None) is not None and method.__code__.co_filename == file_of.__code__.co_filename
    return method if same else object()


# Profilers and other instruments replace these, on the class, before or after this package is imported.
FORWARDS = {
    nn.Linear: _torchs_own(nn.Linear.forward, nn.Linear.reset_parameters),
    Conv1D: _torchs_own(Conv1D.forward, Conv1D.__init__),
}
CALL = _torchs_own(nn.Module.__call__, nn.Module.register_buffer)


def is_watched(base: nn.Module) -> bool:
    """Whether a hook may see, keep or change what a layer returns, or its `forward` was replaced."""
    kind = type(base)
    return bool(
        kind.__call__ is not CALL
        or kind.forward is not FORWARDS.get(kind, kind.forward)
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
        or module_internals._global_forward_hooks
        or module_internals._global_forward_pre_hooks
        or module_internals._global_backward_hooks
        or module_internals._global_backward_pre_hooks
    )
