"""Gradients that are to be differentiated again: those of plain operations, in the place of a hand-written backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch

from ...tasks.transforms import is_transformed

__all__ = ["by_plain_operations", "wants_a_graph"]


def wants_a_graph() -> bool:
    """Whether a backward that runs now is differentiated itself, or mapped over."""
    return torch.is_grad_enabled() or is_transformed()


def by_plain_operations(
    ctx: Any, grad: torch.Tensor, update: Callable[[], torch.Tensor], x: torch.Tensor, weight: Optional[torch.Tensor],
    parameters: dict[int, torch.Tensor],
) -> tuple[Optional[torch.Tensor], ...]:  # fmt: skip
    """The gradients of a node whose inputs are `base, x, ...`, with a graph of their own.

    Args:
        ctx: the node's context.
        grad: `(b, ..., out)`, the gradient of what the node returned.
        update: computes what the node added to the base, `(b, ..., out)`, anew.
        x: `(b, ..., in)`.
        weight: `(out, in)` where the node computed the base's product with x; else None.
        parameters: what else may take a gradient, by its place among the inputs.
    """
    places = {1: x, **parameters}
    wanted = [place for place in places if ctx.needs_input_grad[place]]
    gradients: list[Optional[torch.Tensor]] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        gradients[0] = grad
    if wanted:
        with torch.enable_grad():
            y = update().to(grad.dtype)
            if weight is not None:
                y = y + torch.nn.functional.linear(x, weight)
        found = torch.autograd.grad(y, [places[place] for place in wanted], grad, create_graph=True)
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
    return tuple(gradients)
