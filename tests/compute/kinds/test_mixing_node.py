"""The autograd node of a layer: its gradients by finite differences, against plain operations and against PEFT's own
Poly, and what it keeps for the backward, against PEFT's LoRA."""

from __future__ import annotations

from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.poly.layer import Linear as PeftPolyLinear
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from peft_poly import Linear, PolyConfig, PolyRouter
from peft_poly.compute import paths
from peft_poly.compute.kinds.mixing_node import PolyUpdate
from peft_poly.compute.kinds.routed import OwnRouting

# n_splits h, n_skills k, d in-features and o out-features of a split, r rank
SIZES = {
    "one split, one skill": (1, 1, 3, 2, 1),
    "skills": (1, 3, 3, 4, 2),
    "splits": (2, 3, 2, 1, 2),
    "wide": (2, 2, 1, 3, 4),
}
SHAPES = {"2-D": (3,), "3-D": (3, 2), "4-D": (3, 2, 1), "many tokens": (3, 17)}
TASKS = {"distinct": [2, 0, 1], "several rows of a task": [2, 0, 2], "one for all": [1]}


def make_tensors(sizes=SIZES["splits"], shape=(3, 2), tasks=(2, 0, 2), noise=True) -> dict:
    """Arguments of `PolyUpdate` by name, in float64; the base product is inside."""
    h, k, d, o, r = sizes
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=draw)

    return {
        "base": None,
        "x": normal(*shape, h * d),
        "weight": normal(h * o, h * d),
        "bias": normal(h * o),
        "A": normal(h, k, d, r),
        "B": normal(h, k, r, o),
        "logits": normal(4, h * k),
        "tasks": torch.tensor(tasks),
        "noise": normal(len(tasks), h, k) if noise else None,
        "temperature": 0.7 if noise else 1.0,
        "scale": 0.3,
    }


def update(base, x, weight, bias, A, B, logits, tasks, noise, temperature, scale):
    """`PolyUpdate` of a layer that is routed by itself."""
    h, k = A.shape[:2]
    router = PolyRouter(PolyConfig(n_tasks=len(logits), n_splits=h, n_skills=k, router_temperature=temperature))
    with torch.no_grad():
        w, p = router.route(torch.embedding(logits, tasks), noise)
    own = OwnRouting(router, tasks, p, noise)
    return PolyUpdate.apply(base, x, weight, bias, A, B, scale, w, own, logits)


def check(arguments: dict, wanted: tuple[str, ...]) -> None:
    """Analytic gradients of the arguments in `wanted` against finite differences; the others take none."""
    tensors = [arguments[name].clone().requires_grad_() for name in wanted]

    def call(*given: torch.Tensor) -> torch.Tensor:
        return update(*{**arguments, **dict(zip(wanted, given, strict=True))}.values())

    assert gradcheck(call, tensors, atol=1e-6)


LEARNED = ("x", "A", "B", "logits")


class TestFiniteDifferences:
    @pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_splits_skills_and_ranks(self, sizes, noise):
        check(make_tensors(sizes, noise=noise), LEARNED)

    @pytest.mark.parametrize("tasks", TASKS.values(), ids=TASKS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_inputs_of_any_shape_and_rows_of_any_task(self, shape, tasks):
        check(make_tensors(SIZES["one split, one skill"] if shape[-1] > 9 else SIZES["splits"], shape, tasks), LEARNED)

    @pytest.mark.parametrize(
        "wanted",
        [("x",), ("A", "B"), ("logits",), ("x", "logits"), ("A", "B", "logits"), ("B",), ("x", "A")],
        ids=[
            "all frozen",
            "frozen router",
            "frozen skills, input without",
            "frozen skills",
            "input without",
            "B",
            "x, A",
        ],
    )
    @pytest.mark.parametrize("fused", [True, False], ids=["base inside", "base given"])
    def test_whatever_is_frozen(self, wanted, fused):
        arguments = make_tensors()
        if not fused:
            arguments |= {"base": torch.randn(3, 2, 2, dtype=torch.float64), "weight": None, "bias": None}
        check(arguments, wanted)

    def test_a_base_that_is_given_gets_its_gradient(self):
        arguments = make_tensors() | {"base": torch.randn(3, 2, 2, dtype=torch.float64), "weight": None, "bias": None}
        check(arguments, ("base", *LEARNED))

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_weights_that_were_given(self, sizes):
        arguments = make_tensors(sizes)
        h, k = arguments["A"].shape[:2]
        w = torch.rand(3, h, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        A, B, x = (arguments[name].requires_grad_() for name in ("A", "B", "x"))
        weight, bias, scale = arguments["weight"], arguments["bias"], arguments["scale"]
        assert gradcheck(
            lambda x, A, B, w: PolyUpdate.apply(None, x, weight, bias, A, B, scale, w, None, None),
            (x, A, B, w),
            atol=1e-6,
        )

    def test_a_base_without_a_bias(self):
        check(make_tensors() | {"bias": None}, LEARNED)

    def test_an_input_that_is_not_contiguous(self):
        arguments, wanted = make_tensors(), ("x", "A", "B", "logits")
        x = arguments["x"].transpose(0, 1).contiguous().requires_grad_()
        rest = [arguments[name].requires_grad_() for name in wanted[1:]]

        def call(x, *rest):
            given = {**arguments, "x": x.transpose(0, 1), **dict(zip(wanted[1:], rest, strict=True))}
            return update(*given.values())

        assert gradcheck(call, [x, *rest], atol=1e-6)


def test_gradients_nobody_asked_for_are_not_computed():
    arguments = make_tensors()
    arguments["x"].requires_grad_()
    with mock.patch.object(torch.ops.aten, "embedding_dense_backward", side_effect=AssertionError):
        update(*arguments.values()).sum().backward()
    assert arguments["x"].grad is not None


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
def test_second_derivatives(noise):
    arguments = make_tensors(sizes=(2, 2, 1, 2, 2), noise=noise)
    tensors = [arguments[name].requires_grad_() for name in LEARNED]

    def call(*given):
        return update(*{**arguments, **dict(zip(LEARNED, given, strict=True))}.values())

    assert gradgradcheck(call, tensors, atol=1e-6)


def test_the_base_that_was_given_is_left_as_it_was():
    base = torch.randn(3, 2, 2, dtype=torch.float64)
    before = base.clone()
    update(*(make_tensors() | {"base": base, "weight": None, "bias": None}).values())
    assert torch.equal(base, before)


# ------------------------------------------------------------------------------------------------ a layer's gradients
IN, OUT = 8, 12


def make_layer(dtype=torch.float64, **settings) -> Linear:
    config = PolyConfig(**{"r": 3, "n_tasks": 3, "n_splits": 2, "init_weights": False, **settings})
    layer = Linear(nn.Linear(IN, OUT).requires_grad_(False), "default", config).to(dtype)
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer.train()


def gradients(module: nn.Module, out: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    wanted = [p for _, p in sorted(module.named_parameters()) if p.requires_grad] + list(others)
    return list(
        torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum(), wanted)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"router_noise": False}, {"router_temperature": 0.3}, {"n_splits": 4, "n_skills": 2}], ids=str
)
@pytest.mark.parametrize("tasks", [[2, 0, 2, 1], [1, 1, 1, 1], [0, 0, 2, 2]], ids=str)
def test_output_and_gradients_are_those_of_plain_operations(tasks, settings, monkeypatch):
    layer, results = make_layer(**settings), []
    x = torch.randn(4, 5, IN, dtype=torch.float64, requires_grad=True)
    for path in (paths.for_backward, paths.plain):
        monkeypatch.setattr("peft_poly.layer.choose_path", lambda *args, path=path: path)
        torch.manual_seed(3)
        out = layer(x, task_ids=tasks)
        results.append([out, *gradients(layer, out, x)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n_splits", [1, 4])
def test_output_and_gradients_are_those_of_pefts_own_poly_under_the_same_seed(n_splits):
    settings = {"r": 3, "n_tasks": 5, "n_splits": n_splits, "n_skills": 3, "init_weights": False}
    ours = make_layer(torch.float32, **settings)
    theirs = PeftPolyLinear(ours.base_layer, "default", peft.PolyConfig(**settings)).train()
    assert not theirs.load_state_dict(ours.state_dict(), strict=True).missing_keys
    x, tasks, results = torch.randn(4, 6, IN, requires_grad=True), torch.tensor([4, 0, 4, 2]), []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        out = layer(x, task_ids=tasks)
        results.append([out, *gradients(layer, out, x)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_router_shared_by_two_layers_gets_the_sum_of_both_gradients():
    first, second = make_layer(router_noise=False), make_layer(router_noise=False)
    second.poly_router["default"] = first.poly_router["default"]
    logits, x = first.poly_router["default"].module_logits, torch.randn(3, IN, dtype=torch.float64)

    def loss(layer):
        return layer(x, task_ids=[2, 0, 2]).square().sum()

    apart = sum(torch.autograd.grad(loss(layer), logits)[0] for layer in (first, second))
    (together,) = torch.autograd.grad(loss(first) + loss(second), logits)
    torch.testing.assert_close(together, apart)


def test_a_layer_used_twice_in_one_graph_gets_the_sum_of_both_gradients():
    layer = make_layer(router_noise=False)
    x, other = torch.randn(2, 3, IN, dtype=torch.float64)
    apart = [gradients(layer, layer(each, task_ids=ids)) for each, ids in ((x, [2, 0, 2]), (other, [1, 1, 0]))]
    both = gradients(layer, layer(x, task_ids=[2, 0, 2]) + layer(other, task_ids=[1, 1, 0]))
    for got, one, two in zip(both, *apart, strict=True):
        torch.testing.assert_close(got, one + two)


@pytest.mark.parametrize("frozen", ["skills", "router", "both"])
def test_frozen_parts_get_no_gradient_and_the_others_that_of_before(frozen):
    layer, x = make_layer(router_noise=False), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    layer(x, task_ids=[2, 0, 2]).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    for name, parameter in layer.named_parameters():
        if ("lora" in name and frozen != "router") or ("router" in name and frozen != "skills"):
            parameter.requires_grad_(False)
    layer(x, task_ids=[2, 0, 2]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name])


# ------------------------------------------------------------------------------------------------------ what is kept
def saved(call, parameters) -> dict[int, int]:
    """Bytes of each storage kept for the backward of `call()`, but for those of `parameters`."""
    own, held = {p.untyped_storage().data_ptr() for p in parameters}, []

    def pack(tensor):
        held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return {pointer: size for pointer, size in storages.items() if pointer not in own}


@pytest.mark.parametrize("tasks", [list(range(8)), [0] * 8, [5, 1, 5, 5, 2, 1, 0, 3]], ids=["distinct", "one", "mixed"])
def test_it_keeps_what_a_lora_of_the_same_rank_keeps(tasks):
    size, r = 256, 8
    config = PolyConfig(r=r, n_tasks=8, n_skills=8, n_splits=4, init_weights=False)
    ours = Linear(nn.Linear(size, size).requires_grad_(False), "default", config).train()
    lora = LoraLinear(
        nn.Linear(size, size).requires_grad_(False), "default", config=peft.LoraConfig(r=r), r=r, lora_alpha=r
    )
    x = torch.randn(8, 32, size)
    kept = saved(lambda: ours(x, task_ids=tasks), ours.parameters())
    theirs = saved(lambda: lora.train()(x), lora.parameters())
    assert sum(theirs.values()) >= x.numel() * 4
    assert sum(kept.values()) <= 1.02 * sum(theirs.values())
    mixed_pairs = 8 * size * r * 4  # of one side, for every row
    assert all(kept_bytes < mixed_pairs for pointer, kept_bytes in kept.items() if pointer != x.data_ptr())


def test_a_half_precision_input_is_kept_as_it_came():
    layer = make_layer(torch.float32)
    layer.base_layer.bfloat16()
    x = torch.randn(8, 32, IN, dtype=torch.bfloat16)
    kept = saved(lambda: layer(x, task_ids=[0] * 8), layer.parameters())
    assert kept[x.data_ptr()] == x.numel() * 2
    assert x.numel() * 4 not in kept.values()
