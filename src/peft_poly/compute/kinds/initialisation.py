"""How skills are drawn; see `PolyConfig.init_weights`."""

from __future__ import annotations

import math
from typing import Union

import torch
from torch import nn

__all__ = ["draw_skills"]


@torch.no_grad()
def draw_skills(A: torch.Tensor, B: torch.Tensor, init_weights: Union[bool, str]) -> None:
    """Draw the skills of a layer in place: as PEFT's own Poly does for one seed, or as the MHR paper's code does.

    Args:
        A: `(h, k, d, r)`.
        B: `(h, k, r, o)`.
        init_weights: True: A as `nn.Linear` would, B zero. False: B as A. "mhr": A uniform in
            `+-1 / sqrt(3 * in_features)`, B zero.
    """
    if init_weights == "mhr":
        bound = 1 / math.sqrt(3 * A.shape[0] * A.shape[2])
        A.uniform_(-bound, bound)
    else:
        A.copy_(_uniform_like_linear(A.transpose(2, 3)).transpose(2, 3))
    if init_weights:
        B.zero_()
    else:
        B.copy_(_uniform_like_linear(B.transpose(2, 3)).transpose(2, 3))


def _uniform_like_linear(matrices: torch.Tensor) -> torch.Tensor:
    """What `nn.Linear` draws for a weight `(n, fan_in)`, for each of `(h, k, n, fan_in)`, skills outermost."""
    h, k, n, fan_in = matrices.shape
    gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    bound = math.sqrt(3.0) * (gain / math.sqrt(fan_in))
    return matrices.new_empty(k, h, n, fan_in).uniform_(-bound, bound).transpose(0, 1)
