"""The tensor functions of `mixing`, each against a naive loop over rows, splits, skills, features and ranks."""

from __future__ import annotations

import pytest
import torch

from peft_poly.compute.kinds.mixing import MANY, add_update, mix_A, mix_B, mix_one, worth_turning
from peft_poly.compute.products import FEW, low_rank_update
from peft_poly.tasks.grouping import group_rows

# b rows, h splits, k skills, d in-features and o out-features of a split, r rank
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 3, 4, 5, 2),
    (5, 1, 4, 3, 7, 2),
    (3, 4, 2, 1, 3, 5),
    (2, 3, 1, 5, 1, 4),
    (7, 5, 3, 2, 2, 1),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)


def make_tensors(b, h, k, d, o, r, dtype=torch.float64):
    w = torch.rand(b, h, k, dtype=torch.float64)
    return w / w.sum(-1, keepdim=True), torch.randn(h, k, d, r, dtype=dtype), torch.randn(h, k, r, o, dtype=dtype)


def naive_A(w: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    (b, h, k), (_, _, d, r) = w.shape, A.shape
    mixed = torch.zeros(b, h * d, r, dtype=torch.float64)
    for row in range(b):
        for split in range(h):
            for feature in range(d):
                for skill in range(k):
                    mixed[row, split * d + feature] += w[row, split, skill] * A[split, skill, feature].double()
    return mixed


def naive_B(w: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    (b, h, k), (_, _, r, o) = w.shape, B.shape
    mixed = torch.zeros(b, r, h * o, dtype=torch.float64)
    for row in range(b):
        for split in range(h):
            for feature in range(o):
                for skill in range(k):
                    mixed[row, :, split * o + feature] += w[row, split, skill] * B[split, skill, :, feature].double()
    return mixed


def naive_update(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.zeros(*x.shape[:-1], B.shape[-1], dtype=torch.float64)
    for row in range(x.shape[0]):
        pair = (A[0], B[0]) if A.shape[0] == 1 else (A[row], B[row])
        out[row] = x[row].double() @ pair[0].double() @ pair[1].double() * scale
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_skills_are_mixed_split_by_split(sizes, dtype):
    w, A, B = make_tensors(*sizes, dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    mixed_A, mixed_B = mix_A(w, A), mix_B(w, B)
    assert mixed_A.dtype == mixed_B.dtype == dtype
    torch.testing.assert_close(mixed_A.double(), naive_A(w, A), **tolerance)
    torch.testing.assert_close(mixed_B.double(), naive_B(w, B), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_turned_A_is_the_same_in_another_layout(sizes, dtype):
    w, A, _ = make_tensors(*sizes, dtype)
    turned = mix_A(w, A, turned=True)
    assert torch.equal(turned, mix_A(w, A))
    assert turned.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [size for size in SIZES if size[0] == 1], ids=str)
def test_the_pair_of_one_task_is_that_of_a_batch_of_one(sizes, dtype):
    w, A, B = make_tensors(*sizes, dtype)
    mixed_A, mixed_B = mix_one(w, A, B)
    assert torch.equal(mixed_A, mix_A(w, A)[0])
    assert torch.equal(mixed_B, mix_B(w, B)[0])


def test_turning_is_for_several_pairs_of_many_tokens_each():
    tokens = [(2, MANY, 5), (2, MANY - 1, 5), (2 * MANY, 5), (2, 2, MANY // 2, 5), (2, 0, 5), (0, 5)]
    assert [worth_turning(torch.zeros(shape), 2) for shape in tokens] == [True, False, True, True, False, False]
    assert not worth_turning(torch.zeros(1, 9 * MANY, 5), 1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 2, FEW - 1, FEW, FEW + 1, MANY])
@pytest.mark.parametrize("tasks", [[4], [4, 4, 4], [4, 4, 1, 1], [4, 1, 4], [3, 1, 4]], ids=str)
def test_an_update_is_added_in_whichever_order_is_cheap(tasks, n_tokens, owned, turned):
    rows = group_rows(tasks)
    x, y = torch.randn(len(tasks), n_tokens, 5).double(), torch.randn(len(tasks), n_tokens, 7).double()
    A, B = torch.randn(len(rows.tasks), 5, 2).double(), torch.randn(len(rows.tasks), 2, 7).double()
    pair = [rows.tasks.tolist().index(task) for task in tasks]
    expected, before = y + naive_update(x, A[pair], B[pair], 0.3), y.clone()
    if turned:
        A = A.transpose(1, 2).contiguous().transpose(1, 2)
    out = add_update(y, x, A, B, 0.3, rows, owned)
    torch.testing.assert_close(out, expected)
    assert (out.data_ptr() == y.data_ptr()) == owned
    assert owned or torch.equal(y, before)
    if len(A) == 1:
        torch.testing.assert_close(add_update(before, x, A[0], B[0], 0.3, rows, owned), expected)


def test_one_hot_weights_pick_a_skill_for_each_split():
    _, A, B = make_tensors(1, 2, 3, 4, 5, 2)
    w = torch.zeros(1, 2, 3, dtype=torch.float64)
    w[0, 0, 2] = w[0, 1, 0] = 1
    assert torch.equal(mix_A(w, A)[0], torch.cat([A[0, 2], A[1, 0]], dim=0))
    assert torch.equal(mix_B(w, B)[0], torch.cat([B[0, 2], B[1, 0]], dim=1))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 1, 5), (3, 4, 5), (3, 2, 4, 5), (3, 2, 1, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_pair_serves_inputs_of_any_shape(shape, dtype):
    x, A, B = torch.randn(shape).to(dtype), torch.randn(1, 5, 2).to(dtype), torch.randn(1, 2, 7).to(dtype)
    expected = (x.double() @ A[0].double() @ B[0].double()) * 0.3
    out = low_rank_update(x, A, B, 0.3)
    assert out.shape == (*shape[:-1], 7)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (3, 4, 5), (3, 2, 4, 5), (3, 2, 1, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_row_has_a_pair_of_its_own(shape, dtype):
    x, A, B = torch.randn(shape).to(dtype), torch.randn(3, 5, 2).to(dtype), torch.randn(3, 2, 7).to(dtype)
    out = low_rank_update(x, A, B, 0.3)
    assert out.shape == (*shape[:-1], 7)
    torch.testing.assert_close(
        out.double(), naive_update(x, A, B, 0.3), rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("n_pairs", [1, 3])
def test_an_input_that_is_not_contiguous_is_taken_as_it_is_seen(n_pairs):
    x = torch.randn(4, 3, 5, dtype=torch.float64).transpose(0, 1)
    A, B = torch.randn(n_pairs, 5, 2, dtype=torch.float64), torch.randn(n_pairs, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(low_rank_update(x, A, B, 1.5), naive_update(x, A, B, 1.5))


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)], ids=str)
def test_an_empty_input_gives_an_empty_output(shape):
    A, B = torch.randn(shape[0], 5, 2), torch.randn(shape[0], 2, 7)
    assert low_rank_update(torch.randn(shape), A, B, 1.0).shape == (*shape[:-1], 7)
    assert low_rank_update(torch.randn(shape), torch.randn(1, 5, 2), torch.randn(1, 2, 7), 1.0).shape[:-1] == shape[:-1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_right(sizes):
    b, h, _, d, _, _ = sizes
    w, A, B = (tensor.requires_grad_() for tensor in make_tensors(*sizes))
    x = torch.randn(b, 3, h * d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, A, B: low_rank_update(x, mix_A(w, A), mix_B(w, B), 0.5), (x, w, A, B))


def test_it_is_a_product_of_averages_and_not_an_average_of_products():
    _, A, B = make_tensors(1, 1, 2, 3, 3, 2)
    w = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)[None]
    out = low_rank_update(identity, mix_A(w, A), mix_B(w, B), 1.0)[0]
    a, b = A[0], B[0]
    torch.testing.assert_close(out, 0.25 * (a[0] @ b[0] + a[1] @ b[1] + a[0] @ b[1] + a[1] @ b[0]))
    assert not torch.allclose(out, 0.5 * (a[0] @ b[0] + a[1] @ b[1]))
