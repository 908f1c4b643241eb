"""Low-rank products, each in whichever order is the faster one."""

from __future__ import annotations

import pytest
import torch

from peft_poly.compute.products import SMALL, scaled_product, through_A, turned_product

FEW_TOKENS, SMALL_LAYER, LARGE_LAYER = (3, 64), (40, 64), (40, SMALL // 32)
SHAPES = [(*pairs, *tokens) for pairs in ((), (3,)) for tokens in (FEW_TOKENS, SMALL_LAYER, LARGE_LAYER)]


@pytest.fixture
def tokens(shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_x_A_is_the_product_however_A_lies_in_memory(tokens, turned):
    A = torch.randn(*tokens.shape[:-2], tokens.shape[-1], 4, dtype=torch.float64)
    given = A.mT.contiguous().mT if turned else A
    torch.testing.assert_close(through_A(tokens, given), tokens @ A)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_of_A_is_the_product_and_lies_as_A_does(tokens, turned):
    grad_u = torch.randn(*tokens.shape[:-1], 4, dtype=torch.float64)
    found = turned_product(tokens, grad_u.mT.contiguous().mT if turned else grad_u)
    torch.testing.assert_close(found, tokens.mT @ grad_u)
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_scaled_product_is_the_product_times_the_scale(tokens, scale):
    grad_u = torch.randn(*tokens.shape[:-1], 4, dtype=torch.float64)
    torch.testing.assert_close(scaled_product(tokens.mT, grad_u, scale), tokens.mT @ grad_u * scale)
