"""The verbs of a tuner: what it tells about the tasks, by name and by id, and how they are routed."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from adapters import adapt, poly
from tiny import MLP, TASKS, bert, t5

from peft_poly import PolyLayer


def test_the_tasks_of_the_active_adapter_have_names_and_ids():
    model = peft.get_peft_model(MLP(), poly("mlp", task_names=TASKS))
    assert model.task_names == TASKS
    assert [model.task_id(name) for name in TASKS] == [0, 1, 2]
    assert model.task_id(2) == 2
    model.add_adapter("other", poly("mlp", n_tasks=2, task_names=["x", "rte"]))
    assert model.task_id("rte") == 0
    model.set_adapter("other")
    assert model.task_names == ["x", "rte"]
    assert model.task_id("rte") == 1


def test_the_names_are_handed_out_as_a_copy():
    model = peft.get_peft_model(MLP(), poly("mlp", task_names=TASKS))
    model.task_names.append("more")
    assert model.task_names == TASKS


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("st2", r"Unknown task 'st2'\. Did you mean 'sst2'\? Adapter 'default' knows: rte, sst2, boolq"),
        (3, r"Task ids of adapter 'default' must lie in \[0, 2\], got 3"),
        (-1, r"must lie in \[0, 2\], got -1"),
        (1.0, "A task must be an integer id or a name, got 1.0"),
        (True, "A task must be an integer id or a name, got True"),
        (None, "A task must be an integer id or a name, got None"),
    ],
)
def test_a_task_that_there_is_not_has_no_id(task, message):
    model = peft.get_peft_model(MLP(), poly("mlp", task_names=TASKS))
    with pytest.raises(ValueError, match=message):
        model.task_id(task)


def test_tasks_without_names():
    model = peft.get_peft_model(MLP(), poly("mlp"))
    assert model.task_names is None
    assert model.task_id(2) == 2
    with pytest.raises(ValueError, match="Task 'rte' was given by name, but adapter 'default' has no names"):
        model.task_id("rte")


@pytest.mark.parametrize("make", [t5, bert])
@pytest.mark.parametrize("training", [True, False])
def test_routing_weights_are_those_of_a_loop_in_either_mode(make, training):
    case = make.__name__
    model = adapt(make(), poly(case, n_skills=3, n_splits=2)).train(training)
    weights = model.routing_weights()
    found = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, PolyLayer)}
    assert set(weights) == set(found)
    for name, layer in found.items():
        assert weights[name].shape == (3, 2, 3)
        assert weights[name].dtype == torch.float32
        assert not weights[name].requires_grad
        for task, row in enumerate(layer.poly_router["default"].module_logits.tolist()):
            for split in range(2):
                p = [1 / (1 + math.exp(-value)) for value in row[3 * split : 3 * split + 3]]
                wanted = torch.tensor([value / sum(p) for value in p])
                torch.testing.assert_close(weights[name][task, split], wanted, atol=1e-6, rtol=1e-5)
        assert layer.poly_router["default"].training is training


def test_routing_weights_of_a_named_adapter():
    model = adapt(MLP(), poly("mlp"))
    model.add_adapter("other", poly("mlp", n_tasks=5, n_skills=2, target_modules=["lin0"]))
    weights = model.routing_weights("other")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {"lin0": (5, 1, 2)}
    with pytest.raises(ValueError, match=r"There is no adapter 'another'\. There are: \['default', 'other'\]"):
        model.routing_weights("another")
