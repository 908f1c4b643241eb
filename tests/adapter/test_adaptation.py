"""The few-shot regimes: what trains in each, counted as the papers count, and the mean of the inventory.

The mean is compared with a dense model into which the means of A and of B were multiplied out by hand.
"""

from __future__ import annotations

import copy

import adapters
import peft
import pytest
import torch
from adapters import adapt, trainable
from peft import PeftModel
from tiny import CASES, TASKS, bert, first, llama, naive_merge
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_poly import PolyConfig, PolyLayer

GRANULARITIES = ["layer", "block", "model"]
REGIMES = ["train_all", "train_router_only", "average_skills"]
R, K, H, T = 2, 3, 2, 3  # rank, skills, splits, tasks
SKILLS, ROUTER = {"poly_lora_A", "poly_lora_B"}, {"poly_router"}
TRAINED = {"train_all": SKILLS | ROUTER, "train_router_only": ROUTER, "average_skills": SKILLS}


def poly(case: str = "llama", **settings) -> PolyConfig:
    return adapters.poly(case, **{"r": R, "n_skills": K, "n_splits": H, "n_tasks": T, "task_names": TASKS, **settings})


def adapted(case: str = "llama", **settings) -> PeftModel:
    return adapt(CASES[case].make(), poly(case, **settings))


def logits(model: nn.Module, case: str = "llama", **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**CASES[case].inputs(), **kwargs))


def layers(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def kinds(model: nn.Module, adapter: str = "default") -> set[str]:
    """Which of A, B and the router train; all layers must agree."""
    found = set()
    for name in (*SKILLS, *ROUTER):
        parts = [getattr(layer, name)[adapter] for layer in layers(model)]
        flags = {parameter.requires_grad for part in parts for parameter in parameters_of(part)}
        assert len(flags) == 1, name
        if flags == {True}:
            found.add(name)
    return found


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def counts_by_hand(model: nn.Module, regime: str, routers: int) -> int:
    """Numbers that train: skills k r (in + out) a layer, router rows T h k a router; the average has r (in + out)."""
    sizes = [sum(layer.get_base_layer().weight.shape) for layer in layers(model)]
    return {
        "train_all": K * R * sum(sizes) + T * H * K * routers,
        "train_router_only": T * H * K * routers,
        "average_skills": R * sum(sizes),
    }[regime]


def loss(model: nn.Module, task_ids: object = ("rte", "sst2", "boolq")) -> torch.Tensor:
    inputs = CASES["llama"].inputs()
    return model(**inputs, labels=inputs["input_ids"], task_ids=list(task_ids)).loss


# --------------------------------------------------------------------------------------------------------- what trains
@pytest.mark.parametrize(("granularity", "routers"), [("layer", 14), ("block", 2), ("model", 1)])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_trains_what_the_papers_say_and_counts_it_as_they_do(regime, granularity, routers):
    model = adapted(router_granularity=granularity)
    getattr(model, regime)()
    assert kinds(model) == TRAINED[regime]
    assert count(model) == counts_by_hand(model, regime, routers)
    assert model.get_nb_trainable_parameters()[0] == count(model)
    assert all("poly_" in name for name in trainable(model))


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_is_reachable_after_reloading(tmp_path, regime, granularity, is_trainable):
    trained = adapted(router_granularity=granularity)
    trained.save_pretrained(tmp_path)
    getattr(trained, regime)()
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=is_trainable)
    assert count(model) == (counts_by_hand(model, "train_all", trained_routers(model)) if is_trainable else 0)
    getattr(model, regime)()
    if (
        regime == "average_skills" and not is_trainable
    ):  # the mean of a frozen inventory is frozen, until told otherwise
        assert kinds(model) == set()
        model.train_all()
    assert kinds(model) == TRAINED[regime]
    assert trainable(model) == trainable(trained)
    assert count(model) == count(trained)
    loss(model.train()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def trained_routers(model: nn.Module) -> int:
    return len({id(layer.poly_router["default"]) for layer in layers(model)})


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_that_was_saved_is_entered_anew_after_loading(tmp_path, regime):
    model = adapted()
    getattr(model, regime)()
    expected = logits(model, task_ids=TASKS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    getattr(again, regime)()
    assert count(again) == count(model)
    assert torch.equal(logits(again.eval(), task_ids=TASKS), expected)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_survives_what_peft_does_to_requires_grad(regime):
    model = adapted()
    getattr(model, regime)()
    before = trainable(model)
    model.set_adapter("default")
    assert trainable(model) == before
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == before
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert trainable(model) == before
    model.base_model.set_requires_grad("default", True)
    assert trainable(model) == before
    model.add_adapter("other", poly(n_skills=2))
    assert trainable(model) == before
    model.set_adapter("other")
    assert kinds(model) == set()
    assert kinds(model, "other") == SKILLS | ROUTER
    model.set_adapter("default")
    assert trainable(model) == before
    model.set_task("rte")
    model.merge_adapter()
    model.unmerge_adapter()
    assert trainable(model) == before
    model.delete_adapter("other")
    assert trainable(model) == before
    assert trainable(copy.deepcopy(model)) == before


def test_train_all_thaws_what_train_router_only_froze():
    model = adapted()
    before = trainable(model)
    model.train_router_only()
    assert trainable(model) < before
    model.train_all()
    assert trainable(model) == before
    model.set_adapter("default")
    assert trainable(model) == before


def test_where_there_is_one_skill_the_router_has_nothing_to_learn():
    model = adapted()
    model.average_skills()
    before = trainable(model)
    model.train_all()
    assert trainable(model) == before
    message = "Adapter 'default' has one skill, so its router has nothing to learn"
    with pytest.raises(ValueError, match=message):
        model.train_router_only()
    with pytest.raises(ValueError, match=message):
        adapted("mlp", n_skills=1).train_router_only()
    assert trainable(model) == before


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_of_disabled_adapters_waits_until_they_are_enabled(regime):
    model = adapted()
    model.disable_adapter_layers()
    getattr(model, regime)()
    assert trainable(model) == set()
    model.enable_adapter_layers()
    assert kinds(model) == TRAINED[regime]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_of_an_inactive_adapter_waits_until_it_is_active(regime):
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly(n_skills=2))
    one = trainable(model)
    getattr(model, regime)(adapter_name="two")
    assert trainable(model) == one
    model.set_adapter("two")
    assert kinds(model, "two") == TRAINED[regime]
    assert kinds(model, "one") == set()
    model.set_adapter("one")
    assert trainable(model) == one


@pytest.mark.parametrize("regime", REGIMES)
def test_modules_to_save_stay_as_they_are(tmp_path, regime):
    model = adapted("bert", modules_to_save=["classifier"])
    head = {name for name in trainable(model) if "classifier" in name}
    assert len(head) == 2
    getattr(model, regime)()
    assert {name for name in trainable(model) if "poly_" not in name} == head
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(bert(), tmp_path)
    getattr(frozen, regime)()
    assert not [name for name in trainable(frozen) if "poly_" not in name]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("regime", REGIMES)
def test_an_optimizer_step_changes_what_trains_and_nothing_else(regime, granularity):
    model = adapted(router_granularity=granularity)
    getattr(model, regime)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss(model.train()).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == trainable(model)


# ------------------------------------------------------------------------------------------------ the mean inventory
def naive_average(model: PeftModel, adapter: str = "default") -> nn.Module:
    """A dense copy with mean(A) mean(B) added: a product of means, not a mean of products."""
    dense = copy.deepcopy(model.get_base_model())
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, PolyLayer):
            A, B = layer.poly_lora_A[adapter].double(), layer.poly_lora_B[adapter].double()
            n_splits, n_skills = A.shape[:2]
            rows = [sum(A[split, skill] for skill in range(n_skills)) / n_skills for split in range(n_splits)]
            columns = [sum(B[split, skill] for skill in range(n_skills)) / n_skills for split in range(n_splits)]
            delta = torch.cat(rows, 0) @ torch.cat(columns, 1) * layer.lora_alpha[adapter] / layer.r[adapter]
            base = layer.base_layer
            is_conv1d = type(base).__name__ == "Conv1D"
            base.weight.data = (base.weight.double() + (delta if is_conv1d else delta.T)).to(base.weight.dtype)
            setattr(dense.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], base)
    return dense


@pytest.mark.parametrize("case", CASES)
def test_the_averaged_adapter_is_the_product_of_the_means_for_every_task(case):
    model = adapted(case, lora_alpha=5)
    expected = logits(naive_average(model), case)
    routed = logits(model, case, task_ids=0)
    model.average_skills()
    assert not torch.allclose(routed, expected, rtol=1e-3, atol=1e-4)
    for task_ids in ("rte", 1, TASKS, [2, 0, 1]):
        torch.testing.assert_close(logits(model, case, task_ids=task_ids), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, case, task_ids=0), logits(model, case, task_ids=2))


def test_averaging_is_what_flat_routing_computes():
    model = adapted()
    for layer in layers(model):
        layer.poly_router["default"].module_logits.data.zero_()
    flat = logits(model, task_ids=TASKS)
    model.average_skills()
    torch.testing.assert_close(logits(model, task_ids=TASKS), flat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_averaged_adapter_is_saved_with_one_skill_and_loads(tmp_path, granularity):
    model = adapted(router_granularity=granularity)
    model.average_skills()
    assert model.peft_config["default"].n_skills == 1
    assert {layer.n_skills["default"] for layer in layers(model)} == {1}
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        if "poly_router" in key:
            assert torch.equal(tensor, torch.zeros(T, H))
        else:
            assert tensor.shape[:2] == (H, 1)
    assert all(torch.equal(w, torch.ones(T, H, 1)) for w in model.routing_weights().values())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert loaded.peft_config["default"].n_skills == 1
    assert torch.equal(logits(loaded, task_ids=TASKS), logits(model, task_ids=TASKS))


def test_averaging_twice_is_averaging_once():
    model = adapted()
    model.average_skills()
    expected = logits(model, task_ids=TASKS)
    before = trainable(model)
    model.average_skills()
    assert torch.equal(logits(model, task_ids=TASKS), expected)
    assert trainable(model) == before


def test_training_an_averaged_adapter_draws_no_sample_that_matters():
    model = adapted()
    model.average_skills()
    assert torch.equal(loss(model.train()), loss(model.train()))
    assert torch.equal(loss(model.train()), loss(model.eval()))


def test_tasks_join_merge_and_leave_an_averaged_adapter():
    model = adapted()
    model.average_skills()
    before = trainable(model)
    expected = logits(model, task_ids=0)
    model.add_tasks(["cb"])
    assert trainable(model) == before
    assert torch.equal(logits(model, task_ids="cb"), expected)
    model.remove_tasks("rte")
    dense = logits(naive_merge(model.get_base_model(), 0))
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter(task="cb")
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-5)


def test_averaging_leaves_another_adapter_alone():
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly(n_skills=2))
    adapters.spread(model).eval()
    model.set_adapter("two")
    expected = logits(model, task_ids=TASKS)
    model.average_skills("one")
    assert torch.equal(logits(model, task_ids=TASKS), expected)
    assert model.peft_config["two"].n_skills == 2


def test_a_merged_adapter_is_not_averaged():
    model = adapted("mlp")
    model.merge_adapter(task=0)
    with pytest.raises(ValueError, match=r"is merged\. Call `unmerge_adapter\(\)` before its skills change"):
        model.average_skills()
    assert model.peft_config["default"].n_skills == K


@pytest.mark.parametrize("regime", REGIMES)
def test_an_adapter_that_does_not_exist_is_refused(regime):
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        getattr(adapted("mlp"), regime)("other")


# -------------------------------------------------------------------------------------------------------- with Trainer
class Rows(Dataset):
    """Eight rows of tokens, with the task of each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = CASES["llama"].inputs(rows=1, seed=index)["input_ids"][0]
        return {"input_ids": tokens, "labels": tokens, "task_ids": torch.tensor(index % T)}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_trainer_trains_what_the_regime_says(tmp_path, regime):
    model = adapted(router_granularity="block")
    getattr(model, regime)()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01, remove_unused_columns=False,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows()).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == trainable(model)
    assert kinds(model) == TRAINED[regime]
