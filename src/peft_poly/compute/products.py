"""Low-rank products: pure functions of tensors, whatever made the pairs.

    x (b, ..., in) ──▶ u = x A: (g, m, r) ──▶ y + scale * u B: (b, ..., out)          A: (g, in, r)   B: (g, r, out)

Letters: b rows of the batch, g pairs, m tokens of a pair, r rank.

- **Rows in equal runs of one pair each**: nothing is moved, the input is only viewed as `(g, m, in)`.
- **Orientation**: `A^T x^T` is a wide and short product where `x A` is a tall and thin one, which BLAS on a CPU runs
  slower for r < 16, many tokens and wide layers (what it gives is faster to go on with too), and faster else.
- **Blocks**: `(m, r) B` with small r and large m is up to 1.6 times faster there as a batch of 32-row products.
- **The scale** rides as `alpha` on the product that adds to `y`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch

from ..tasks.transforms import is_traced

__all__ = [
    "add_in_runs",
    "add_one",
    "grad_input",
    "in_dtype",
    "in_runs",
    "low_rank_update",
    "scaled_product",
    "through_A",
    "to_add_to",
    "turned_product",
]

NARROW, BLOCK, BLOCKED = 16, 32, 1 << 18  # one product of rank < NARROW with so many results runs in blocks of rows
_ZEROS: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}  # what `baddbmm` adds to, and does not read
FEW, SMALL = 16, 1 << 16  # below FEW tokens of a pair, or up to SMALL numbers of all, `x A` is the faster order


def low_rank_update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * (x A) B`, differentiable, in plain operations that a compiler can fuse.

    Args:
        x: `(b, ..., in)`.
        A: `(g, in, r)`, g equal runs of rows.
        B: `(g, r, out)`.
        scale: a plain number.

    Returns:
        `(b, ..., out)`.
    """
    traced = is_traced()
    if A.shape[0] == 1 and not traced:
        return torch.matmul(torch.matmul(x, A[0]) * scale, B[0])
    if x.shape[0] == A.shape[0] or A.shape[0] == 1:
        tokens = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    else:
        tokens = in_runs(x, A.shape[0])
    product = torch.matmul if traced else torch.bmm  # the one goes on from a trace's single pair to one for each row
    return product(product(tokens, A) * scale, B).view(*x.shape[:-1], B.shape[-1])


def to_add_to(y: torch.Tensor, owned: bool) -> torch.Tensor:
    """`y` if it can be added to in place, row after row; else a copy.

    It is no view of a product, as that of three dimensions is: what an autograd node returns as a view, autograd does
    not let a model change in place.
    """
    return y.detach() if owned and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)


def add_in_runs(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Add `scale * (x A) B` to `y` in place, for rows in equal runs, one per pair.

    Args:
        y: `(b, ..., out)`, contiguous.
        x: `(b, ..., in)`, dtype of A.
        A: `(g, in, r)`.
        B: `(g, r, out)`.
        scale: a plain number.

    Returns:
        `u = x A`, `(g, m, r)`.
    """
    if A.shape[0] == 1:  # plain products have less overhead than a batch of one
        return add_one(y, x, A[0], B[0], scale).unsqueeze(0)
    tokens = in_runs(x, A.shape[0])
    u = through_A(tokens, A)
    if y.dtype == B.dtype:
        in_runs(y, A.shape[0]).baddbmm_(u, B, alpha=scale)
    else:
        y.add_(torch.bmm(u, B).view(y.shape), alpha=scale)
    return u


def through_A(tokens: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """`u = x A` in the faster order: `([g,] m, in), ([g,] in, r) -> ([g,] m, r)`."""
    product: Callable[..., torch.Tensor] = torch.mm if tokens.dim() == 2 else torch.bmm
    return product(tokens, A) if _straight(tokens) else product(A.mT, tokens.mT).mT


def turned_product(tokens: torch.Tensor, grad_u: torch.Tensor) -> torch.Tensor:
    """`x^T grad_u`, the gradient of A, in the faster order: `([g,] m, in), ([g,] m, r) -> ([g,] in, r)`, contiguous."""
    product: Callable[..., torch.Tensor] = torch.mm if tokens.dim() == 2 else torch.bmm
    return product(tokens.mT, grad_u) if _straight(tokens) else product(grad_u.mT, tokens).mT.contiguous()


def _straight(tokens: torch.Tensor) -> bool:
    """Whether `x A` is the faster order; a GPU takes either in the same time."""
    return not tokens.is_cpu or tokens.shape[-2] < FEW or tokens.numel() <= SMALL


def add_one(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """`add_in_runs` of one pair for all rows, A `(in, r)` and B `(r, out)`; returns u `(m, r)`."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    m, (r, out) = tokens.shape[0], B.shape
    u = through_A(tokens, A)
    if y.dtype != B.dtype:
        y.add_(torch.mm(u, B).view(y.shape), alpha=scale)
    elif r < NARROW and m * out > BLOCKED and m % BLOCK == 0 and not y.is_cuda:
        blocks = u.reshape(-1, BLOCK, r)
        y.view(-1, BLOCK, out).baddbmm_(blocks, B.expand(blocks.shape[0], r, out), alpha=scale)
    else:
        (y if y.dim() == 2 else y.view(-1, out)).addmm_(u, B, alpha=scale)
    return u


def scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * a b`, `([g,] n, m), ([g,] m, p) -> ([g,] n, p)`, in one operation."""
    key = (a.dtype, a.device)
    if key not in _ZEROS:
        _ZEROS[key] = torch.zeros((), dtype=a.dtype, device=a.device)
    product: Callable[..., torch.Tensor] = torch.addmm if a.dim() == 2 else torch.baddbmm
    return product(_ZEROS[key], a, b, beta=0, alpha=scale)


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do: it is on the path of every layer."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_runs(x: torch.Tensor, g: int) -> torch.Tensor:
    """`(b, ..., n) -> (g, m, n)`, g equal runs of rows; a view where x is contiguous."""
    if x.dim() == 3 and x.shape[0] == g:
        return x
    return x.reshape(g, x.shape[:-1].numel() // max(g, 1), x.shape[-1])


def grad_input(
    grad: torch.Tensor, grad_u: torch.Tensor, A: torch.Tensor, weight: Optional[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of x: `([g,] m, out), ([g,] m, r), ([g,] r, in), (out, in) -> ([g,] m, in)`; without a weight,
    `grad_u A`.
    """
    if weight is None or not weight.dtype == grad.dtype == A.dtype == dtype:
        through_A = torch.matmul(grad_u, A).to(dtype)
        return through_A if weight is None else through_A + torch.matmul(grad, weight)
    of_base = torch.matmul(grad, weight)
    return of_base.addmm_(grad_u, A) if of_base.dim() == 2 else of_base.baddbmm_(grad_u, A)
