"""The autograd node of a gated layer: its gradients by finite differences and against plain operations, and what it
keeps for the backward, against PEFT's LoRA."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from peft_poly import Linear, PolyConfig
from peft_poly.compute import paths
from peft_poly.compute.kinds.gating_node import GatedUpdate, add_gated

IN, OUT, R = 3, 4, 2
SHAPES = {"2-D": (3,), "3-D": (3, 2), "4-D": (3, 2, 2), "5-D": (3, 2, 1, 2), "many tokens": (3, 17)}


def make_tensors(shape=(3, 2), rows=3) -> dict:
    """Arguments of `GatedUpdate` by name, in float64; the base product is inside."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=draw)

    return {
        "base": None,
        "x": normal(*shape, IN),
        "weight": normal(OUT, IN),
        "bias": normal(OUT),
        "A": normal(1, 1, IN, R),
        "B": normal(1, 1, R, OUT),
        "scale": 0.3,
        "gates": normal(rows, 1, R),
        "own": None,
        "logits": None,
    }


def check(arguments: dict, wanted: tuple[str, ...]) -> None:
    tensors = [arguments[name].clone().requires_grad_() for name in wanted]

    def call(*given: torch.Tensor) -> torch.Tensor:
        return GatedUpdate.apply(*{**arguments, **dict(zip(wanted, given, strict=True))}.values())

    assert gradcheck(call, tensors, atol=1e-6)


class TestFiniteDifferences:
    @pytest.mark.parametrize("rows", [3, 1], ids=["a row of gates each", "one for all"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_inputs_of_any_shape(self, shape, rows):
        check(make_tensors(shape, rows), ("x", "A", "B", "gates"))

    @pytest.mark.parametrize("wanted", [("x",), ("gates",), ("A",), ("B",), ("A", "B"), ("x", "gates")], ids=str)
    @pytest.mark.parametrize("fused", [True, False], ids=["base inside", "base given"])
    def test_whatever_is_frozen(self, wanted, fused):
        arguments = make_tensors()
        if not fused:
            arguments |= {"base": torch.randn(3, 2, OUT, dtype=torch.float64), "weight": None, "bias": None}
            wanted = ("base", *wanted)
        check(arguments, wanted)

    def test_an_input_that_is_not_contiguous(self):
        arguments = make_tensors()
        x = arguments["x"].transpose(0, 1).contiguous().requires_grad_()
        assert gradcheck(lambda x: GatedUpdate.apply(*{**arguments, "x": x.transpose(0, 1)}.values()), [x], atol=1e-6)


def test_second_derivatives():
    arguments = make_tensors()
    x, A, B, gates = (arguments[name].requires_grad_() for name in ("x", "A", "B", "gates"))
    weight, bias, scale = arguments["weight"], arguments["bias"], arguments["scale"]

    def call(x, A, B, gates):
        return GatedUpdate.apply(None, x, weight, bias, A, B, scale, gates, None, None)

    assert gradgradcheck(call, (x, A, B, gates), atol=1e-6)


def test_the_base_that_was_given_is_left_as_it_was():
    base = torch.randn(3, 2, OUT, dtype=torch.float64)
    before = base.clone()
    GatedUpdate.apply(*(make_tensors() | {"base": base, "weight": None, "bias": None}).values())
    assert torch.equal(base, before)


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 2, 9)], ids=str)
def test_what_is_added_is_the_sum_over_ranks_token_by_token(shape, rows):
    tensors = make_tensors(shape, rows)
    x, A, B, s = tensors["x"], tensors["A"][0, 0], tensors["B"][0, 0], tensors["gates"][:, 0]
    y = torch.zeros(*shape, OUT, dtype=torch.float64)
    add_gated(y, x, s, A, B)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        gates = s[index[0] if rows > 1 else 0]
        wanted = sum(x[tuple(index)] @ A[:, rank] * gates[rank] * B[rank] for rank in range(R))
        torch.testing.assert_close(y[tuple(index)], wanted)


def make_layer(n_tasks=3, size=8, dtype=torch.float64, **settings) -> Linear:
    config = PolyConfig(poly_type="gates", n_tasks=n_tasks, **{"r": 3, "init_weights": False, **settings})
    layer = Linear(nn.Linear(size, size).requires_grad_(False), "default", config).to(dtype)
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer.train()


@pytest.mark.parametrize("tasks", [[2, 0, 2, 1], [1, 1, 1, 1]], ids=["mixed", "one"])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 2, 3), (4, 2, 3, 2)], ids=str)
def test_output_and_gradients_are_those_of_plain_operations(shape, tasks, monkeypatch):
    layer, results = make_layer(), []
    x = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    for path in (paths.for_backward, paths.plain):
        monkeypatch.setattr("peft_poly.layer.choose_path", lambda *args, path=path: path)
        out = layer(x, task_ids=tasks)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *wanted])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)


def saved(call, parameters) -> int:
    """Bytes kept for the backward of `call()`, each storage once, but for those of `parameters`."""
    own, held = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for pointer, (_, size) in held.items() if pointer not in own)


@pytest.mark.parametrize("tasks", [list(range(8)), [0] * 8], ids=["distinct", "one"])
def test_it_keeps_what_a_lora_of_the_same_rank_keeps(tasks):
    size, r = 256, 8
    ours = make_layer(8, size, torch.float32, r=r)
    base, config = nn.Linear(size, size).requires_grad_(False), peft.LoraConfig(r=r)
    lora = LoraLinear(base, "default", config=config, r=r, lora_alpha=r).train()
    x = torch.randn(8, 32, size)
    theirs = saved(lambda: lora(x), lora.parameters())
    assert theirs >= x.numel() * 4
    assert saved(lambda: ours(x, task_ids=tasks), ours.parameters()) <= 1.03 * theirs
