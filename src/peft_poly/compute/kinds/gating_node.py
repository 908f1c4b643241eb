"""The training step of one gated layer as one autograd node.

    u = x A                             (b, m, r)
    y = base + scale * (u * g) B        (b, m, out)         g (b, r): a row of gates for each row, or one for all

It saves x, u and g: what a plain LoRA saves, and a row of r numbers more for each row of the batch.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch

from ..products import FEW, grad_input, in_runs, low_rank_update, scaled_product, to_add_to
from .routed import OwnRouting
from .second_derivatives import by_plain_operations, wants_a_graph

__all__ = ["GatedUpdate", "add_gated"]

Gradients = tuple[Optional[torch.Tensor], ...]


def add_gated(
    y: torch.Tensor, x: torch.Tensor, g: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Add `scale * ((x A) * g) B` to `y` in place.

    Args:
        y: `(b, ..., out)`, contiguous.
        x: `(b, ..., in)`, dtype of A.
        g: `(b, r)`, or `(1, r)` for all rows; dtype of A.
        A: `(in, r)`.
        B: `(r, out)`.
        scale: a plain number.

    Returns:
        `u = x A`, `(n, m, r)` for g of n rows.
    """
    tokens = x.reshape(-1, x.shape[-1])
    u = torch.mm(tokens, A) if tokens.shape[0] < FEW else torch.mm(A.t(), tokens.t()).t()
    u = u.view(g.shape[0], -1, g.shape[1])
    v = (u * g.unsqueeze(1)).view(-1, g.shape[1])
    if y.dtype == B.dtype:
        y.view(-1, y.shape[-1]).addmm_(v, B, alpha=scale)
    else:
        y.add_(torch.mm(v, B).view(y.shape), alpha=scale)
    return u


class GatedUpdate(torch.autograd.Function):
    """`y = base + scale * ((x A) * g) B`; `base` is given, or is `F.linear(x, weight, bias)` with a frozen weight.

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
        scale: float,
        gates: torch.Tensor,
        own: Optional[OwnRouting] = None,
        logits: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Shapes: base `(b, ..., out)`, x `(b, ..., in)`, weight `(out, in)`, A `(1, 1, in, r)`, B `(1, 1, r, out)`,
        gates `(b, 1, r)` or `(1, 1, r)`; returns `(b, ..., out)`.

        The gradient of the gates goes to them; or, where the layer was routed by itself, to its logits `(t, r)`.
        """
        if base is None and weight is not None:
            y = to_add_to(torch.nn.functional.linear(x, weight, bias), owned=True)
        else:
            y = to_add_to(cast(torch.Tensor, base), owned=False)
        g = gates[:, 0] if gates.dtype == A.dtype else gates[:, 0].to(A.dtype)
        u = add_gated(y, x if x.dtype == A.dtype else x.to(A.dtype), g, A[0, 0], B[0, 0], scale)
        ctx.save_for_backward(x, u, g, A, B, weight, None if own is None else own.tasks, gates, logits)
        ctx.own, ctx.scale = own, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        """Gradients of x, A, B and the gates or logits; those that nobody asked for are not computed."""
        x, u, g, A, B, weight, tasks, gates, logits = ctx.saved_tensors
        if wants_a_graph():

            def update() -> torch.Tensor:
                each = (gates if logits is None else ctx.own.again(logits)).to(A.dtype)
                return low_rank_update(x.to(A.dtype), each * A[0], B[0].expand(len(each), *B.shape[2:]), ctx.scale)

            return by_plain_operations(ctx, grad, update, x, weight, {4: A, 5: B, 7: gates, 9: logits})
        needs_x, needs_A, needs_B, needs_g, needs_logits = (ctx.needs_input_grad[i] for i in (1, 4, 5, 7, 9))
        grad_base = grad if ctx.needs_input_grad[0] else None
        grad_y = grad if grad.dtype == B.dtype else grad.to(B.dtype)
        tokens_of_y = grad_y.reshape(-1, B.shape[-1])
        grad_v = scaled_product(B[0], tokens_of_y.t().unsqueeze(0), ctx.scale)[0].t().view(u.shape)
        grad_x, grad_A, grad_B, grad_g, grad_logits = None, None, None, None, None
        if needs_x or needs_A:
            grad_u = (grad_v * g.unsqueeze(1)).view(1, -1, g.shape[1])
            if needs_x:
                grad_x = grad_input(in_runs(grad, 1), grad_u, A[0].transpose(1, 2), weight, x.dtype).view(x.shape)
            if needs_A:
                tokens = x.reshape(-1, x.shape[-1])
                # wide and turned: half the time of the tall product, and laid out as A is
                grad_A = torch.mm(grad_u[0].t(), tokens.to(A.dtype)).t().contiguous().view(A.shape)
        if needs_B:
            v = (u * g.unsqueeze(1)).view(1, -1, g.shape[1])
            grad_B = scaled_product(v.transpose(1, 2), tokens_of_y.unsqueeze(0), ctx.scale).view(B.shape)
        if needs_g or needs_logits:
            grad_g = (grad_v * u).sum(dim=1, keepdim=True).to(gates.dtype)
        if needs_logits:
            grad_logits, grad_g = ctx.own.grad_logits(grad_g, g, None, tasks, logits), None
        return grad_base, grad_x, None, None, grad_A, grad_B, None, grad_g, None, grad_logits
