"""Each way to compute a layer is taken when it should be, and all of them give what a naive loop gives."""

from __future__ import annotations

import peft.helpers
import pytest
import tiny
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peft_poly import Linear, PolyConfig
from peft_poly.compute import paths

IN, OUT, N_TASKS = 8, 12, 4


def make_layer(base: nn.Module | None = None, dtype=torch.float64, **settings) -> Linear:
    settings = {"r": 3, "n_tasks": N_TASKS, "n_splits": 2, "init_weights": False, **settings}
    layer = Linear(nn.Linear(IN, OUT) if base is None else base, "default", PolyConfig(**settings))
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer.to(dtype).requires_grad_(False).eval()


def naive(layer: Linear, x: torch.Tensor, tasks: list[int]) -> torch.Tensor:
    pairs = [tiny.naive_pair(layer, "default", task) for task in tasks]
    base = layer.base_layer
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    return torch.stack([x[i] @ weight + base.bias + x[i] @ A @ B / 3 for i, (A, B) in enumerate(pairs)])


class Tagged(torch.Tensor):
    """A tensor subclass, as DTensor and quantised tensors are."""


class TestChoice:
    def test_without_gradients(self):
        with torch.no_grad():
            assert paths.choose_path(make_layer(), torch.randn(2, IN), ["default"]) is paths.only
        with torch.inference_mode():
            assert paths.choose_path(make_layer(), torch.randn(2, IN), ["default"]) is paths.only

    @pytest.mark.parametrize("x", [torch.randn(2, IN), nn.Parameter(torch.randn(2, IN))], ids=["tensor", "parameter"])
    def test_with_gradients(self, x):
        assert paths.choose_path(make_layer(), x, ["default"]) is paths.for_backward

    @pytest.mark.parametrize("grad", [True, False])
    def test_a_tensor_subclass_is_left_to_plain_operations(self, grad):
        with torch.set_grad_enabled(grad):
            assert paths.choose_path(make_layer(), torch.randn(2, IN).as_subclass(Tagged), ["default"]) is paths.plain

    @pytest.mark.parametrize("grad", [True, False])
    def test_autocast_is_left_to_plain_operations(self, grad):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            assert paths.choose_path(make_layer(), torch.randn(2, IN), ["default"]) is paths.plain
            with torch.autocast("cpu", enabled=False):
                assert paths.choose_path(make_layer(), torch.randn(2, IN), ["default"]) is not paths.plain

    def test_the_compiler_sees_plain_operations(self, monkeypatch):
        for name in ("for_backward", "only"):
            monkeypatch.setattr(paths, name, lambda *args: pytest.fail("not for the compiler"))
        layer, x = make_layer(), torch.randn(3, IN, dtype=torch.float64)
        compiled = torch.compile(lambda x: layer(x, task_ids=torch.tensor([2, 0, 2])), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), naive(layer, x, [2, 0, 2]), rtol=1e-6, atol=1e-6)

    def test_an_input_that_may_not_be_cast_is_left_to_plain_operations_which_say_so(self):
        layer, x = make_layer(dtype=torch.float32), torch.randn(2, IN, dtype=torch.bfloat16)
        layer.base_layer.bfloat16()
        model = nn.Sequential(layer)
        assert paths.choose_path(layer, x, ["default"]) is paths.for_backward
        with peft.helpers.disable_input_dtype_casting(model):
            assert paths.choose_path(layer, x, ["default"]) is paths.plain
            assert paths.choose_path(layer, x.float(), ["default"]) is paths.for_backward
            with pytest.raises(RuntimeError, match=r"BFloat16|same dtype"):
                layer(x, task_ids=[0, 1])


@pytest.mark.parametrize("training", [True, False])
def test_on_the_meta_device_shapes_go_through(training):
    layer = make_layer().to("meta").train(training)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = layer(torch.empty(3, 4, IN, device="meta", dtype=torch.float64), task_ids=torch.tensor([0, 2, 0]))
        assert out.is_meta
        assert out.shape == (3, 4, OUT)


# ----------------------------------------------------------------------------------------------- other people's tensors
def hooked(layer, keep):
    return layer.base_layer.register_forward_hook(lambda module, args, out: keep.append((out, out.clone())))


def hooked_everywhere(layer, keep):
    def hook(module, args, out):
        if module is layer.base_layer:
            keep.append((out, out.clone()))

    return register_module_forward_hook(hook)


def patched(layer, keep):
    forward = layer.base_layer.forward

    def and_keep(x):
        out = forward(x)
        keep.append((out, out.clone()))
        return out

    layer.base_layer.forward = and_keep


class Keeping(nn.Linear):
    kept: list

    def forward(self, x):
        out = super().forward(x)
        self.kept.append((out, out.clone()))
        return out


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tasks", [[1, 1, 1], [2, 0, 2]], ids=str)
@pytest.mark.parametrize(
    "watch", [hooked, hooked_everywhere, patched, None], ids=["hook", "global hook", "patched", "own class"]
)
def test_what_someone_else_may_hold_is_not_written_to(watch, tasks, grad):
    keep: list[tuple[torch.Tensor, torch.Tensor]] = []
    base = nn.Linear(IN, OUT) if watch else Keeping(IN, OUT)
    base.kept = keep
    layer, x = make_layer(base), torch.randn(3, IN, dtype=torch.float64)
    handle = watch(layer, keep) if watch else None
    try:
        with torch.set_grad_enabled(grad):
            out = layer(x, task_ids=tasks)
    finally:
        if handle is not None:
            handle.remove()
    assert len(keep) == 1
    assert torch.equal(*keep[0])
    torch.testing.assert_close(out, naive(layer, x, tasks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_hook_may_change_what_goes_in_or_comes_out(place, grad):
    layer, x = make_layer(), torch.randn(3, IN, dtype=torch.float64)
    expected = naive(layer, x, [2, 0, 2])
    if place == "before":
        layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        expected = expected - x @ layer.base_layer.weight.T
    else:
        layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)
        expected = expected + 1
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x, task_ids=[2, 0, 2]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [[1, 1, 1], [2, 0, 2], [2, 0, 1]], ids=str)
def test_the_input_is_left_as_it_was(tasks):
    layer, x = make_layer(), torch.randn(3, 20, IN, dtype=torch.float64)
    before = x.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            layer(x, task_ids=tasks)
        assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------------- equal results
LAYOUTS = {
    "one task": [3] * 6,
    "equal runs": [2, 2, 2, 0, 0, 0],
    "any order": [3, 0, 3, 3, 1, 0],
    "all distinct": [3, 0, 1, 2],
}  # fmt: skip


@pytest.mark.parametrize("base", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("tokens", [(), (1,), (3,), (40,), (70,), (2, 3)], ids=str)
@pytest.mark.parametrize("tasks", LAYOUTS.values(), ids=LAYOUTS)
def test_eval_gives_what_a_loop_gives_for_every_layout_of_rows(tasks, tokens, base):
    layer = make_layer(base(IN, OUT))
    x = torch.randn(len(tasks), *tokens, IN, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, task_ids=tasks), naive(layer, x, tasks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 32, 33], ids=str)
def test_one_task_with_very_many_tokens(rows):
    layer = (
        Linear(nn.Linear(64, 512), "default", PolyConfig(r=8, n_tasks=2, n_splits=4, init_weights=False))
        .double()
        .eval()
    )
    x = torch.randn(rows, 544, 64, dtype=torch.float64)
    A, B = tiny.naive_pair(layer, "default", 1)
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ A @ B / 8
        torch.testing.assert_close(layer(x, task_ids=1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [(), (1,), (5,), (40,), (70,)], ids=str)
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("tasks", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("base", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_a_training_forward_is_bit_equal_with_and_without_gradients(base, tasks, noise, tokens):
    layer = make_layer(base(IN, OUT), torch.float32, router_noise=noise, lora_dropout=0.3).train()
    x, results = torch.randn(len(tasks), *tokens, IN), []
    for grad in (True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            results.append(layer(x, task_ids=tasks))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------------------ the cost
class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [
            t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)
        ]
        return out


@pytest.mark.parametrize("tasks", [[0] * 64, [0, 1] * 32], ids=["one", "two"])
def test_few_tokens_need_no_pair_for_each_row(tasks):
    size, r = 32, 8
    config = PolyConfig(r=r, n_tasks=2, n_skills=2, n_splits=2, init_weights=False)
    layer = Linear(nn.Linear(size, size), "default", config).eval()
    with torch.no_grad(), Sizes() as sizes:
        layer(torch.randn(64, 1, size), task_ids=tasks)
    assert max(sizes.seen) < 64 * size * r
