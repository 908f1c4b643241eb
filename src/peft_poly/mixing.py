"""Mixing of skills and low-rank updates: pure functions of tensors.

    A: (h, k, d, r) ──w──▶ A_t: (b, in, r)        in  = h * d        x: (b, ..., in)
    B: (h, k, r, o) ──w──▶ B_t: (b, r, out)       out = h * o        y = (x A_t) B_t

Letters: b batch, k skill, h split, d in-features of a split, o out-features of a split, r rank.
A mixed pair of leading size 1 serves every row.
"""

from __future__ import annotations

import torch

__all__ = ["low_rank_update", "mix_A", "mix_B"]


def mix_A(w: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """`A_t[(h, d), r] = sum_k w[h, k] A[h, k, d, r]`: `(b, h, k), (h, k, d, r) -> (b, h * d, r)`, dtype of A."""
    h, k, d, r = A.shape
    mixed = torch.bmm(w.to(A.dtype).transpose(0, 1), A.reshape(h, k, d * r))
    return mixed.transpose(0, 1).reshape(-1, h * d, r)


def mix_B(w: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """`B_t[r, (h, o)] = sum_k w[h, k] B[h, k, r, o]`: `(b, h, k), (h, k, r, o) -> (b, r, h * o)`, dtype of B."""
    h, k, r, o = B.shape
    mixed = torch.bmm(w.to(B.dtype).transpose(0, 1), B.reshape(h, k, r * o))
    return mixed.view(h, -1, r, o).permute(1, 2, 0, 3).reshape(-1, r, h * o)


def low_rank_update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * (x A) B` for each row with its own pair, or for all rows with one.

    Args:
        x: `(b, ..., in)`.
        A: `(b, in, r)` or `(1, in, r)`.
        B: `(b, r, out)` or `(1, r, out)`.
        scale: a plain number; applied to the small `(b, ..., r)` operand.

    Returns:
        `(b, ..., out)`.
    """
    if A.shape[0] == 1:  # one task: a plain LoRA, two matrix products over all tokens
        return torch.matmul(torch.matmul(x, A[0]) * scale, B[0])
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    return torch.bmm(torch.bmm(rows, A) * scale, B).view(*x.shape[:-1], B.shape[-1])
