"""The training step of one gated layer as one autograd node.

    s = scale * g                       (b, r), a row of gates for each row of the batch, or one for all
    u = x A                             (b, m, r)
    y = base + (u * s) B                (b, m, out)

It saves x, u and s: what a plain LoRA saves, and a row of r numbers more for each row of the batch.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch

from ..products import FEW, grad_input, in_runs, low_rank_update, to_add_to
from .second_derivatives import by_plain_operations, wants_a_graph

__all__ = ["GatedUpdate", "add_gated"]

Gradients = tuple[Optional[torch.Tensor], ...]


def add_gated(
    y: torch.Tensor, x: torch.Tensor, s: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Add `scale * ((x A) * s) B` to `y` in place.

    Args:
        y: `(b, ..., out)`, contiguous.
        x: `(b, ..., in)`, dtype of A.
        s: `(b, r)`, or `(1, r)` for all rows; dtype of A.
        A: `(in, r)`.
        B: `(r, out)`.
        scale: a plain number.

    Returns:
        `u = x A`, `(g, m, r)` for s of g rows.
    """
    tokens = x.reshape(-1, x.shape[-1])
    u = torch.mm(tokens, A) if tokens.shape[0] < FEW else torch.mm(A.t(), tokens.t()).t()
    u = u.view(s.shape[0], -1, s.shape[1])
    v = (u * s.unsqueeze(1)).view(-1, s.shape[1])
    if y.dtype == B.dtype:
        y.view(-1, y.shape[-1]).addmm_(v, B, alpha=scale)
    else:
        y.add_(torch.mm(v, B).view(y.shape), alpha=scale)
    return u


class GatedUpdate(torch.autograd.Function):
    """`y = base + ((x A) * s) B`, where `base` is given, or is `F.linear(x, weight, bias)` with a frozen weight.

    Twice differentiable: where a gradient is to be differentiated again, it is that of plain operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Optional[torch.Tensor],
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        A: torch.Tensor,
        B: torch.Tensor,
        s: torch.Tensor,
    ) -> torch.Tensor:
        """Shapes: base `(b, ..., out)`, x `(b, ..., in)`, weight `(out, in)`, A `(1, 1, in, r)`, B `(1, 1, r, out)`,
        s `(b, r)` or `(1, r)`; returns `(b, ..., out)`.
        """
        if base is None and weight is not None:
            y = to_add_to(torch.nn.functional.linear(x, weight, bias), owned=True)
        else:
            y = to_add_to(cast(torch.Tensor, base), owned=False)
        gates = s if s.dtype == A.dtype else s.to(A.dtype)
        u = add_gated(y, x if x.dtype == A.dtype else x.to(A.dtype), gates, A[0, 0], B[0, 0])
        ctx.save_for_backward(x, u, gates, A, B, weight, s)
        ctx.s_dtype = s.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        """Gradients of x, A, B and s; those that nobody asked for are not computed."""
        x, u, s, A, B, weight, given = ctx.saved_tensors
        if wants_a_graph():

            def update() -> torch.Tensor:
                pairs = given.to(A.dtype).unsqueeze(1) * A[0], B[0].expand(len(given), *B.shape[2:])
                return low_rank_update(x.to(A.dtype), *pairs, 1.0)

            return by_plain_operations(ctx, grad, update, x, weight, {4: A, 5: B, 6: given})
        needs = ctx.needs_input_grad
        grad_base = grad if needs[0] else None
        grad_y = grad if grad.dtype == B.dtype else grad.to(B.dtype)
        tokens_of_y = grad_y.reshape(-1, B.shape[-1])
        grad_v = torch.mm(B[0, 0], tokens_of_y.t()).t().view(u.shape)
        grad_s = (grad_v * u).sum(dim=1).to(ctx.s_dtype) if needs[6] else None
        grad_x, grad_A, grad_B = None, None, None
        if needs[1] or needs[4]:
            grad_u = (grad_v * s.unsqueeze(1)).view(-1, s.shape[1])
            if needs[1]:
                grad_x = grad_input(in_runs(grad, 1), grad_u.unsqueeze(0), A[0].transpose(1, 2), weight, x.dtype).view(
                    x.shape
                )
            if needs[4]:
                tokens = x.reshape(-1, x.shape[-1])
                grad_A = torch.mm(grad_u.t(), tokens.to(A.dtype)).t().view(A.shape)
        if needs[5]:
            v = (u * s.unsqueeze(1)).view(-1, s.shape[1])
            grad_B = torch.mm(v.t(), tokens_of_y).view(B.shape)
        return grad_base, grad_x, None, None, grad_A, grad_B, grad_s
