"""The training step of one gated layer as one autograd node.

    u = x A                             (b, m, r)
    y = base + scale * (u * g) B        (b, m, out)         g (b, r): a row of gates for each row, or one for all

It saves x, u and g: what a plain LoRA saves, and a row of r numbers more for each row of the batch.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch

from ..products import grad_input, in_dtype, low_rank_update, scaled_product, through_A, to_add_to, turned_product
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
    u = through_A(x.reshape(-1, x.shape[-1]), A).view(g.shape[0], -1, g.shape[1])
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
        g, tokens = in_dtype(gates.squeeze(1), A.dtype), in_dtype(x, A.dtype)
        u = add_gated(y, tokens, g, A.view(A.shape[2:]), B.view(B.shape[2:]), scale)
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
        needs_base, needs_x, _, _, needs_A, needs_B, _, needs_g, _, needs_logits = ctx.needs_input_grad
        grad_x, grad_A, grad_B, grad_g, grad_logits = None, None, None, None, None
        of_rows = g.unsqueeze(1)
        grad_2d = grad.reshape(-1, grad.shape[-1])
        grad_y = in_dtype(grad_2d, B.dtype)
        grad_v = scaled_product(grad_y, B.view(B.shape[2:]).t(), ctx.scale).view(u.shape)
        if needs_x or needs_A:
            grad_u = (grad_v * of_rows).view(-1, g.shape[1])
            if needs_x:
                grad_x = grad_input(grad_2d, grad_u, A.view(A.shape[2:]).t(), weight, x.dtype).view(x.shape)
            if needs_A:
                tokens = in_dtype(x.reshape(-1, x.shape[-1]), A.dtype)
                grad_A = turned_product(tokens, grad_u).view(A.shape)
        if needs_B:
            v = (u * of_rows).view(-1, g.shape[1])
            grad_B = scaled_product(v.t(), grad_y, ctx.scale).view(B.shape)
        if needs_g or needs_logits:
            grad_g = in_dtype((grad_v * u).sum(dim=1, keepdim=True), gates.dtype)
        if needs_logits:
            grad_logits, grad_g = ctx.own.grad_logits(grad_g, g, None, tasks, logits), None
        grad_base = grad if needs_base else None
        return grad_base, grad_x, None, None, grad_A, grad_B, None, grad_g, None, grad_logits
