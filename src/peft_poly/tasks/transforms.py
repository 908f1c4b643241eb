"""What looks at operations one by one: `torch.func`, forward-mode derivatives, `torch.jit.trace`.

Custom autograd nodes, writing in place and reading numbers are not for them.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["is_symbolic", "is_transformed"]


def is_transformed() -> bool:
    """Whether such a one looks on."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_symbolic(ids: torch.Tensor) -> bool:
    """Whether the numbers of a tensor cannot be read: `torch.func.vmap` maps over it, or a trace is recorded."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(ids) or torch._C._get_tracing_state() is not None
