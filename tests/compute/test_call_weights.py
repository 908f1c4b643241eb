"""Mixing weights of a whole call: equal to each layer's own, never stale, and only where routers are at hand."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import poly, spread
from tiny import CASES, TASKS

from peft_poly import PolyLayer
from peft_poly.compute.call_weights import KINDS, SMALL, CallWeights


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
