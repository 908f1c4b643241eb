"""Recommended settings: what they fill in, what may be overridden, and the warning of an adapter without them."""

from __future__ import annotations

import warnings

import adapters
import peft
import pytest
import torch
from tiny import CASES, MLP, TASKS
from torch import nn

from peft_poly import PolyConfig, create_poly_optimizer
from peft_poly.config import KINDS
from peft_poly.recommended import SETTINGS


def warned(config: PolyConfig, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(MLP(), config, **kwargs)
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning) and "lora_alpha" in str(one)]


# ------------------------------------------------------------------------------------------------------------ settings
def test_the_scale_follows_the_sizes_and_nothing_is_drawn():
    config = PolyConfig.recommended(task_names=TASKS, r=5, n_skills=6)
    assert (config.r, config.n_skills, config.lora_alpha, config.router_noise) == (5, 6, 30, False)
    assert config.task_names == TASKS
    assert PolyConfig.recommended(task_names=TASKS).lora_alpha > 1


def test_every_kind_has_its_recommendation():
    assert set(SETTINGS) == set(KINDS)


def test_gates_are_as_large_as_the_skills_and_have_the_scale_of_a_lora():
    gates, poly = (PolyConfig.recommended(task_names=TASKS, poly_type=kind) for kind in ("gates", "poly"))
    assert (gates.poly_type, gates.n_skills, gates.n_splits) == ("gates", 1, 1)
    assert gates.r == poly.r * poly.n_skills
    assert gates.lora_alpha == gates.r
    assert PolyConfig.recommended(task_names=TASKS, poly_type="gates", r=5).lora_alpha == 5


@pytest.mark.parametrize(
    "given",
    [{"lora_alpha": 2.5}, {"router_noise": True}, {"n_splits": 4}, {"router_lr": 0.5}, {"r": 7}, {"lora_alpha": 1}],
)
def test_what_is_given_wins(given):
    config = PolyConfig.recommended(task_names=TASKS, **given)
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"r": "8"}, "`r` must be a positive integer, got '8'"),
        ({"poly_type": "nothing"}, "`poly_type` must be one of .*got 'nothing'"),
        ({"task_names": []}, "`task_names` must be a non-empty list"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_by_its_name(given, message):
    with pytest.raises(ValueError, match=message):
        PolyConfig.recommended(**{"task_names": TASKS, **given})


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="n_skils"):
        PolyConfig.recommended(task_names=TASKS, n_skils=3)


def test_the_settings_survive_a_file(tmp_path):
    config = PolyConfig.recommended(task_names=TASKS, router_lr=0.2, unknown_task="mean")
    config.save_pretrained(tmp_path)
    read = PolyConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert (read.router_lr, read.unknown_task) == (0.2, "mean")


# ---------------------------------------------------------------------------------------------------- the router's rate
@pytest.mark.parametrize("rate", [0, -0.1, float("nan"), True, "0.1"])
def test_a_rate_that_is_no_positive_number_is_refused(rate):
    with pytest.raises(ValueError, match="`router_lr` must be a positive number"):
        PolyConfig(router_lr=rate)


@pytest.mark.parametrize("rate", [None, 1e-3, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_asks_the_config_for_the_rate_of_the_router(rate, kind):
    config = adapters.poly("mlp", router_lr=rate, poly_type=kind)
    optimizer = create_poly_optimizer(peft.get_peft_model(MLP(), config), torch.optim.AdamW, lr=1e-3)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"adapters": 1e-3, "router": config.effective_router_lr}
    assert rate is None or rates["router"] == rate


def test_a_rate_that_is_passed_wins_over_that_of_the_config():
    model = peft.get_peft_model(MLP(), adapters.poly("mlp", router_lr=0.7))
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, router_lr=0.2)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"adapters": 1e-3, "router": 0.2}


def test_adapters_that_are_active_together_keep_their_own_rates():
    model = peft.get_peft_model(MLP(), adapters.poly("mlp", router_lr=0.7), adapter_name="one")
    model.add_adapter("two", adapters.poly("mlp", router_lr=0.2))
    model.base_model.set_adapter(["one", "two"])
    groups = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)].split(".")[-2]: group["lr"] for group in groups for p in group["params"]
             if group["name"] == "router"}  # fmt: skip
    assert rates == {"one": 0.7, "two": 0.2}


# ---------------------------------------------------------------------------------------------------------- the warning
@pytest.mark.parametrize("case", ["llama", "bert", "mlp"])
def test_an_adapter_made_with_the_plain_scale_says_what_it_does_and_what_to_type(case):
    config = PolyConfig(task_type=CASES[case].task_type, target_modules=CASES[case].target_modules, task_names=TASKS)
    with pytest.warns(UserWarning, match="lora_alpha") as caught:
        model = peft.get_peft_model(CASES[case].make(), config)
    (message,) = [str(one.message) for one in caught if "lora_alpha" in str(one.message)]
    assert "'default'" in message
    assert "PolyConfig.recommended(" in message
    assert "lora_alpha=32" in message  # 8 * 4
    assert model.peft_config["default"].lora_alpha == 1


def test_each_adapter_says_it_once():
    model = peft.get_peft_model(MLP(), PolyConfig.recommended(task_names=TASKS, target_modules=["lin0", "lin1"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_adapter("second", PolyConfig(target_modules=["lin0", "lin1"]))
        model.set_adapter("second")
        model.train()
        model.add_adapter("third", PolyConfig(target_modules=["lin0", "lin1"]))
    said = [str(one.message).split(" is made")[0] for one in caught if "lora_alpha" in str(one.message)]
    assert said == ["Adapter 'second'", "Adapter 'third'"]


@pytest.mark.parametrize(
    "config",
    [
        PolyConfig.recommended(task_names=TASKS, target_modules=["lin0"]),
        PolyConfig(target_modules=["lin0"], lora_alpha=1),
        PolyConfig(target_modules=["lin0"], lora_alpha=8),
        PolyConfig(target_modules=["lin0"], inference_mode=True),
        PolyConfig(target_modules=["lin0"], r=1, n_skills=1),
    ],
    ids=["recommended", "chosen", "another", "for inference", "as large as a LoRA"],
)
def test_what_was_chosen_or_does_not_train_is_left_in_peace(config):
    assert warned(config) == []


@pytest.mark.parametrize("trains", [False, True])
def test_an_adapter_that_is_loaded_was_made_before(tmp_path, trains):
    peft.get_peft_model(MLP(), PolyConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=trains)


# -------------------------------------------------------------------------------------------------- what they can learn
TENANTS, KINDS_OF_MESSAGE = [f"tenant {n}" for n in range(8)], 8


def learnt(kind: str, router_lr: float | None, steps: int = 200) -> float:
    """Share of new messages that eight tenants, who each name the same eight kinds in a way of their own, get right."""
    torch.manual_seed(0)
    layers = (nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, KINDS_OF_MESSAGE))
    centres = torch.randn(KINDS_OF_MESSAGE, 32)
    names = torch.stack([torch.randperm(KINDS_OF_MESSAGE) for _ in TENANTS])
    config = PolyConfig.recommended(
        task_names=TENANTS, poly_type=kind, target_modules=["0", "2", "4"], router_lr=router_lr
    )
    model = peft.get_peft_model(nn.Sequential(*layers), config)
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.0)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_kind, tenants = torch.randint(KINDS_OF_MESSAGE, (rows,)), torch.randint(len(TENANTS), (rows,))
        return centres[of_kind] + 0.3 * torch.randn(rows, 32), tenants, names[tenants, of_kind]

    for _ in range(steps):
        x, tenants, labels = drawn(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, task_ids=tenants), labels).backward()
        optimizer.step()
    model.eval()
    x, tenants, labels = drawn(1000)
    with torch.no_grad():
        return float((model(x, task_ids=tenants).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("router_lr", [None, 0.03, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_tenants_who_name_the_same_messages_differently_are_learnt_to_the_last(kind, router_lr):
    assert learnt(kind, router_lr) > 0.99
