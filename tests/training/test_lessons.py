"""A stock `Trainer` that is given no optimizer trains the router at its own rate, whatever `optim` names."""

from __future__ import annotations

import logging

import adapters
import peft
import pytest
import torch
from rows import TorchRows, arguments, rows
from tiny import CASES, TASKS, llama
from transformers import Trainer
from transformers.training_args import OptimizerNames

from peft_poly import DataCollatorWithTaskIds, PolyConfig, create_poly_optimizer

COLLATE = DataCollatorWithTaskIds(task_names=TASKS)
SERVED = ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"]
OWN = [name.value for name in OptimizerNames if name.value.startswith(("galore", "apollo", "lomo", "adalomo"))]


def adapted(**settings) -> peft.PeftModel:
    torch.manual_seed(0)
    config = PolyConfig.recommended(
        task_names=TASKS, task_type="CAUSAL_LM", **{"r": 2, "n_skills": 3, "router_lr": 0.3, **settings}
    )
    return peft.get_peft_model(llama(), config)


def stock(model: peft.PeftModel, folder, **settings) -> Trainer:
    options = {name: settings.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in settings}
    return Trainer(
        model, arguments(folder, **settings), train_dataset=TorchRows(rows()), data_collator=COLLATE, **options
    )


def rates(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """Rate before the schedule, and decay, of each group."""
    groups = trainer.optimizer.param_groups
    return {group.get("name", n): (group["initial_lr"], group["weight_decay"]) for n, group in enumerate(groups)}


def learned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optim", SERVED)
@pytest.mark.parametrize("kind", ["poly", "gates"])
def test_the_router_has_its_rate_and_no_decay(tmp_path, optim, kind):
    trainer = stock(
        adapted(poly_type=kind, n_skills={"poly": 3, "gates": 1}[kind]),
        tmp_path,
        optim=optim,
        learning_rate=2e-3,
        weight_decay=0.1,
    )
    trainer.train()
    assert rates(trainer) == {"adapters": (2e-3, 0.1), "router": (0.3, 0.0)}


def test_it_trains_as_the_optimizer_that_one_would_have_passed(tmp_path):
    settings = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_steps": 3, "optim": "adamw_torch"}
    one, other = adapted(), adapted()
    stock(one, tmp_path / "one", **settings).train()
    theirs = create_poly_optimizer(other, torch.optim.AdamW, lr=2e-3, router_lr=0.3, weight_decay=0.1)
    stock(other, tmp_path / "other", **settings, optimizers=(theirs, None)).train()
    assert all(torch.equal(a, b) for a, b in zip(learned(one).values(), learned(other).values(), strict=True))


def test_the_schedule_scales_both_rates(tmp_path):
    trainer = stock(adapted(), tmp_path, learning_rate=2e-3, max_steps=4, lr_scheduler_type="linear")
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1.5e-3, 0.225])


def test_a_run_that_is_resumed_ends_as_the_whole_one(tmp_path):
    settings = {"learning_rate": 2e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, again = adapted(), adapted()
    stock(whole, tmp_path, **settings).train()
    trainer = stock(again, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(trainer)["router"] == (0.3, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(learned(whole).values(), learned(again).values(), strict=True))


def test_both_rates_are_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="peft_poly"):
        stock(adapted(), tmp_path, learning_rate=2e-3).train()
    said = [record.getMessage() for record in caplog.records if "learning rate" in record.getMessage()]
    assert said == ["AdamW has the learning rates: adapters 0.002, router 0.3"]


def test_the_rate_of_the_skills_makes_one_rate(tmp_path):
    model = peft.get_peft_model(llama(), PolyConfig(task_type="CAUSAL_LM", task_names=TASKS, r=2, router_lr=2e-3))
    trainer = stock(model, tmp_path, learning_rate=2e-3)
    trainer.train()
    assert {rate for rate, _ in rates(trainer).values()} == {2e-3}


def test_a_rate_that_nobody_named_is_the_recommended_one(tmp_path):
    config = PolyConfig(task_type="CAUSAL_LM", task_names=TASKS, r=2)
    trainer = stock(peft.get_peft_model(llama(), config), tmp_path)
    trainer.train()
    assert rates(trainer)["router"][0] == config.effective_router_lr


def test_heads_that_are_saved_learn_at_the_rate_of_the_skills(tmp_path):
    model = adapters.adapt(CASES["bert"].make(), adapters.poly("bert", task_names=TASKS, router_lr=0.3))
    trainer = stock(model, tmp_path, learning_rate=2e-3, weight_decay=0.1)
    trainer.create_optimizer()
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert found == {
        "adapters": (2e-3, 0.1), "router": (0.3, 0.0), "modules_to_save": (2e-3, 0.1), "no_decay": (2e-3, 0.0),
    }  # fmt: skip


def test_a_second_run_says_what_its_optimizer_has_not_got(tmp_path):
    model = adapted()
    model.train_router_only()
    trainer = stock(model, tmp_path)
    trainer.train()
    model.train_all()
    skills = {name for name, p in model.named_parameters() if p.requires_grad and "poly_lora" in name}
    with pytest.warns(UserWarning, match=rf"lacks {len(skills)} of the \d+ tensors that require a gradient, such as"):
        trainer.train()
    before = learned(model)
    stock(model, tmp_path).train()
    assert all(not torch.equal(value, before[name]) for name, value in learned(model).items() if name in skills)


def test_a_second_run_with_an_optimizer_of_before_the_growth_is_refused(tmp_path):
    model = adapted()
    trainer = stock(model, tmp_path)
    trainer.train()
    model.add_tasks(["new"])
    with pytest.warns(UserWarning, match="lacks"), pytest.raises(ValueError, match="has replaced since, so they would"):
        trainer.train()
    trainer = stock(model, tmp_path)
    trainer.train()
    model.add_tasks(["newer"], optimizer=trainer.optimizer)
    before = learned(model)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in learned(model).items() if "router" in name)


def test_an_optimizer_of_ones_own_stays_as_it_is(tmp_path):
    model = adapted()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    trainer = stock(model, tmp_path, optimizers=(own, None))
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1


def test_a_class_without_groups_gets_them_and_groups_of_ones_own_stay(tmp_path):
    model = adapted()
    trainer = stock(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    trainer.train()
    assert rates(trainer) == {"adapters": (0.5, 0.0), "router": (0.3, 0.0)}
    assert trainer.optimizer_cls_and_kwargs[1] == {"lr": 0.5}
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = stock(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "params": parameters}))
    trainer.train()
    assert rates(trainer) == {0: (0.5, 0)}


@pytest.mark.parametrize("optim", OWN)
def test_an_optimizer_that_groups_by_itself_is_refused_by_name(tmp_path, optim):
    trainer = stock(adapted(), tmp_path, optim=optim, optim_target_modules="all-linear")
    with pytest.raises(ValueError, match=f"`optim='{optim}'` makes its own groups.*adamw_torch.*`optimizers=`"):
        trainer.train()


def test_the_optimizer_of_another_method_is_that_of_the_trainer(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    data = [{key: value for key, value in row.items() if key != "task"} for row in rows()]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=TorchRows(data))
    trainer.create_optimizer()
    assert [group.get("name") for group in trainer.optimizer.param_groups] == [None, None]


@pytest.mark.parametrize(("section", "refused"), [({"type": "AdamW"}, True), (None, False)])
def test_an_optimizer_of_deepspeeds_config_is_refused_for_it_has_one_rate(tmp_path, monkeypatch, section, refused):
    class Plugin:
        deepspeed_config = {} if section is None else {"optimizer": section}

    trainer = stock(adapted(), tmp_path, learning_rate=2e-3)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", Plugin, raising=False)
    monkeypatch.setattr(type(trainer), "_inner_training_loop", lambda self, **kwargs: "trained")
    trainer.is_deepspeed_enabled = True
    if refused:
        with pytest.raises(ValueError, match=r"DeepSpeed has one learning rate.* at 0\.3.*`router_lr`.*0\.002"):
            trainer.train()
    else:
        assert trainer.train() == "trained"
