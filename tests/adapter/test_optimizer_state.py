"""Tasks join and leave while an optimizer runs: it goes on for the tasks that stay as if nothing had happened.

The reference is a twin whose tasks never change: the rows of the tasks that both have must stay bit-equal.
"""

from __future__ import annotations

import functools

import adapters
import peft
import pytest
import torch
from tiny import MLP, TASKS
from transformers import Adafactor

from peft_poly import create_poly_optimizer

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "SGD": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
}
FACTORED = {
    "torch's Adafactor": torch.optim.Adafactor,
    "transformers' Adafactor": functools.partial(Adafactor, scale_parameter=False, relative_step=False),
}


def adapted(**settings) -> peft.PeftModel:
    torch.manual_seed(0)
    settings = {"r": 2, "n_skills": 2, "router_noise": False, "lora_alpha": 4, **settings}
    config = adapters.poly("mlp", task_names=TASKS, **settings)
    return adapters.adapt(MLP(), config).train()


def steps(model: peft.PeftModel, optimizer, tasks: list, n: int = 2) -> None:
    for seed in range(n):
        x = torch.randn(len(tasks), 16, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x, task_ids=tasks).square().sum().backward()
        optimizer.step()


def logits(model: peft.PeftModel) -> list[torch.Tensor]:
    return [p.detach() for name, p in model.named_parameters() if name.endswith("module_logits")]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "settings", [{}, {"router_granularity": "model"}, {"poly_type": "gates", "n_skills": 1}], ids=str
)
def test_the_tasks_that_stay_are_trained_as_if_none_had_come(name, settings):
    model, twin = adapted(**settings), adapted(**settings)
    one, other = (create_poly_optimizer(m, OPTIMIZERS[name], lr=0.01, router_lr=0.1) for m in (model, twin))
    steps(model, one, TASKS)
    steps(twin, other, TASKS)
    model.add_tasks(["cb", "copa"], optimizer=one)
    steps(model, one, TASKS)
    steps(twin, other, TASKS)
    for grown, whole in zip(logits(model), logits(twin), strict=True):
        assert grown.shape[0] == 5
        assert torch.equal(grown[:3], whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_tasks_that_stay_are_trained_as_if_none_had_gone(name):
    model, twin = adapted(), adapted()
    one, other = (create_poly_optimizer(m, OPTIMIZERS[name], lr=0.01, router_lr=0.1) for m in (model, twin))
    steps(model, one, TASKS)
    steps(twin, other, TASKS)
    model.remove_tasks("sst2", optimizer=one)
    steps(model, one, ["rte", "boolq"])
    steps(twin, other, ["rte", "boolq"])
    for less, whole in zip(logits(model), logits(twin), strict=True):
        assert torch.equal(less, whole[[0, 2]])


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FACTORED])
def test_the_new_row_learns_and_the_schedule_goes_on(name):
    model = adapted()
    optimizer = create_poly_optimizer(model, {**OPTIMIZERS, **FACTORED}[name], lr=0.01, router_lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    steps(model, optimizer, TASKS)
    schedule.step()
    model.add_tasks(["cb"], optimizer=optimizer)
    before = [rows.clone() for rows in logits(model)]
    steps(model, optimizer, ["cb", "rte"])
    schedule.step()
    for old, new in zip(before, logits(model), strict=True):
        assert not torch.equal(old[3], new[3])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 / 3, 0.1 / 3])
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer.load_state_dict(optimizer.state_dict())  # whole: it could be saved and resumed


def test_an_optimizer_that_has_not_stepped_yet_takes_the_new_rows():
    model = adapted()
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=0.01)
    model.add_tasks(["cb"], optimizer=optimizer)
    steps(model, optimizer, ["cb"])
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for g in optimizer.param_groups for p in g["params"])


def test_an_optimizer_of_something_else_is_refused_before_anything_changes():
    model = adapted()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for change in (lambda: model.add_tasks(["cb"], optimizer=other), lambda: model.remove_tasks(0, optimizer=other)):
        with pytest.raises(ValueError, match="This AdamW trains no router of the adapter"):
            change()
    assert model.task_names == TASKS
    assert all(rows.shape[0] == 3 for rows in logits(model))


def test_a_state_without_rows_is_refused_before_anything_changes():
    model = adapted()
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=0.01)
    steps(model, optimizer, TASKS)
    router = next(p for name, p in model.named_parameters() if name.endswith("module_logits"))
    optimizer.state[router]["absmax1"] = torch.zeros(7)  # as quantised states have
    with pytest.raises(ValueError, match=r"AdamW keeps 'absmax1' of a router \(3, 2\) as a Tensor \(7,\)"):
        model.add_tasks(["cb"], optimizer=optimizer)
    assert model.task_names == TASKS


GONE = "holds parameters of an adapter that `add_tasks`, `remove_tasks` or `average_skills` has replaced since"


@pytest.mark.parametrize("settings", [{}, {"poly_type": "gates", "n_skills": 1}], ids=str)
@pytest.mark.parametrize(
    "change",
    [lambda m: m.add_tasks(["cb"]), lambda m: m.remove_tasks("rte"), lambda m: (m.average_skills(), m.train_all())],
    ids=["add", "remove", "average"],
)
def test_an_optimizer_that_holds_what_was_replaced_takes_no_step(change, settings):
    model = adapted(**settings)
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=0.01)
    steps(model, optimizer, ["sst2"])
    change(model)
    with pytest.raises(ValueError, match=GONE):
        steps(model, optimizer, ["sst2"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, create_poly_optimizer(model, torch.optim.AdamW, lr=0.01), ["sst2"])
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_an_optimizer_without_the_rows_goes_on():
    model = adapted()
    skills = torch.optim.AdamW([p for name, p in model.named_parameters() if "poly_lora" in name])
    model.add_tasks(["cb"])
    steps(model, skills, ["cb"])
    frozen = adapted()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("poly_lora" in name)
    optimizer = torch.optim.AdamW(frozen.parameters())  # holds frozen rows, which learn nothing before and after
    frozen.add_tasks(["cb"])
    steps(frozen, optimizer, ["cb"])
