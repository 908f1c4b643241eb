"""Mixing of skills, and the update of rows of several tasks: pure functions of tensors.

    A: (h, k, d, r) ──w──▶ A_t: (g, in, r)        in  = h * d        x: (b, ..., in)
    B: (h, k, r, o) ──w──▶ B_t: (g, r, out)       out = h * o        y = (x A_t) B_t * scale

Letters: b rows of the batch, g mixed pairs, m tokens of a pair, k skill, h split, d in-features of a split, o
out-features of a split, r rank.

What is cheap, and why `add_update` chooses as it does:

- **Mix the parameters, once per distinct task.** A mixed pair costs `k (in + out) r` multiplications, whatever the
  number of rows and tokens; mixing the outputs of all skills instead costs k times the update itself for every token,
  and its many small tensors cost more still on few tokens.
- **One pair, or rows in equal runs of one task each**: nothing is moved, the input is only viewed as `(g, m, in)`.
- **Rows of several tasks in any order**: either each row gets a mixed pair, `b (in + out) r` numbers, or the rows are
  brought together by task, `n g l (in + out)` numbers, where a group has up to n rows of l tokens. With few tokens
  (decoding) the second is far less; with many the first, and then the pairs are mixed for the rows at once, which costs
  no more than copying them would. Neither outlives the call.
- **Layout**: a mixed A comes out of the product as `(in, r)`, whole slices of it at a time. To turn it into `(r, in)`
  moves single numbers; CPUs then take `A^T x^T` in half the time, and a single token in a third, which pays for many
  tokens, or where the pair is kept.
"""

from __future__ import annotations

import torch

from ...tasks.grouping import Rows
from ..products import add_in_runs, add_one, in_dtype, through_A, to_add_to

__all__ = ["add_update", "as_skills", "cheaper_together", "mix_A", "mix_B", "mix_one", "worth_turning"]

MANY = 64  # tokens of a pair: from MANY on A is worth turning


def mix_A(w: torch.Tensor, A: torch.Tensor, turned: bool = False, placed: bool = False) -> torch.Tensor:
    """`A_t[(h, d), r] = sum_k w[h, k] A[h, k, d, r]`: `(g, h, k), (h, k, d, r) -> (g, h * d, r)`, dtype of A.

    In memory it is `(g, h * d, r)`, or `(g, r, h * d)` if `turned`. If `placed` (without autograd, or what looks at
    operations one by one), each split is written where it belongs, so that nothing is moved afterwards.
    """
    h, k, d, r = A.shape
    if placed and h > 1 and not turned:
        mixed = A.new_empty(w.shape[0], h, d * r)
        torch.bmm(in_dtype(w, A.dtype).transpose(0, 1), A.reshape(h, k, d * r), out=mixed.transpose(0, 1))
        return mixed.view(-1, h * d, r)
    mixed = torch.bmm(in_dtype(w, A.dtype).transpose(0, 1), A.reshape(h, k, d * r))
    if turned:
        return mixed.view(h, -1, d, r).permute(1, 3, 0, 2).reshape(-1, r, h * d).contiguous().transpose(1, 2)
    return mixed.transpose(0, 1).reshape(-1, h * d, r)


def mix_B(w: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """`B_t[r, (h, o)] = sum_k w[h, k] B[h, k, r, o]`: `(g, h, k), (h, k, r, o) -> (g, r, h * o)`, dtype of B."""
    h, k, r, o = B.shape
    mixed = torch.bmm(in_dtype(w, B.dtype).transpose(0, 1), B.reshape(h, k, r * o))
    if h == 1:
        return mixed.view(-1, r, o)
    return mixed.view(h, -1, r, o).permute(1, 2, 0, 3).reshape(-1, r, h * o)


def mix_one(w: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of one task, with the least that can be done: w `(1, h, k)` `-> (in, r), (r, out)`."""
    h, k, d, r = A.shape
    w = as_skills(w, A, B).transpose(0, 1)
    w_A, w_B = in_dtype(w, A.dtype), in_dtype(w, B.dtype)
    mixed = torch.bmm(w_B, B.reshape(h, k, -1))
    mixed_B = mixed.view(r, -1) if h == 1 else mixed.view(h, r, -1).transpose(0, 1).reshape(r, -1)
    return torch.bmm(w_A, A.reshape(h, k, -1)).view(h * d, r), mixed_B


def worth_turning(x: torch.Tensor, g: int) -> bool:
    """Whether x `(b, ..., in)` has so many tokens for each of g pairs, more than one, that turning a mixed A pays."""
    return g > 1 and x.numel() >= MANY * g * x.shape[-1]


def as_skills(w: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Weights in the dtype of the skills, to be cast once for both; as they are if A and B differ in it."""
    return in_dtype(w, A.dtype) if A.dtype == B.dtype else w


def add_update(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, rows: Rows, owned: bool
) -> torch.Tensor:
    """`y + scale * (x A_t) B_t`, without autograd.

    Args:
        y: `(b, ..., out)`, the base layer's output.
        x: `(b, ..., in)`, dtype of A.
        A: `(g, in, r)`, the mixed pairs, or `(in, r)` for one pair.
        B: `(g, r, out)`, or `(r, out)`.
        scale: a plain number.
        rows: which pair each row has.
        owned: nobody else holds `y`, so that it can be added to in place.

    Returns:
        `(b, ..., out)`, dtype of `y`; in the memory of `y` if `owned`.
    """
    y = to_add_to(y, owned)
    if A.dim() == 2:
        add_one(y, x, A, B, scale)
    elif rows.index is None:
        add_in_runs(y, x, A, B, scale)
    elif rows.padded is not None and rows.place is not None and cheaper_together(rows, x, A.shape[-1]):
        together = x.index_select(0, rows.padded).view(A.shape[0], -1, x.shape[-1])
        update = torch.bmm(through_A(together, A), B).view(len(rows.padded), *y.shape[1:])
        y.add_(update.index_select(0, rows.place), alpha=scale)
    else:
        add_in_runs(y, x, A.mT.index_select(0, rows.index).mT, B.index_select(0, rows.index), scale)
    return y


def cheaper_together(rows: Rows, x: torch.Tensor, r: int) -> bool:
    """Whether bringing rows together by task moves fewer numbers than a mixed pair for each row would be."""
    return rows.padded is not None and len(rows.padded) * x.shape[1:-1].numel() < x.shape[0] * r
