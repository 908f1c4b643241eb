"""What looks at operations one by one: `torch.func`, forward-mode derivatives, `torch.jit.trace`, checkpointing that
keeps what some of them return.

Custom autograd nodes, writing in place and reading numbers are not for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["is_symbolic", "is_traced", "is_transformed", "is_wrapped", "readable"]

# Of `create_selective_checkpoint_contexts`: the one keeps, in the forward, the other gives back.
SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


def is_transformed() -> bool:
    """Whether such a one looks on."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or is_traced()
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(_keeps_some, _get_current_dispatch_mode_stack())))
    )


def _keeps_some(mode: Any) -> bool:
    return type(mode).__name__ in SELECTIVE


def is_traced() -> bool:
    """Whether `torch.jit.trace` looks on, which keeps what is chosen and every number that is worked out."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_wrapped(value: Any) -> bool:
    """Whether a value is a tensor that `torch.func` has wrapped, so that its storage tells nothing."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def is_symbolic(ids: torch.Tensor) -> bool:
    """Whether the numbers of a tensor cannot be read: `torch.func.vmap` maps over it, or a trace is recorded."""
    return not torch.compiler.is_compiling() and (is_wrapped(ids) or is_traced())


def readable(ids: torch.Tensor) -> torch.Tensor:
    """Integers without what `torch.func` puts around all tensors to take a derivative, which these do not have."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(ids):
        ids = torch._C._functorch.get_unwrapped(ids)
    return ids
