"""Mixing weights of a whole call: equal to each layer's own, never stale, and only where routers are at hand."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import poly, spread
from tiny import CASES, TASKS

from peft_poly import PolyLayer
from peft_poly.compute.call_routing import KINDS, SMALL, CallRouting, CallWeights
from peft_poly.tasks.batch import TaskBatch


def make_model(case: str = "llama", **settings):
    torch.manual_seed(0)
    return spread(peft.get_peft_model(CASES[case].make(), poly(case, task_names=TASKS, **settings))).eval()


def layers_of(model) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def logits_of(layer: PolyLayer) -> torch.Tensor:
    return layer.poly_router["default"].module_logits


@pytest.fixture
def worked_out(monkeypatch):
    """The tasks of each time that the weights of all layers were worked out."""
    times, work_out = [], CallWeights._work_out

    def noting(self, name, tasks):
        times.append(tasks.tolist())
        return work_out(self, name, tasks)

    monkeypatch.setattr(CallWeights, "_work_out", noting)
    return times


@pytest.mark.parametrize("n_tasks", [3, SMALL], ids=["routers stacked whole", "rows looked up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_they_are_the_routers_own(dtype, granularity, n_tasks):
    settings = {"n_tasks": n_tasks, "n_skills": 3, "n_splits": 2, "router_granularity": granularity}
    model = spread(peft.get_peft_model(CASES["llama"].make(), poly("llama", **settings))).eval()
    for layer in layers_of(model):
        layer.poly_router.to(dtype)
    tasks = torch.tensor([2, 0, 2])
    weights = CallWeights(layers_of(model))
    with torch.no_grad():
        for layer in layers_of(model):
            w = weights.of(layer.poly_router["default"], "default", tasks)
            torch.testing.assert_close(w, layer.poly_router["default"](tasks))


@pytest.mark.parametrize("ids", [[2, 0, 1], [1, 1, 1], "sst2"], ids=str)
def test_a_call_works_them_out_once(ids, worked_out):
    model = make_model()
    inputs = CASES["llama"].inputs()
    with torch.no_grad():
        logits = model(**inputs, task_ids=ids).logits
        assert len(worked_out) == 1
        by_row = [TASKS.index(ids)] * 3 if isinstance(ids, str) else ids
        for row, task in enumerate(by_row):  # a merged model routes nothing
            merged = copy.deepcopy(model).merge_and_unload(task=task)
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            torch.testing.assert_close(merged(**one).logits, logits[row : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["write", "write through .data", "replace .data", "replace"])
def test_the_next_call_sees_every_change_of_a_router(how):
    model, inputs = make_model(), CASES["llama"].inputs()
    with torch.no_grad(), model.use_task([0, 1, 2]):
        before = model(**inputs).logits
        for layer in layers_of(model):
            router = layer.poly_router["default"]
            if how == "write":
                router.module_logits.add_(torch.arange(router.module_logits.numel()).view_as(router.module_logits))
            elif how == "write through .data":
                router.module_logits.data.mul_(-3)
            elif how == "replace .data":
                router.module_logits.data = -3 * router.module_logits.data
            else:
                router.module_logits = torch.nn.Parameter(-3 * router.module_logits)
        after = model(**inputs).logits
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, copy.deepcopy(model)(**inputs, task_ids=[0, 1, 2]).logits)


@pytest.mark.parametrize("how", ["write", "replace .data"])
def test_a_change_within_a_call_is_seen_too(how):
    layer = layers_of(make_model())[0]
    tasks, weights = torch.tensor([0, 2]), CallWeights([layer])
    with torch.no_grad():
        assert weights.of(layer.poly_router["default"], "default", tasks) is not None
        if how == "write":
            logits_of(layer).mul_(2)
        else:
            logits_of(layer).data = logits_of(layer).data * 2
        assert weights.of(layer.poly_router["default"], "default", tasks) is None


def test_routers_that_are_not_at_hand_are_left_to_their_layers():
    layers = layers_of(make_model())
    away, freed, other, plain = layers[:4]
    away.poly_router.to("meta")
    logits_of(freed).untyped_storage().resize_(0)  # as FSDP does between uses
    other.poly_router["default"].module_logits = torch.nn.Parameter(torch.zeros(3, 8).as_subclass(Tagged))
    tasks, weights = torch.tensor([0, 2]), CallWeights(layers[:4])
    with torch.no_grad():
        for layer in (away, freed, other):
            assert weights.of(layer.poly_router["default"], "default", tasks) is None
        assert weights.of(plain.poly_router["default"], "default", tasks) is not None
        assert weights.of(layers[4].poly_router["default"], "default", tasks) is None  # not one of the model's


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("other", ["dtype", "shape", "temperature"])
def test_routers_that_are_not_alike_are_worked_out_by_their_layers(other, gradients):
    model = make_model(n_skills=2)
    layers, tasks = layers_of(model), torch.tensor([0, 2])
    router = layers[2].poly_router["default"]
    if other == "dtype":
        router.double()
    elif other == "shape":
        router.module_logits = torch.nn.Parameter(torch.randn(5, 2))
    else:
        router.temperature = 0.5
    batch = TaskBatch([0, 2], {"default": tasks}, {"default": False})
    with torch.set_grad_enabled(gradients):
        routing = CallRouting(layers, ["default"], batch, n_rows=2)
        for layer in layers:
            own = layer.poly_router["default"]
            share = routing.of(layer, "default", tasks, 2, own.module_logits)
            found = routing.weights.of(own, "default", tasks)
            for w in (None if share is None else share.w, found):
                assert w is None or torch.allclose(w.double(), own(tasks).double())
        inputs = {name: value[:2] for name, value in CASES["llama"].inputs().items()}
        mixed = model(**inputs, task_ids=[0, 2]).logits
        for row, task in enumerate([0, 2]):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, task_ids=task).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)


def test_no_more_kinds_are_held_than_a_call_can_have():
    layer = layers_of(make_model())[0]
    weights, kinds = CallWeights([layer]), [torch.tensor([i % 3]) for i in range(KINDS + 1)]
    with torch.no_grad():
        found = [weights.of(layer.poly_router["default"], "default", tasks) for tasks in kinds]
    assert [w is None for w in found] == [False] * KINDS + [True]


def test_routers_that_sample_have_none(worked_out):
    model = make_model().train()
    with torch.no_grad():
        model(**CASES["llama"].inputs(), task_ids=[0, 1, 2])
    assert not worked_out


def test_with_gradients_there_are_none(worked_out):
    make_model()(**CASES["llama"].inputs(), task_ids=[0, 1, 2])
    assert not worked_out


def test_outside_of_the_models_door_there_are_none(worked_out):
    model = make_model()
    with torch.no_grad(), model.use_task([0, 1, 2]):
        model.get_base_model()(**CASES["llama"].inputs())
    assert not worked_out


def test_an_adapter_that_comes_later_has_them_too(worked_out):
    model = make_model()
    inputs = CASES["llama"].inputs()
    with torch.no_grad():
        model(**inputs, task_ids=0)
        model.add_adapter("other", poly("llama", target_modules=["o_proj", "down_proj"], n_tasks=2))
        spread(model.eval())
        model.set_adapter("other")
        logits = model(**inputs, task_ids=1).logits
        assert worked_out == [[0], [1]]
        merged = copy.deepcopy(model).merge_and_unload(task=1)
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


class Tagged(torch.Tensor):
    """A tensor that is not a plain one."""


# ------------------------------------------------------------------------------------------- with gradients or draws
SETTINGS = {
    "poly": {},
    "mhr": {"n_splits": 2},
    "no noise": {"router_noise": False},
    "temperature": {"router_temperature": 0.5},
    "block": {"router_granularity": "block"},
    "model": {"router_granularity": "model", "router_noise": False},
    "gates": {"poly_type": "gates"},
}


def training_model(case="llama", **settings):
    return spread(peft.get_peft_model(CASES[case].make(), poly(case, **settings))).train()


def step(model, ids, case="llama", seed=3):
    """Outputs and gradients of a training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(**CASES[case].inputs(rows=4), task_ids=ids)
    out = getattr(out, "logits", out)
    out.logsumexp(dim=-1).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def each_by_itself(monkeypatch):
    """Have layers route by themselves, as they do where the call cannot."""
    return lambda: monkeypatch.setattr(CallRouting, "_route", lambda *args: None)


@pytest.mark.parametrize("ids", [[2, 0, 1, 2], [1, 1, 1, 1], 2], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_that_of_layers_that_route_by_themselves(settings, ids, each_by_itself):
    model = training_model(**settings)
    out, gradients = step(model, ids)
    each_by_itself()
    wanted, each = step(model, ids)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == each.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, each[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"n_splits": 2}, {"router_temperature": 0.5}], ids=str)
def test_in_module_order_the_draws_of_a_seed_are_those_of_the_layers_one_after_the_other(settings):
    model, wanted = training_model(**settings), []
    torch.manual_seed(5)
    for layer in layers_of(model):
        router = layer.poly_router["default"]
        wanted.append(router(torch.tensor([2, 0, 1])))
    torch.manual_seed(5)
    routing = CallRouting(layers_of(model), ["default"], batch_of([2, 0, 1]), 3)
    for layer, w in zip(layers_of(model), wanted, strict=True):
        share = routing._shares[layer, "default"]
        torch.testing.assert_close(share.w, w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(share.stored, w, rtol=1e-6, atol=1e-6)


def batch_of(ids):
    tensor = torch.tensor(ids)
    return TaskBatch(ids, {"default": tensor}, {"default": False})


def test_a_layer_that_is_not_called_leaves_its_router_without_gradient():
    model = training_model("mlp")
    skipped = layers_of(model)[1]
    inner = model.get_base_model()
    inner.forward = lambda x: inner.lin0(x)
    model(x=CASES["mlp"].inputs()["x"], task_ids=[0, 1, 2]).sum().backward()
    assert logits_of(skipped).grad is None
    assert logits_of(layers_of(model)[0]).grad is not None


def test_frozen_routers_get_no_gradient_and_skills_do():
    model = training_model()
    for layer in layers_of(model):
        layer.poly_router.requires_grad_(False)
    _, gradients = step(model, [0, 1, 2, 0])
    assert gradients
    assert not [name for name in gradients if "router" in name]


def test_a_router_that_changes_within_the_call_is_routed_anew():
    model = training_model("mlp", router_noise=False)
    _, second = layers_of(model)
    x, ids = CASES["mlp"].inputs()["x"], [0, 1, 2]

    def change(module, args):
        logits_of(second).data.mul_(-3)
        with torch.no_grad():
            logits_of(second).add_(0)

    handle = second.register_forward_pre_hook(change)
    changed = model(x=x, task_ids=ids)
    handle.remove()
    torch.testing.assert_close(changed, model(x=x, task_ids=ids))


def test_a_layer_with_other_rows_routes_by_itself():
    model = training_model("mlp", router_noise=False)
    inner, x = model.get_base_model(), CASES["mlp"].inputs(rows=6)["x"]
    forward = inner.forward
    inner.forward = lambda x: forward(x).reshape(3, 10, 4)
    wanted = model(x=x, task_ids=1)
    for row in range(6):
        alone = forward_alone(model, x[row : row + 1])
        torch.testing.assert_close(wanted.reshape(6, 5, 4)[row], alone)


def forward_alone(model, x):
    merged = copy.deepcopy(model).eval()
    merged.get_base_model().__dict__.pop("forward")
    with torch.no_grad():
        return merged(x=x, task_ids=1)[0]


def test_two_adapters_of_two_kinds_are_each_routed():
    model = training_model("mlp", router_noise=False)
    model.add_adapter("gated", poly("mlp", poly_type="gates"))
    model.base_model.set_adapter(["default", "gated"])
    spread(model)
    out = model(x=CASES["mlp"].inputs()["x"], task_ids=[2, 0, 1])
    out.sum().backward()
    assert all(
        layer.poly_router[name].module_logits.grad is not None
        for layer in layers_of(model)
        for name in layer.poly_router
    )
    for row, task in enumerate((2, 0, 1)):
        dense = copy.deepcopy(model).eval().merge_and_unload(task=task)
        torch.testing.assert_close(dense(CASES["mlp"].inputs()["x"][row]), out[row], rtol=1e-4, atol=1e-5)
