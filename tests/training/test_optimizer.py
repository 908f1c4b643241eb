"""Two-speed learning: which parameters learn at which rate and decay, with plain torch and with the Trainer.

What AdamW does to the skills is compared with its formula, worked out by hand for one step.
"""

from __future__ import annotations

import functools

import adapters
import peft
import pytest
import torch
from adapters import adapt
from peft import LoraConfig, PeftModel
from tiny import CASES, MLP, TASKS, llama
from torch import nn
from torch.utils.data import Dataset
from transformers import Adafactor, Trainer, TrainingArguments

from peft_poly import PolyConfig, PolyLayer, create_poly_optimizer
from peft_poly.training import poly_parameter_groups


def poly(case: str = "llama", **settings) -> PolyConfig:
    return adapters.poly(case, **{"r": 2, "n_skills": 3, "n_splits": 2, "task_names": TASKS, **settings})


def adapted(case: str = "llama", **settings) -> PeftModel:
    return adapt(CASES[case].make(), poly(case, **settings))


def layers(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def named_groups(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    """The names of each group's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def trainable_with(model: nn.Module, *parts: str) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name in names if any(part in name for part in parts)}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, task_ids: object) -> None:
    inputs = CASES["llama"].inputs()
    optimizer.zero_grad()
    model.train()(**inputs, labels=inputs["input_ids"], task_ids=task_ids).loss.backward()
    optimizer.step()


def logits_of_routers(model: nn.Module) -> list[torch.Tensor]:
    return [layer.poly_router["default"].module_logits.detach().clone() for layer in layers(model)]


# -------------------------------------------------------------------------------------------------------------- groups
def test_each_group_has_its_parameters_its_rate_and_its_decay():
    model = adapted("bert")
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=2e-3, router_lr=0.3, weight_decay=0.05)
    assert named_groups(model, optimizer.param_groups) == {
        "adapters": trainable_with(model, "poly_lora_A", "poly_lora_B"),
        "router": trainable_with(model, "poly_router"),
        "modules_to_save": trainable_with(model, "classifier.modules_to_save.default.weight"),
        "no_decay": trainable_with(model, "classifier.modules_to_save.default.bias"),
    }
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("adapters", 2e-3, 0.05),
        ("router", 0.3, 0.0),
        ("modules_to_save", 2e-3, 0.05),
        ("no_decay", 2e-3, 0.0),
    ]


def test_the_router_rate_of_the_papers_is_the_default():
    optimizer = create_poly_optimizer(adapted("mlp"), torch.optim.SGD, lr=1e-3)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"adapters": 1e-3, "router": 0.1}


def test_without_a_weight_decay_the_optimizer_has_its_own_but_never_on_the_router():
    optimizer = create_poly_optimizer(adapted("bert"), torch.optim.AdamW, lr=1e-3)  # 0.01 is the default of AdamW
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"adapters": 0.01, "router": 0.0, "modules_to_save": 0.01, "no_decay": 0.0}


def test_further_arguments_go_to_the_optimizer():
    optimizer = create_poly_optimizer(adapted("mlp"), torch.optim.Adam, lr=1e-3, betas=(0.8, 0.9), amsgrad=True)
    assert all(group["betas"] == (0.8, 0.9) and group["amsgrad"] for group in optimizer.param_groups)


def test_every_trainable_parameter_is_in_one_group_once():
    model = adapted("bert", router_granularity="block")
    found = [p for group in poly_parameter_groups(model, lr=1e-3) for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("granularity", "routers"), [("layer", 14), ("block", 2), ("model", 1)])
def test_a_shared_router_is_in_its_group_once(granularity, routers):
    groups = poly_parameter_groups(adapted(router_granularity=granularity), lr=1e-3)
    assert {group["name"]: len(group["params"]) for group in groups} == {"adapters": 28, "router": routers}


@pytest.mark.parametrize(
    ("regime", "groups"),
    [("train_all", ["adapters", "router"]), ("train_router_only", ["router"]), ("average_skills", ["adapters"])],
)
def test_frozen_parameters_and_empty_groups_are_left_out(regime, groups):
    model = adapted()
    getattr(model, regime)()
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert [group["name"] for group in optimizer.param_groups] == groups
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])


def test_an_inactive_adapter_is_left_out():
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly())
    names = named_groups(model, poly_parameter_groups(model, lr=1e-3))
    assert all(".one" in name for group in names.values() for name in group)


def test_a_model_of_which_only_a_part_is_adapted_trains_the_rest_too():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = adapted("mlp")
            self.head = nn.Linear(4, 2)

    model = Joined()
    names = named_groups(model, poly_parameter_groups(model, lr=1e-3))
    assert names["modules_to_save"] == {"head.weight"}
    assert names["no_decay"] == {"head.bias"}


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "make", [poly_parameter_groups, lambda m, **kw: create_poly_optimizer(m, torch.optim.SGD, **kw)]
)
def test_a_model_with_nothing_to_train_is_refused(tmp_path, make):
    adapted("llama").save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(
        ValueError, match=r"No parameter requires a gradient\. Load the adapter with `is_trainable=True`"
    ):
        make(frozen, lr=1e-3)
    with pytest.raises(ValueError, match="MLP has no task-routed layer"):
        make(MLP(), lr=1e-3)
    lora = peft.get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="PeftModel has no task-routed layer"):
        make(lora, lr=1e-3)


# --------------------------------------------------------------------------------------------------------------- steps
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "Adafactor": torch.optim.Adafactor,
    "the papers' Adafactor": functools.partial(Adafactor, scale_parameter=False, relative_step=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_row_of_an_absent_task_stays_bit_equal(optimizer, granularity):
    model = adapted(router_granularity=granularity)
    before = logits_of_routers(model)
    optimizer = create_poly_optimizer(model, OPTIMIZERS[optimizer], lr=0.01, router_lr=0.1, weight_decay=0.5)
    for _ in range(3):
        train_step(model, optimizer, ["rte", "boolq", "rte"])
    for old, new in zip(before, logits_of_routers(model), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
        assert not torch.equal(old[2], new[2])


def test_the_first_step_of_adamw_is_as_long_as_the_rate_of_its_group():
    model = adapted(router_noise=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, router_lr=0.1, weight_decay=0.1, eps=1e-30)
    train_step(model, optimizer, ["rte", "sst2", "boolq"])
    for name, parameter in model.named_parameters():
        if name in before:
            lr, decay = (0.1, 0.0) if "router" in name else (1e-3, 0.1)
            by_hand = before[name] * (1 - lr * decay) - lr * parameter.grad.sign()
            torch.testing.assert_close(parameter.data, by_hand, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- with Trainer
class Rows(Dataset):
    """Twelve rows of tokens for the tasks 0 and 2, none for task 1."""

    def __init__(self, case: str = "llama") -> None:
        self.case = case

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = CASES["llama"].inputs(rows=1, seed=index)["input_ids"][0]
        labels = tokens if self.case == "llama" else torch.tensor(index % 3)
        return {"input_ids": tokens, "labels": labels, "task_ids": torch.tensor(index % 2 * 2)}


class Recorded(Trainer):
    """A Trainer that keeps the learning rate of each group, step by step."""

    rates: list[dict[str, float]]

    def training_step(self, *args, **kwargs):
        self.rates = [*getattr(self, "rates", []), {g["name"]: g["lr"] for g in self.optimizer.param_groups}]
        return super().training_step(*args, **kwargs)


def trainer(model: PeftModel, folder, **kwargs) -> Recorded:
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=7.0, remove_unused_columns=False,
        lr_scheduler_type="linear", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    case = "llama" if "CausalLM" in type(model).__name__ else "bert"
    return Recorded(model, arguments, train_dataset=Rows(case), **kwargs)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_keeps_two_speeds_under_its_schedule(tmp_path, way):
    model = adapted("bert")
    before = logits_of_routers(model)
    if way == "optimizers":
        optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, router_lr=0.1, weight_decay=0.1)
        run = trainer(model, tmp_path, optimizers=(optimizer, None))
    else:
        groups = poly_parameter_groups(model, lr=1e-3, router_lr=0.1, weight_decay=0.1)
        run = trainer(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}))
    run.train()
    for step, rates in enumerate(run.rates):
        left = 1 - step / 4  # the linear schedule
        assert rates == pytest.approx(
            {"adapters": 1e-3 * left, "router": 0.1 * left, "modules_to_save": 1e-3 * left, "no_decay": 1e-3 * left}
        )
    for old, new in zip(before, logits_of_routers(model), strict=True):
        assert torch.equal(old[1], new[1])  # no row of task 1, whatever the decay
        assert not torch.equal(old[0], new[0])


def test_the_state_of_the_optimizer_is_saved_and_resumed():
    model, twin = adapted(router_noise=False), adapted(router_noise=False)
    twin.load_state_dict(model.state_dict())
    one, other = (create_poly_optimizer(m, torch.optim.AdamW, lr=1e-3, weight_decay=0.1) for m in (model, twin))
    train_step(model, one, TASKS)
    train_step(model, one, TASKS)
    train_step(twin, other, TASKS)
    resumed = create_poly_optimizer(twin, torch.optim.AdamW, lr=0.5)
    resumed.load_state_dict(other.state_dict())
    train_step(twin, resumed, TASKS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_an_optimizer_made_after_the_growth_trains_the_new_row():
    model = adapted()
    model.add_tasks(["cb"])
    before = logits_of_routers(model)
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    train_step(model, optimizer, "cb")
    for old, new in zip(before, logits_of_routers(model), strict=True):
        assert torch.equal(old[:3], new[:3])
        assert not torch.equal(old[3], new[3])


@pytest.mark.parametrize("given", ["adamw", None, 7])
def test_an_optimizer_that_is_no_class_is_refused(given):
    with pytest.raises(TypeError, match=r"optimizer_cls must be a class, such as torch\.optim\.AdamW, got"):
        create_poly_optimizer(adapted("mlp"), given, lr=1e-3)
