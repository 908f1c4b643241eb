"""One adapted layer against a naive loop over rows and skills: shapes, samples, scale, dropout, dtypes."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.distributions import RelaxedBernoulli
from transformers.pytorch_utils import Conv1D

from peft_poly import Linear, PolyConfig, PolyLayer

IN, OUT, N_TASKS = 8, 12, 3
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # mixing weights are float32
KINDS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-no-bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}


def make_layer(base="linear", dtype=torch.float64, train=False, **settings) -> Linear:
    """A layer whose B and logits are not those of the start."""
    base = KINDS[base]() if isinstance(base, str) else base
    config = PolyConfig(**{"r": 3, "n_tasks": N_TASKS, "n_splits": 2, "init_weights": False, **settings})
    layer = Linear(base, "default", config).to(dtype)
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer.train(train)


def naive_forward(layer: Linear, x: torch.Tensor, tasks: list[int], adapters=("default",)) -> torch.Tensor:
    rows = []
    for row, task in enumerate(tasks):
        out = layer.base_layer(x[row])
        for name in adapters:
            A, B = tiny.naive_pair(layer, name, task)
            out = out + (x[row].double() @ A @ B) * (layer.lora_alpha[name] / layer.r[name])
        rows.append(out)
    return torch.stack(rows)


def mixed_by(layer: Linear, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of one row for given mixing weights `(h, k)`."""
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    splits = range(A.shape[0])
    rows = [sum(w[h, k] * A[h, k] for k in range(A.shape[1])) for h in splits]
    columns = [sum(w[h, k] * B[h, k] for k in range(A.shape[1])) for h in splits]
    return torch.cat(rows, dim=0), torch.cat(columns, dim=1)


MODES = {
    "grad": torch.enable_grad,
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),  # which leaves float64 as it is
}


@pytest.fixture(params=MODES)
def mode(request):
    """Each of the ways that a forward may be computed in."""
    with MODES[request.param]():
        yield


@pytest.mark.usefixtures("mode")
class TestForward:
    @pytest.mark.parametrize("tasks", [[2, 0, 1, 2], [2, 0, 2, 2], [1, 1, 0, 0], [1, 1, 1, 1]], ids=str)
    @pytest.mark.parametrize("shape", [(4, IN), (4, 5, IN), (4, 2, 3, IN), (4, 1, IN), (4, 20, IN)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_row_gets_the_update_of_its_task(self, kind, shape, tasks):
        layer, x = make_layer(kind), torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x, task_ids=torch.tensor(tasks)), naive_forward(layer, x, tasks), **CLOSE)

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 2), (2, 1, 5), (4, 3, 16)], ids=str)
    def test_any_number_of_splits_skills_and_ranks_will_do(self, sizes):
        n_splits, n_skills, r = sizes
        layer, x = make_layer(n_splits=n_splits, n_skills=n_skills, r=r), torch.randn(5, 3, IN, dtype=torch.float64)
        tasks = [2, 0, 1, 2, 0]
        torch.testing.assert_close(layer(x, task_ids=tasks), naive_forward(layer, x, tasks), **CLOSE)

    @pytest.mark.parametrize("shape", [(IN,), (4, IN), (4, 5, IN), (4, 2, 3, IN)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_task_fits_any_leading_shape(self, kind, shape):
        layer, x = make_layer(kind), torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x, task_ids=1), naive_forward(layer, x[None], [1])[0], **CLOSE)

    def test_an_input_that_is_not_contiguous_is_taken_as_it_is_seen(self):
        layer, x = make_layer(), torch.randn(5, 4, IN, dtype=torch.float64).transpose(0, 1)
        torch.testing.assert_close(layer(x, task_ids=[2, 0, 1, 2]), naive_forward(layer, x, [2, 0, 1, 2]), **CLOSE)

    @pytest.mark.parametrize(
        "ids",
        [
            [2, 0, 2],
            ["c", "a", "c"],
            ["c", 0, 2],
            torch.tensor([2, 0, 2]),
            torch.tensor([[2], [0], [2]], dtype=torch.int32),
        ],
        ids=["list", "names", "mixed", "tensor", "column"],
    )
    def test_ids_come_in_many_forms(self, ids):
        layer, x = make_layer(n_tasks=None, task_names=["a", "b", "c"]), torch.randn(3, IN, dtype=torch.float64)
        torch.testing.assert_close(layer(x, task_ids=ids), naive_forward(layer, x, [2, 0, 2]), **CLOSE)

    @pytest.mark.parametrize("ids", [1, "b", [1], torch.tensor(1)], ids=str)
    def test_a_single_row_takes_every_form_of_one_task(self, ids):
        layer, x = make_layer(n_tasks=None, task_names=["a", "b", "c"]), torch.randn(1, 5, IN, dtype=torch.float64)
        torch.testing.assert_close(layer(x, task_ids=ids), naive_forward(layer, x, [1]), **CLOSE)

    def test_a_layer_with_one_task_needs_no_ids(self):
        layer, x = make_layer(n_tasks=1), torch.randn(3, IN, dtype=torch.float64)
        torch.testing.assert_close(layer(x), naive_forward(layer, x, [0, 0, 0]), **CLOSE)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_a_batch_without_rows_passes(self, training):
        layer = make_layer(n_tasks=1, train=training)
        assert layer(torch.randn(0, 5, IN, dtype=torch.float64)).shape == (0, 5, OUT)

    def test_the_output_of_the_base_layer_is_not_changed_in_place_where_a_hook_holds_it(self):
        layer, seen = make_layer(), []
        layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
        out = layer(torch.randn(3, IN, dtype=torch.float64), task_ids=[0, 1, 2])
        assert torch.equal(*seen[0])
        assert out.data_ptr() != seen[0][0].data_ptr()

    def test_the_output_of_the_base_layer_is_not_changed_in_place_where_it_holds_it_itself(self):
        class Constant(nn.Linear):
            def forward(self, x):
                return self.constant

        base = Constant(IN, OUT)
        base.register_buffer("constant", torch.ones(3, OUT, dtype=torch.float64))
        layer = make_layer(base)
        assert not torch.equal(layer(torch.randn(3, IN, dtype=torch.float64), task_ids=[0, 1, 2]), base.constant)
        assert torch.equal(base.constant, torch.ones(3, OUT, dtype=torch.float64))

    def test_two_active_adapters_add_up(self):
        layer, x = make_layer(), torch.randn(3, IN, dtype=torch.float64)
        layer.update_layer("other", PolyConfig(r=5, n_tasks=N_TASKS, n_splits=4, n_skills=2, init_weights=False))
        layer.double().set_adapter(["default", "other"])
        expected = naive_forward(layer, x, [1, 2, 0], ("default", "other"))
        torch.testing.assert_close(layer(x, task_ids=[1, 2, 0]), expected, **CLOSE)

    def test_a_disabled_or_absent_adapter_leaves_the_base_layer(self):
        layer, x = make_layer(), torch.randn(3, IN, dtype=torch.float64)
        expected = layer.base_layer(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x, task_ids=[0, 1, 2]), expected)
        layer.enable_adapters(True)
        layer.set_adapter("elsewhere")
        assert torch.equal(layer(x, task_ids=[0, 1, 2]), expected)

    def test_further_arguments_go_to_the_base_layer(self):
        class Scaled(nn.Linear):
            def forward(self, x, factor, *, plus=0.0):
                return super().forward(x) * factor + plus

        layer, x = make_layer(Scaled(IN, OUT), n_tasks=1), torch.randn(3, IN, dtype=torch.float64)
        A, B = tiny.naive_pair(layer, "default", 0)
        expected = layer.base_layer(x, 2.0, plus=1.0) + x @ A @ B / 3
        torch.testing.assert_close(layer(x, 2.0, plus=1.0), expected, **CLOSE)


@pytest.mark.parametrize("context", ["grad", "autocast"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-base", "trained-base"])
@pytest.mark.parametrize("tasks", [[2, 0, 2], [2, 2, 2]], ids=["mixed", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loop(kind, tasks, frozen, context):
    layer = make_layer(kind)
    layer.base_layer.requires_grad_(not frozen)
    x = torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    direction, gradients = torch.randn(3, 5, OUT, dtype=torch.float64), []
    with MODES[context]():
        outputs = layer(x, task_ids=tasks), naive_forward(layer, x, tasks)
    tensors = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    for out in outputs:
        (out * direction).sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
        for tensor in tensors.values():
            tensor.grad = None
    assert sum("poly" in name for name in tensors) == 3
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5, msg=name)
    assert gradients[0]["poly_router.default.module_logits"][1].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [[1, 1, 1], [2, 0, 2]], ids=str)
@pytest.mark.parametrize("shape", [(3, IN), (3, 4, IN)], ids=str)
def test_a_model_may_change_the_output_in_place_as_that_of_any_layer(kind, tasks, shape):
    layer, x = make_layer(kind, train=True), torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(0)  # of the noise
    want = (layer(x, task_ids=tasks).transpose(0, -2) / 2).relu()
    torch.manual_seed(0)
    y = layer(x, task_ids=tasks).transpose(0, -2)
    y /= 2  # DeBERTa's attention does this to a view of it
    y.relu_()
    torch.testing.assert_close(y, want)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.sum(), parameters)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), parameters))


class TestRefusals:
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([0, 1], "task_ids has 2 entries but the batch has 3 rows"),
            ([0, 1, 3], r"must lie in \[0, 2\], got 3"),
            ([0, -1, 1], r"must lie in \[0, 2\], got -1"),
            (7, r"must lie in \[0, 2\], got 7"),
            ([0.5, 1, 1], "must be integers or task names, got 0.5"),
            (torch.zeros(3), "must be integers or task names, got a tensor of dtype torch.float32"),
            (torch.zeros(3, 2, dtype=torch.long), r"must have the shape \(batch,\) or \(batch, 1\), got \(3, 2\)"),
            ("rte", "given by name, but adapter 'default' has no names for its 3"),
            (None, "No task is known for this call, and adapter 'default' has 3 of them"),
        ],
    )
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_ids_that_do_not_fit_are_refused_in_a_direct_call(self, ids, message, training):
        with pytest.raises(ValueError, match=message):
            make_layer(train=training)(torch.randn(3, IN, dtype=torch.float64), task_ids=ids)

    def test_one_vector_takes_one_task(self):
        with pytest.raises(ValueError, match="task_ids has 2 entries but the batch has 1 rows"):
            make_layer()(torch.randn(IN, dtype=torch.float64), task_ids=[0, 1])

    @pytest.mark.parametrize(
        "base", [nn.Embedding(IN, OUT), nn.Conv1d(IN, OUT, 1), nn.LayerNorm(IN), nn.ReLU()], ids=repr
    )
    def test_a_base_layer_that_is_not_linear_is_refused(self, base):
        with pytest.raises(TypeError, match=rf"^{type(base).__name__} cannot be adapted: it is no linear layer\.$"):
            Linear(base, "default", PolyConfig())

    @pytest.mark.parametrize(("n_splits", "side", "size"), [(3, "in", IN), (8, "out", OUT)])
    def test_splits_that_do_not_divide_the_features_are_refused(self, n_splits, side, size):
        with pytest.raises(
            ValueError, match=rf"n_splits={n_splits} does not divide the {size} {side}-features of fc\. "
        ):
            Linear(nn.Linear(IN, OUT), "default", PolyConfig(n_splits=n_splits), layer_name="fc")


@pytest.mark.usefixtures("mode")
class TestSampling:
    @pytest.mark.parametrize("tasks", [[2, 0, 2], [1, 1, 1]], ids=["mixed", "uniform"])
    def test_training_uses_one_draw_for_each_row(self, tasks):
        layer, x = make_layer(train=True, n_skills=5), torch.randn(3, 4, IN, dtype=torch.float64)
        torch.manual_seed(9)
        out = layer(x, task_ids=tasks)
        torch.manual_seed(9)
        logits = layer.poly_router["default"].module_logits[tasks].view(3, 2, 5)
        p = RelaxedBernoulli(1.0, logits=logits).rsample()
        for row in range(3):
            w = torch.stack([p[row, split] / (p[row, split].sum() + 1e-12) for split in range(2)])
            A, B = mixed_by(layer, w)
            torch.testing.assert_close(out[row], layer.base_layer(x[row]) + x[row] @ A @ B / 3, rtol=1e-4, atol=1e-5)

    def test_rows_of_one_task_draw_independently(self):
        layer = make_layer(train=True)
        out = layer(torch.randn(1, IN, dtype=torch.float64).expand(200, IN), task_ids=1)
        assert out.unique(dim=0).shape[0] == 200

    def test_at_eval_equal_rows_of_one_task_are_equal(self):
        out = make_layer()(torch.randn(1, IN, dtype=torch.float64).expand(5, IN), task_ids=1)
        torch.testing.assert_close(out, out[:1].expand(5, OUT))

    @pytest.mark.parametrize("tasks", [1, [2, 0, 2]], ids=["uniform", "mixed"])
    def test_without_noise_training_is_eval(self, tasks):
        layer, x = make_layer(router_noise=False), torch.randn(3, IN, dtype=torch.float64)
        expected = layer(x, task_ids=tasks)
        torch.testing.assert_close(layer.train()(x, task_ids=tasks), expected)


class TestScaleAndDropout:
    @pytest.mark.parametrize(("alpha", "r"), [(1, 3), (8, 4), (0.5, 2)])
    def test_the_update_is_scaled_by_alpha_over_r(self, alpha, r):
        layer, x = make_layer(lora_alpha=alpha, r=r, n_tasks=1), torch.randn(3, IN, dtype=torch.float64)
        A, B = tiny.naive_pair(layer, "default", 0)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ A @ B * alpha / r, rtol=1e-5, atol=1e-6)

    def test_scales_can_be_set_multiplied_and_put_back_as_those_of_lora(self):
        ours = make_layer(lora_alpha=6, n_tasks=1)
        lora = peft.get_peft_model(
            nn.Sequential(nn.Linear(IN, OUT)), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
        )
        theirs, x = lora.base_model.model[0], torch.randn(3, IN, dtype=torch.float64)
        update = ours(x) - ours.base_layer(x)
        steps = [("scale_layer", 0.5), ("scale_layer", 3.0), ("unscale_layer", 0.5), ("unscale_layer",)]
        steps += [
            ("set_scale", "default", 2.0),
            ("set_scale", "absent", 9.0),
            ("scale_layer", 2.0),
            ("unscale_layer", None),
        ]
        for verb, *arguments in steps:
            for layer in (ours, theirs):
                getattr(layer, verb)(*arguments)
            torch.testing.assert_close(ours(x) - ours.base_layer(x), update * theirs.scaling["default"] / 2)

    def test_dropout_acts_on_the_input_of_the_adapter_in_training_only(self):
        layer = make_layer(lora_dropout=0.4, router_noise=False)
        x, tasks = torch.randn(3, 50, IN, dtype=torch.float64), [2, 0, 1]
        assert torch.equal(layer(x, task_ids=tasks), layer(x, task_ids=tasks))
        torch.testing.assert_close(layer(x, task_ids=tasks), naive_forward(layer, x, tasks))
        torch.manual_seed(4)
        out = layer.train()(x, task_ids=tasks)
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x, 0.4)
        update = naive_forward(layer, dropped, tasks) - layer.base_layer(dropped)
        torch.testing.assert_close(out, layer.base_layer(x) + update)


class TestDtypes:
    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("context", ["grad", "no-grad"])
    def test_the_result_has_the_dtype_of_the_base_layer(self, base_dtype, adapter_dtype, training, context):
        layer = make_layer(dtype=adapter_dtype, router_noise=False, train=training)
        layer.base_layer.to(base_dtype)
        x, tasks = torch.randn(3, 4, IN).to(base_dtype), [2, 0, 1]
        with MODES[context]():
            out = layer(x, task_ids=tasks)
        assert out.dtype == base_dtype
        torch.testing.assert_close(out.double(), naive_forward(layer, x, tasks).double(), rtol=3e-2, atol=3e-2)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("tasks", [1, [2, 0, 1]], ids=["uniform", "mixed"])
    def test_autocast_computes_as_it_does_for_a_plain_layer(self, tasks, training):
        layer, x = make_layer(dtype=torch.float32, router_noise=False, train=training), torch.randn(3, 4, IN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, plain = layer(x, task_ids=tasks), layer.base_layer(x)
        assert out.dtype == plain.dtype == torch.bfloat16
        expected = naive_forward(layer, x, [tasks] * 3 if isinstance(tasks, int) else tasks)
        torch.testing.assert_close(out.double(), expected.double(), rtol=3e-2, atol=3e-2)
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for name, p in layer.named_parameters() if "poly" in name)

    def test_skills_are_mixed_in_full_precision_under_autocast(self):
        layer, ids = make_layer(dtype=torch.float32), torch.tensor([2, 0, 1])
        expected = layer.mixed_pair("default", ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pair = layer.mixed_pair("default", ids)
        assert [mixed.dtype for mixed in pair] == [torch.float32, torch.float32]
        assert all(torch.equal(mixed, wanted) for mixed, wanted in zip(pair, expected, strict=True))

    def test_a_compiled_layer_keeps_the_dtype_of_the_base_layer(self):
        layer = make_layer(dtype=torch.float32)
        layer.base_layer.to(torch.bfloat16)
        x, tasks = torch.randn(3, 4, IN, dtype=torch.bfloat16), torch.tensor([2, 0, 1])
        out = torch.compile(layer, backend="eager", fullgraph=True)(x, task_ids=tasks)
        assert out.dtype == torch.bfloat16
        expected = naive_forward(layer, x, [2, 0, 1])
        torch.testing.assert_close(out.double(), expected.double(), rtol=3e-2, atol=3e-2)

    def test_underflowing_logits_in_half_precision_give_no_nan_under_autocast(self):
        layer = make_layer(dtype=torch.float16, n_tasks=1)
        nn.init.constant_(layer.poly_router["default"].module_logits, -20.0)
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(torch.randn(3, IN).half()).isfinite().all()


def test_a_reset_draws_anew_and_may_spare_the_router():
    layer = make_layer()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.reset_poly_parameters("absent", True)
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    layer.reset_poly_parameters("default", True, reset_router=False)
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"poly_lora_A.default", "poly_lora_B.default"}


def test_the_names_are_those_of_pefts_own_poly():
    layer = make_layer(r=2, n_skills=5, n_splits=4)
    assert PolyLayer.adapter_layer_names == ("poly_lora_A", "poly_lora_B", "poly_router")
    assert {"r", "n_tasks", "n_skills", "n_splits", "poly_type"} <= set(PolyLayer.other_param_names)
    sizes = (layer.r, layer.n_tasks, layer.n_skills, layer.n_splits, layer.poly_type)
    assert [size["default"] for size in sizes] == [2, N_TASKS, 5, 4, "poly"]
    assert repr(layer).startswith("poly.Linear(")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [0, 2])
def test_the_weight_of_a_task_has_the_layout_of_the_base_weight(kind, task):
    layer, x = make_layer(kind, train=True), torch.randn(3, IN, dtype=torch.float64)
    delta = layer.get_delta_weight("default", task)
    assert delta.shape == layer.base_layer.weight.shape
    update = x @ (delta if kind == "conv1d" else delta.T)
    torch.testing.assert_close(update, naive_forward(layer, x, [task] * 3) - layer.base_layer(x), rtol=1e-5, atol=1e-5)
