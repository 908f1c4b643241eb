"""TRL's preference and reinforcement trainers: tasks of rows, a reference that is right, or a true refusal."""

from __future__ import annotations

import math
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from adapters import spread
from rows import tokenizer
from tiny import CASES, TASKS, llama
from torch import nn

from peft_poly import DataCollatorWithTaskIds, PolyConfig, PolyLayer

trl = pytest.importorskip("trl", minversion="1.0")
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference  # noqa: E402
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForRewards  # noqa: E402

COLLATORS = {
    "DPO": DataCollatorForPreference, "KTO": DataCollatorForUnpairedPreference, "Reward": DataCollatorForRewards,
}  # fmt: skip
NAMES = ["DPO", "KTO", "Reward", "GRPO", "RLOO"]
COMPARING = ["DPO", "KTO", "GRPO", "RLOO"]


def words(start: int, n: int) -> str:
    return " ".join(f"w{3 + (7 * start + 3 * index) % 50}" for index in range(n))


def data(name: str, tasks: list[str]) -> datasets.Dataset:
    rows = []
    for index in range(12):
        row: dict[str, Any] = {"prompt": words(index, 3), "task": tasks[index % len(tasks)]}
        if name in ("DPO", "Reward"):
            row |= {"chosen": f" {words(index + 1, 2)}", "rejected": f" {words(index + 2, 3)}"}
        elif name == "KTO":
            row |= {"completion": f" {words(index + 1, 2)}", "label": bool(index % 2)}
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def settings(name: str, **given: Any) -> PolyConfig:
    task_type = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    return PolyConfig(task_type=task_type, r=2, lora_alpha=8, task_names=TASKS, **given)


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name != "Reward":
        return llama()
    config = llama().config
    config.num_labels = 1
    return transformers.LlamaForSequenceClassification(config)


def trained(name: str, **given: Any) -> peft.PeftModel:
    """A model with an adapter that has learnt something; new ones of its config would start at B = 0."""
    model = spread(peft.get_peft_model(base(name), settings(name, init_weights=False, **given)))
    model.peft_config["default"].init_weights = True
    return model


def trainer(name: str, folder: Any, model: nn.Module | None = None, tasks: list[str] = TASKS, **given: Any) -> Any:
    quiet = {
        "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "bf16": False, "logging_steps": 1, "learning_rate": 0.05, "dataloader_pin_memory": False,
    }  # fmt: skip
    kwargs: dict[str, Any] = {"peft_config": settings(name)} if model is None else {}
    if name in COLLATORS:
        kwargs["data_collator"] = DataCollatorWithTaskIds(COLLATORS[name](pad_token_id=0), TASKS)
    else:
        quiet |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        kwargs["reward_funcs"] = lambda completions, **_: [float(hash(text) % 7) for text in completions]
    return getattr(trl, f"{name}Trainer")(
        base(name) if model is None else model,
        args=getattr(trl, f"{name}Config")(str(folder), **{**quiet, **given}),
        train_dataset=data(name, tasks),
        processing_class=tokenizer(),
        **kwargs,
    )


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)}


def tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}" in name}


# --------------------------------------------------------------------------------------------------------- what trains
@pytest.mark.parametrize("name", list(COLLATORS))
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_it_trains_several_tasks_and_starts_from_its_reference(name, start, tmp_path):
    made = trainer(name, tmp_path, None if start == "fresh" else trained(name))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    reference = tensors(made.model, "ref")
    made.train()
    assert moved(made.model, before) == set(before)
    assert not moved(made.model, reference)
    assert bool(reference) == (start == "trained" and name != "Reward")
    first = made.state.log_history[0]
    if name == "DPO":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    if name == "KTO":
        assert first["loss"] == pytest.approx(0.5, abs=1e-6)
        assert first["kl"] == 0


def test_the_rows_of_a_pair_both_have_the_task_of_their_row():
    collate = DataCollatorWithTaskIds(DataCollatorForPreference(pad_token_id=0), TASKS)
    rows = [
        {"prompt_ids": [5], "chosen_ids": [6 + task], "rejected_ids": [20 + task], "task": TASKS[task]}
        for task in (2, 0)
    ]
    batch = collate(rows)
    assert batch["input_ids"][:, 1].tolist() == [8, 6, 22, 20]
    assert batch["task_ids"].tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_a_mixed_batch_has_the_gradients_of_its_rows_alone(name, tmp_path):
    model = trained(name, router_noise=False)
    made = trainer(name, tmp_path, model, gradient_checkpointing=False)
    made._signature_columns = None
    rows = [row for row, _ in zip(made.get_train_dataloader().dataset, range(3), strict=False)]
    assert len({row["task"] for row in rows}) == 3
    collate, gradients = made.data_collator, []
    for parts in ([rows], [[row] for row in rows]):
        model.zero_grad()
        for part in parts:
            loss = made.compute_loss(model, dict(collate(part)))
            (loss * len(part) / len(rows)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_those_that_generate_train_one_task(name, start, tmp_path):
    made = trainer(name, tmp_path, None if start == "fresh" else trained(name), tasks=["sst2"])
    made.model.set_task("sst2")
    rows = {n: p.detach().clone() for n, p in made.model.named_parameters() if n.endswith("default.module_logits")}
    made.train()
    assert made.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    for key, old in rows.items():  # the rows of other tasks stay as they were
        assert torch.equal(made.model.get_parameter(key)[[0, 2]], old[[0, 2]])


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_those_that_generate_are_refused_for_several_tasks_before_the_first_step(name, tmp_path):
    made = trainer(name, tmp_path)
    calls = []
    made.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=rf"{name}Trainer cannot train several tasks at once.*set_task"):
        made.train()
    made.model.set_task("sst2")
    with pytest.raises(
        ValueError, match=rf"{name}Trainer and `set_task` train the one task 'sst2', but row 0 .* 'rte'"
    ):
        made.train()
    assert not calls


# ------------------------------------------------------------------------------------------------------- the reference
@pytest.mark.parametrize("name", COMPARING)
def test_noise_is_switched_off_and_said(name, tmp_path):
    with pytest.warns(UserWarning, match=rf"{name}Trainer compares log-probabilities .* `router_noise`"):
        made = trainer(name, tmp_path, trained(name))
    routers = [r for m in made.model.modules() if isinstance(m, PolyLayer) for r in m.poly_router.values()]
    assert routers
    assert not any(router.noise for router in routers)
    assert made.model.peft_config["default"].router_noise


def test_a_reference_that_is_worked_out_before_is_the_same(tmp_path):
    made = trainer("DPO", tmp_path, trained("DPO"), precompute_ref_log_probs=True)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("case", ["llama", "bert"])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_an_adapter_given_the_config_of_another_is_its_copy(adapter, case, granularity):
    torch.manual_seed(0)
    config = PolyConfig(
        task_type=CASES[case].task_type, init_weights=False, task_names=TASKS, router_granularity=granularity
    )
    model = spread(peft.get_peft_model(CASES[case].make(), config, adapter_name=adapter)).eval()
    model.peft_config[adapter].init_weights = True
    for module in model.modules():
        if isinstance(module, PolyLayer):
            module.set_scale(adapter, 3.0)
    inputs, ids = CASES[case].inputs(), ["boolq", "rte", "sst2"]
    with torch.no_grad():
        want = model(**inputs, task_ids=ids).logits
        with pytest.warns(UserWarning, match=rf"Adapter 'ref' starts as a copy of '{adapter}'"):
            model.add_adapter("ref", model.peft_config[adapter])
        assert torch.equal(model(**inputs, task_ids=ids).logits, want)
        model.set_adapter("ref")
        assert torch.equal(model(**inputs, task_ids=ids).logits, want)
        model.add_tasks(["new"], adapter_name=adapter)  # the copy has a config, and a life, of its own
        assert model.peft_config["ref"].task_names == TASKS
        assert torch.equal(model(**inputs, task_ids=ids).logits, want)


def test_an_adapter_with_an_equal_config_of_its_own_starts_anew():
    config = settings("DPO")
    model = trained("DPO").eval()
    model.add_adapter("fresh", config)
    model.set_adapter("fresh")
    inputs = CASES["llama"].inputs()
    with torch.no_grad():
        fresh = model(**inputs, task_ids="rte").logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, fresh)


# ------------------------------------------------------------------------------------------------------------- refused
def test_more_rows_than_were_given_are_refused_with_what_is_wrong():
    def twice(rows):
        return {"input_ids": torch.zeros(2 * len(rows), 3, dtype=torch.long)}

    collate = DataCollatorWithTaskIds(twice, TASKS)
    with pytest.raises(ValueError, match="function made 4 rows of 2 rows with different tasks, and nothing says which"):
        collate([{"task": "rte"}, {"task": "sst2"}])
    assert collate([{"task": "sst2"}] * 2)["task_ids"].tolist() == [1] * 4
