"""TRL's `SFTTrainer(peft_config=PolyConfig(...))`: our collator around its own, and nothing else.

Weights are compared with those of a plain loop; what would lose the tasks is refused before the first step.
"""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from adapters import GATES
from rows import arguments, tokenizer
from tiny import TASKS, llama
from torch import nn
from torch.utils.data import SequentialSampler

from peft_poly import (
    DataCollatorWithTaskIds,
    PerTaskMetrics,
    PolyConfig,
    PolyLayer,
    TaskSampler,
    TaskSamplingMixin,
    create_poly_optimizer,
)

trl = pytest.importorskip("trl")
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402

TEXTS = [" ".join(f"w{3 + (7 * row + 3 * word) % 50}" for word in range(3 + row % 4)) for row in range(12)]


def texts(form: str = "text", column: str = "task") -> datasets.Dataset:
    """Texts of several lengths; the tasks take turns."""
    found = []
    for index, text in enumerate(TEXTS):
        task = index % 3 if column == "task_ids" else TASKS[index % 3]
        prompt, _, completion = text.partition(" ")
        body = {"text": text} if form == "text" else {"prompt": prompt, "completion": f" {completion}"}
        found.append({**body, column: task, "source": f"row {index}"})
    return datasets.Dataset.from_list(found)


def poly(**settings: Any) -> PolyConfig:
    settings = {"r": 2, "n_skills": 3, "n_splits": 2, "router_noise": False, "init_weights": False, **settings}
    settings = {"router_lr": 0.5, **settings}  # one rate, as in the plain loop
    return PolyConfig(task_type="CAUSAL_LM", task_names=TASKS, **settings)


def collator() -> DataCollatorWithTaskIds:
    return DataCollatorWithTaskIds(DataCollatorForLanguageModeling(pad_token_id=0), TASKS)


def config(folder: Any, **settings: Any) -> SFTConfig:
    quiet = arguments(folder)
    names = ["max_steps", "per_device_train_batch_size", "report_to", "use_cpu", "save_strategy", "disable_tqdm"]
    common = {name: getattr(quiet, name) for name in names}
    return SFTConfig(
        str(folder),
        **{**common, "dataloader_pin_memory": False, "bf16": False, "learning_rate": 0.5, "optim": "sgd", **settings},
    )


class InOrder(SFTTrainer):
    """Rows come in their own order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def sft(folder: Any, cls: type = InOrder, data: Any = None, peft_config: Any = None, model: Any = None, **kwargs: Any):
    settings = kwargs.pop("settings", {})
    torch.manual_seed(0)
    return cls(
        model or llama(),
        config(folder, **settings),
        train_dataset=texts() if data is None else data,
        processing_class=tokenizer(),
        peft_config=poly() if peft_config is None and model is None else peft_config,
        **{"data_collator": collator(), **kwargs},
    )


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loop(model: nn.Module, steps: int = 2, size: int = 4, completions: bool = False) -> None:
    """SGD by hand on the texts, padded by hand; the loss is the mean over the tokens of the batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / steps)
        batch = range(step * size, (step + 1) * size)
        tokens = [[int(word[1:]) for word in TEXTS[row].split()] + [1] for row in batch]
        ids = torch.zeros(size, max(map(len, tokens)), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, found in enumerate(tokens):
            ids[row, : len(found)] = torch.tensor(found)
            labels[row, : len(found)] = torch.tensor([-100, *found[1:]] if completions else found)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(found)] for found in tokens])).long()
        logits = model(input_ids=ids, attention_mask=mask, task_ids=[TASKS[row % 3] for row in batch]).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------- the recipe
newer = pytest.mark.transformers_5(reason="counts the first token as a label")


@pytest.mark.parametrize("form", [pytest.param("text", marks=newer), "prompt and completion"])
@pytest.mark.parametrize(("column", "settings"), [("task", {}), ("task_ids", {}), ("task", GATES)], ids=str)
def test_sft_trains_as_a_plain_loop_does(tmp_path, form, column, settings):
    trainer = sft(tmp_path, data=texts(form, column), peft_config=poly(**settings))
    assert trainer.args.gradient_checkpointing  # TRL's default
    by_hand = sft(tmp_path, peft_config=poly(**settings)).model  # the same seed, the same weights
    start = adapters(trainer.model)
    assert all(torch.equal(value, start[name]) for name, value in adapters(by_hand).items())
    trainer.train()
    plain_loop(by_hand, completions=form != "text")
    for name, parameter in adapters(by_hand).items():
        torch.testing.assert_close(adapters(trainer.model)[name], parameter, rtol=1e-3, atol=1e-5)
    moved = [name for name, parameter in adapters(trainer.model).items() if not torch.equal(parameter, start[name])]
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_nothing_with_router_noise(tmp_path, settings):
    weights = []
    for checkpointing in (False, True):
        chosen = {"gradient_checkpointing": checkpointing}
        if checkpointing:
            chosen["gradient_checkpointing_kwargs"] = settings
        trainer = sft(tmp_path, peft_config=poly(router_noise=True), settings=chosen)
        trainer.train()
        weights.append(adapters(trainer.model))
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, rtol=1e-5, atol=1e-6)


def test_evaluation_sees_the_tasks_and_logs_the_loss_of_each(tmp_path):
    data = texts("prompt and completion")
    parts = {task: data.filter(lambda row, task=task: row["task"] == task) for task in TASKS}
    trainer = sft(tmp_path, data=data, eval_dataset=parts)
    logged = trainer.evaluate()
    model = trainer.model.eval()
    for index, task in enumerate(TASKS):
        losses, counts = [], []
        for text in TEXTS[index::3]:
            ids = torch.tensor([[int(word[1:]) for word in text.split()] + [1]])
            with torch.no_grad():  # the first token is the prompt
                losses.append(model(input_ids=ids, labels=ids, task_ids=task).loss.item() * (ids.shape[1] - 1))
            counts.append(ids.shape[1] - 1)
        assert logged[f"eval_{task}_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-4)


def test_metrics_by_task_and_sampling_by_task_serve_here_too(tmp_path):
    class Balanced(TaskSamplingMixin, SFTTrainer):
        pass

    def hits(prediction):
        right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}

    metrics = PerTaskMetrics(hits, TASKS)
    unequal = texts().select([0, 3, 6, 9, 1, 2])  # four of the first task, one each of the others
    trainer = sft(
        tmp_path,
        Balanced,
        unequal,
        eval_dataset=texts(),
        compute_metrics=metrics,
        task_balance="uniform",
        settings={"loss_type": "nll"},  # TRL 1.14's default makes no logits
    )
    tasks = list(unequal["task"])
    drawn = [batch["task_ids"] for batch in trainer.get_train_dataloader()]
    assert sorted(torch.cat(drawn).tolist()) == [0, 0, 1, 1, 2, 2]
    assert len(list(TaskSampler(tasks, "uniform", seed=trainer.args.seed))) == 6
    trainer.train()
    logged = trainer.evaluate()
    assert {f"eval_{task}_accuracy" for task in TASKS} <= set(logged)
    assert metrics.table["rte"]["accuracy"] == logged["eval_rte_accuracy"]


def test_the_two_speed_optimizer_is_set_on_the_trainer(tmp_path):
    trainer = sft(tmp_path)
    trainer.optimizer = create_poly_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3, router_lr=0.1)
    trainer.train()
    assert {g["name"]: g["initial_lr"] for g in trainer.optimizer.param_groups} == {"adapters": 1e-3, "router": 0.1}


def test_a_model_that_has_its_adapter_can_be_passed_as_it_is(tmp_path):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), poly())
    trainer = sft(tmp_path, model=model)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_saved_adapter_is_opened_by_peft(tmp_path):
    import peft

    trainer = sft(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, task_ids="sst2").logits
        torch.testing.assert_close(again.eval()(input_ids=ids, task_ids="sst2").logits, expected)


# ---------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    "settings", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"padding_free": True}]
)
def test_packing_is_refused_before_the_first_step(tmp_path, settings):
    settings = {"max_length": 16 if "packing" in settings else None, **settings}
    trainer = sft(tmp_path, settings=settings, data_collator=None)
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(
        ValueError, match=r"`(packing|padding_free)=True` of SFTConfig would put examples of several tasks"
    ):
        trainer.train()
    assert not forwards


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_with_our_collator_trl_refuses_such_batches_first(tmp_path, settings):
    with pytest.raises(ValueError, match="Passing a custom data collator is not supported when using padding-free"):
        sft(tmp_path, settings=settings)


@pytest.mark.parametrize("column", ["task", "task_ids"])
def test_the_set_task_does_not_speak_for_rows_of_other_tasks(tmp_path, column):
    settings = {"padding_free": True, "max_length": None, "max_steps": 1}
    trainer = sft(tmp_path, data=texts(column=column), settings=settings, data_collator=None)
    trainer.model.set_task("sst2")
    said = "'rte'" if column == "task" else "0"
    match = (
        rf"`padding_free=True` and `set_task` train the one task 'sst2', but row 0 of the data set has the task {said}"
    )
    with pytest.raises(ValueError, match=match):
        trainer.train()


def test_packing_serves_a_run_of_one_task(tmp_path):
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 8, "max_steps": 1}
    trainer = sft(tmp_path, settings=settings, data_collator=None)
    trainer.model.set_task("sst2")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n.endswith("module_logits")}
    trainer.train()
    for name, old in before.items():
        new = trainer.model.get_parameter(name)
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert not torch.equal(new[1], old[1])


def test_without_our_collator_the_missing_tasks_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"No task is known for this call.*Pass `task_ids=`"):
        sft(tmp_path, data_collator=None).train()


def test_the_layers_are_ours(tmp_path):
    assert any(isinstance(module, PolyLayer) for module in sft(tmp_path).model.modules())
