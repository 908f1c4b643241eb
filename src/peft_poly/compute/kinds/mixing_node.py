"""The training step of one adapted layer as one autograd node.

    A_t, B_t = mix(w, A), mix(w, B)                                 (g, in, r), (g, r, out)
    u = x A_t                                                       (g, m, r)
    y = base + scale * u B_t                                        (g, m, out)

It saves x, u and the weights, and mixes A_t and B_t again in the backward: what a plain LoRA saves, where plain
operations would keep a mixed pair per row. Letters as in `mixing`.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch

from ..products import (
    add_in_runs,
    grad_input,
    in_dtype,
    in_runs,
    low_rank_update,
    scaled_product,
    to_add_to,
    turned_product,
)
from .mixing import as_skills, mix_A, mix_B, worth_turning
from .routed import OwnRouting
from .second_derivatives import by_plain_operations, wants_a_graph

__all__ = ["PolyUpdate"]

Gradients = tuple[Optional[torch.Tensor], ...]


class PolyUpdate(torch.autograd.Function):
    """`y = base + update`, where `base` is given, or is `F.linear(x, weight, bias)` with a frozen weight.

    With the base product inside the node, its output can be added to in place, and the gradient of x is one sum.

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
        w: torch.Tensor,
        own: Optional[OwnRouting] = None,
        logits: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Shapes: base `(b, ..., out)`, x `(b, ..., in)`, weight `(out, in)`, A `(h, k, d, r)`, B `(h, k, r, o)`,
        w `(g, h, k)` for g equal runs of rows; returns `(b, ..., out)`.

        The gradient of the weights goes to w; or, where the layer was routed by itself, to its logits `(t, h * k)`.
        """
        if base is None and weight is not None:
            y = to_add_to(torch.nn.functional.linear(x, weight, bias), owned=True)
        else:
            y = to_add_to(cast(torch.Tensor, base), owned=False)
        tokens, weights = in_dtype(x, A.dtype), as_skills(w, A, B)
        mixed_A = mix_A(weights, A, turned=worth_turning(x, len(w)), placed=True)
        u = add_in_runs(y, tokens, mixed_A, mix_B(weights, B), scale)
        p, tasks = (None, None) if own is None else (own.p, own.tasks)
        ctx.save_for_backward(x, u, w, p, A, B, weight, tasks, logits)
        ctx.own, ctx.scale = own, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        """Gradients of x, A, B and w or logits; those that nobody asked for are not computed."""
        x, u, w, p, A, B, weight, tasks, logits = ctx.saved_tensors
        if wants_a_graph():

            def update() -> torch.Tensor:
                weights = w if logits is None else ctx.own.again(logits)
                return low_rank_update(x.to(A.dtype), mix_A(weights, A), mix_B(weights, B), ctx.scale)

            return by_plain_operations(ctx, grad, update, x, weight, {4: A, 5: B, 7: w, 9: logits})
        needs_base, needs_x, _, _, needs_A, needs_B, _, needs_w, _, needs_logits = ctx.needs_input_grad
        grad_x, grad_A, grad_B, grad_w, grad_logits = None, None, None, None, None
        (h, _, d, r), o, g = A.shape, B.shape[-1], len(w)
        grad_base = grad if needs_base else None
        weights = as_skills(w, A, B)
        grad_runs = in_runs(grad, g)
        grad_y = in_dtype(grad_runs, B.dtype)
        # the gradient of u: (g, r, m), turned, which is the fast orientation for all that follows
        grad_u = scaled_product(mix_B(weights, B), grad_y.mT, ctx.scale).mT
        if needs_x:
            grad_x = grad_input(grad_runs, grad_u, mix_A(weights, A, placed=True).mT, weight, x.dtype).view(x.shape)
        if not (needs_A or needs_B or needs_w or needs_logits):
            return grad_base, grad_x, *[None] * 8
        # gradients of the mixed pair, in the skills' layout (h, g, ...)
        mixed_A = turned_product(in_dtype(in_runs(x, g), A.dtype), grad_u)
        mixed_A = mixed_A.view(g, h, d * r).transpose(0, 1)
        mixed_B = scaled_product(u.mT, grad_y, ctx.scale)
        mixed_B = mixed_B.view(g, r, h, o).permute(2, 0, 1, 3).reshape(h, g, r * o)
        weights = in_dtype(weights, A.dtype).permute(1, 2, 0)  # (h, k, g)
        if needs_A:
            grad_A = torch.bmm(weights, mixed_A).view(A.shape)
        if needs_B:
            grad_B = torch.bmm(weights, mixed_B).view(B.shape)
        if needs_w or needs_logits:
            grad_w = torch.bmm(mixed_A, A.flatten(2).mT).baddbmm_(mixed_B, B.flatten(2).mT)
            grad_w = in_dtype(grad_w.transpose(0, 1), w.dtype)
        if needs_logits:
            grad_logits, grad_w = ctx.own.grad_logits(grad_w, w, p, tasks, logits), None
        return grad_base, grad_x, None, None, grad_A, grad_B, None, grad_w, None, grad_logits
