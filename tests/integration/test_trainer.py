"""The stock `Trainer` with no special setting: columns, training, evaluation by task, generation, missing tasks.

What it trains is compared with a plain loop over the same batches, what it evaluates with the model called row by row.
"""

from __future__ import annotations

import functools
import inspect
import itertools

import datasets
import numpy as np
import peft
import pytest
import torch
from adapters import GATES, adapt, poly
from peft import LoraConfig, PeftModel
from rows import KINDS, TorchRows, arguments, rows, seq2seq_arguments, tokenizer, with_ids
from tiny import CASES, TASKS, llama
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_poly import DataCollatorWithTaskIds, PerTaskMetrics, PolyConfig, create_poly_optimizer
from peft_poly.training import poly_parameter_groups

named = functools.partial(DataCollatorWithTaskIds, task_names=TASKS)


def adapted(case: str = "llama", **settings) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 2, "n_skills": 3, "n_splits": 2, "task_names": TASKS, "router_noise": False, **settings}
    return adapt(CASES[case].make(), poly(case, **settings))


def classes(found: list[dict]) -> list[dict]:
    """The rows with a class of three as their label."""
    return [{**row, "labels": index % 3} for index, row in enumerate(found)]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class InOrder(Trainer):
    """Rows come in their own order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def plain_loop(model: PeftModel, found: list[dict], steps: int = 2, size: int = 4, lr: float = 0.5) -> None:
    """Training by hand: SGD, the linear schedule, gradients clipped at 1, as the Trainer's defaults say."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        batch = found[step * size : (step + 1) * size]
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        ids = torch.tensor([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        model(input_ids=ids, labels=labels, task_ids=[row["task"] for row in batch]).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------------- columns
@pytest.mark.parametrize(("case", "settings"), [("llama", {}), ("t5", {}), ("bert", {}), ("llama", GATES)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["task", "task_ids"])
def test_the_stock_trainer_trains_as_a_plain_loop_does(tmp_path, case, settings, kind, column):
    found = classes(rows(8)) if case == "bert" else rows(8)
    settings = {"router_lr": 0.5, **settings}  # one rate
    by_hand = adapted(case, **settings)
    plain_loop(by_hand, found)
    model, start = adapted(case, **settings), parameters(adapted(case, **settings))
    data = KINDS[kind](found if column == "task" else with_ids(found))
    collator = named() if column == "task" else None
    args = arguments(tmp_path, optim="sgd", learning_rate=0.5)
    InOrder(model, args, train_dataset=data, data_collator=collator).train()
    moved = 0
    for name, parameter in parameters(by_hand).items():
        torch.testing.assert_close(parameters(model)[name], parameter, rtol=1e-3, atol=1e-5)
        moved += int(not torch.equal(parameter, start[name]))
    assert moved > 0.9 * len(start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["task", "task_ids"])
def test_evaluation_and_prediction_see_the_tasks(tmp_path, kind, column):
    found, model = classes(rows(7)), adapted("bert")
    data = KINDS[kind](found if column == "task" else with_ids(found))
    trainer = Trainer(model, arguments(tmp_path), data_collator=named() if column == "task" else None)
    expected, losses = [], []
    with torch.no_grad():
        for row in found:
            one = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
            output = model(**one, task_ids=row["task"])
            expected.append(output.logits[0].numpy())
            losses.append(output.loss.item())
    output = trainer.predict(data)
    np.testing.assert_allclose(output.predictions, np.stack(expected), rtol=1e-4, atol=1e-5)
    assert output.label_ids.tolist() == [row["labels"] for row in found]
    by_batch = [np.mean(losses[:4])] * 4 + [np.mean(losses[4:])] * 4  # the Trainer weighs batches, not rows
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(np.mean(by_batch[:7]), rel=1e-4)


def test_a_stream_of_rows_keeps_its_tasks(tmp_path):
    by_hand, model = adapted(router_lr=0.5), adapted(router_lr=0.5)
    plain_loop(by_hand, rows(8))
    stream = datasets.Dataset.from_list(rows(8)).to_iterable_dataset()
    settings = arguments(tmp_path, optim="sgd", learning_rate=0.5)
    Trainer(model, settings, train_dataset=stream, data_collator=named()).train()
    for name, parameter in parameters(by_hand).items():
        torch.testing.assert_close(parameters(model)[name], parameter, rtol=1e-3, atol=1e-5)


def test_a_column_with_the_tasks_names_is_dropped_where_nothing_reads_it(tmp_path):
    both = [{**row, "task_ids": TASKS.index(row["task"])} for row in rows(8)]
    for data in (TorchRows(both), datasets.Dataset.from_list(both)):
        padding = DataCollatorWithPadding(tokenizer())  # would fail on the strings of `task` and `note`
        trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=data, data_collator=padding)
        assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels", "task_ids"}


def test_models_of_other_methods_lose_the_columns_as_before(tmp_path):
    lora = peft.get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer = Trainer(lora, arguments(tmp_path), train_dataset=TorchRows(with_ids(rows(8))), data_collator=None)
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "labels"}


def test_the_signature_of_the_base_model_and_its_generate_stay_as_they_were():
    model, base = adapted(), llama()
    assert inspect.signature(model.get_base_model().forward) == inspect.signature(base.forward)
    assert "forward" not in vars(model.get_base_model())
    with pytest.raises(ValueError, match="task_ids"):  # transformers' own check of the arguments
        base.generate(input_ids=torch.tensor([[3, 4]]), task_ids=torch.tensor([1]))


# ------------------------------------------------------------------------------------------------------- other settings
@pytest.mark.parametrize(
    "settings",
    [
        {"remove_unused_columns": False},
        {"label_names": ["labels"]},
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 1},
        {"auto_find_batch_size": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"length grouped": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_settings_of_the_trainer_serve(tmp_path, settings):
    found = with_ids(rows(12))
    if "length grouped" in settings:
        new = "train_sampling_strategy" in inspect.signature(TrainingArguments).parameters
        settings = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    if settings.get("remove_unused_columns") is False:
        found = [{k: v for k, v in row.items() if k != "note"} for row in found]
    model = adapted()
    before = parameters(model)
    if "gradient_checkpointing" in settings:
        model.enable_input_require_grads()  # transformers 4 leaves it to the user, for LoRA too
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=TorchRows(found), eval_dataset=found)
    assert np.isfinite(trainer.train().training_loss)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert not [name for name, p in parameters(model).items() if torch.equal(p, before[name])]


def test_ids_as_labels_reach_a_plain_compute_metrics(tmp_path):
    seen = []
    trainer = Trainer(
        adapted("bert"),
        arguments(tmp_path, label_names=["labels", "task_ids"]),
        eval_dataset=TorchRows(with_ids(classes(rows(7)))),
        compute_metrics=lambda prediction: seen.append(prediction.label_ids) or {},
    )
    trainer.evaluate()
    assert seen[0][1].tolist() == [0, 1, 2, 0, 1, 2, 0]


# --------------------------------------------------------------------------------------------------- metrics by task
def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"eval_accumulation_steps": 1}, {"include_for_metrics": ["inputs", "loss"]}])
def test_metrics_are_logged_by_task(tmp_path, kind, settings):
    found, model = classes(rows(11)), adapted("bert")
    hits: dict[str, list[bool]] = {task: [] for task in TASKS}
    with torch.no_grad():
        for row in found:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), task_ids=row["task"]).logits
            hits[row["task"]].append(int(logits.argmax()) == row["labels"])
    metrics = PerTaskMetrics(accuracy, TASKS)
    trainer = Trainer(
        model, arguments(tmp_path, **settings), eval_dataset=KINDS[kind](found), data_collator=named(),
        compute_metrics=metrics,
    )  # fmt: skip
    logged = trainer.evaluate()
    expected = {task: np.mean(right) for task, right in hits.items()}
    assert {task: logged[f"eval_{task}_accuracy"] for task in TASKS} == pytest.approx(expected)
    assert logged["eval_accuracy"] == pytest.approx(np.mean([*itertools.chain(*hits.values())]))
    assert metrics.table == {task: {"accuracy": pytest.approx(mean)} for task, mean in expected.items()}
    in_log = trainer.state.log_history[-1]
    assert {key: in_log[key] for key in logged if "accuracy" in key} == {
        k: v for k, v in logged.items() if "accuracy" in k
    }
    assert trainer.compute_metrics is metrics
    assert "prediction_step" not in vars(trainer)
    assert trainer.predict(KINDS[kind](found)).metrics["test_rte_accuracy"] == pytest.approx(expected["rte"])


def test_the_best_model_can_be_the_one_of_a_task(tmp_path):
    found = TorchRows(classes(rows(12)))
    trainer = Trainer(
        adapted("bert"),
        arguments(
            tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, metric_for_best_model="eval_sst2_accuracy", save_only_model=True,
        ),
        train_dataset=found, eval_dataset=found, data_collator=named(), compute_metrics=PerTaskMetrics(accuracy, TASKS),
    )  # fmt: skip
    trainer.train()
    best = max(log["eval_sst2_accuracy"] for log in trainer.state.log_history if "eval_sst2_accuracy" in log)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_sst2_accuracy"] == best


def test_several_evaluation_sets_are_measured_by_task(tmp_path):
    found = classes(rows(9))
    trainer = Trainer(
        adapted("bert"), arguments(tmp_path), data_collator=named(), compute_metrics=PerTaskMetrics(accuracy, TASKS),
        eval_dataset={"seen": TorchRows(found), "held": datasets.Dataset.from_list(found[:3])},
    )  # fmt: skip
    logged = trainer.evaluate()
    assert {f"eval_{part}_{task}_accuracy" for part in ("seen", "held") for task in TASKS} <= set(logged)


def test_a_set_for_each_task_logs_the_loss_of_each(tmp_path):
    found, model = rows(9), adapted()
    whole = datasets.Dataset.from_list(found)
    parts = {task: whole.filter(lambda row, task=task: row["task"] == task) for task in TASKS}
    logged = Trainer(model, arguments(tmp_path), eval_dataset=parts, data_collator=named()).evaluate()
    for task in TASKS:
        ids = torch.tensor([row["input_ids"] for row in found if row["task"] == task])
        with torch.no_grad():
            assert logged[f"eval_{task}_loss"] == pytest.approx(
                model(input_ids=ids, labels=ids, task_ids=task).loss.item()
            )


def test_the_logits_that_a_user_reduces_first_stay_theirs(tmp_path):
    found = TorchRows(classes(rows(6)))
    seen = []

    def argmax(logits, labels):
        seen.append(labels.shape)
        return logits.argmax(-1)

    def same(prediction):
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    trainer = Trainer(
        adapted("bert"), arguments(tmp_path), eval_dataset=found, data_collator=named(),
        compute_metrics=PerTaskMetrics(same, TASKS), preprocess_logits_for_metrics=argmax,
    )  # fmt: skip
    assert "eval_rte_accuracy" in trainer.evaluate()
    assert seen == [(4,), (2,)]


def test_evaluation_by_task_says_what_it_lacks(tmp_path):
    model, metrics = adapted("bert"), PerTaskMetrics(accuracy, TASKS)
    model.set_task("rte")
    bare = [{k: v for k, v in row.items() if k != "task"} for row in classes(rows(4))]
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=bare, compute_metrics=metrics)
    with pytest.raises(ValueError, match="PerTaskMetrics needs `task_ids` in each batch, one id per row"):
        trainer.evaluate()
    assert trainer.compute_metrics is metrics
    apart = arguments(tmp_path, eval_do_concat_batches=False)
    with pytest.raises(ValueError, match="Set `eval_do_concat_batches=True`"):
        Trainer(model, apart, eval_dataset=with_ids(classes(rows(4))), compute_metrics=metrics).evaluate()


# ---------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("beams", [1, 3])
def test_a_seq2seq_trainer_generates_with_the_ids(tmp_path, beams):
    found, model = rows(6), adapted("t5", lora_alpha=16)
    metrics = PerTaskMetrics(lambda p: {"sum": int(p.predictions.sum())}, TASKS)
    trainer = Seq2SeqTrainer(
        model, seq2seq_arguments(tmp_path, generation_max_length=5, generation_num_beams=beams),
        eval_dataset=TorchRows(found), data_collator=named(DataCollatorForSeq2Seq(tokenizer())),
        processing_class=tokenizer(), compute_metrics=metrics,
    )  # fmt: skip
    predictions = trainer.predict(TorchRows(found)).predictions
    for row, generated in zip(found, predictions, strict=True):
        ids = torch.tensor([row["input_ids"]])
        alone = model.generate(input_ids=ids, task_ids=row["task"], max_length=5, num_beams=beams)[0].tolist()
        assert generated[: len(alone)].tolist() == alone
        assert set(generated[len(alone) :].tolist()) <= {0}
    logged = trainer.evaluate()
    for index, task in enumerate(TASKS):
        assert logged[f"eval_{task}_sum"] == predictions[index::3].sum()
    tasks_matter = [model.generate(input_ids=ids, task_ids=task, max_length=5).tolist() for task in TASKS]
    assert len({str(tokens) for tokens in tasks_matter}) > 1


# ------------------------------------------------------------------------------------------------------- two speeds
def test_an_optimizer_set_on_the_trainer_is_used(tmp_path):
    """For trainers that make the adapter themselves, such as TRL's."""
    model = adapted("bert")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=TorchRows(classes(rows())), data_collator=named())
    trainer.optimizer = create_poly_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3, router_lr=0.1)
    trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"adapters": 1e-3, "router": 0.1, "modules_to_save": 1e-3, "no_decay": 1e-3}


# ------------------------------------------------------------------------------------------------------ missing tasks
def logits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("module_logits")}


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("noise", [False, True])
def test_a_task_that_the_run_never_sees_keeps_its_row_bit_for_bit(tmp_path, way, noise):
    found = [row for row in rows(24) if row["task"] != "sst2"]
    model = adapted(router_noise=noise)
    before = logits(model)
    if way == "optimizers":
        optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-2, router_lr=0.1, weight_decay=0.5)
        kwargs = {"optimizers": (optimizer, None)}
    else:
        groups = poly_parameter_groups(model, lr=1e-2, router_lr=0.1, weight_decay=0.5)
        kwargs = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 1e-2})}
    settings = arguments(tmp_path, max_steps=4, weight_decay=0.5)
    Trainer(model, settings, train_dataset=TorchRows(found), data_collator=named(), **kwargs).train()
    for name, after in logits(model).items():
        assert torch.equal(after[1], before[name][1])
        assert not torch.equal(after[0], before[name][0])
        assert not torch.equal(after[2], before[name][2])


def test_the_stock_trainer_leaves_the_row_of_an_absent_task_as_it_is(tmp_path):
    """The router has a group of its own, which does not decay."""
    for decay in (0.0, 0.5):
        model = adapted()
        before = logits(model)
        found = [row for row in rows(24) if row["task"] != "sst2"]
        settings = arguments(tmp_path, weight_decay=decay)
        Trainer(model, settings, train_dataset=TorchRows(found), data_collator=named()).train()
        assert {torch.equal(after[1], before[name][1]) for name, after in logits(model).items()} == {True}


class Gradients(TrainerCallback):
    """Keeps the routers' gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert not [name for name, p in trainable.items() if p.grad is None]
        self.steps.append({n: p.grad.clone() for n, p in trainable.items() if n.endswith("module_logits")})


def test_a_task_that_a_batch_misses_has_a_gradient_of_zero_and_momentum_moves_it_on(tmp_path):
    """Adam goes on in the direction of a task's last batches until its momentum has faded; SGD does not."""
    found = [row for row in rows(24) if row["task"] == "rte"][:4] + [row for row in rows(24) if row["task"] == "sst2"][
        :4
    ]
    for optimizer_cls, moves in ((torch.optim.AdamW, True), (torch.optim.SGD, False)):
        model, seen = adapted(), Gradients()
        optimizer = create_poly_optimizer(model, optimizer_cls, lr=1e-2, router_lr=0.1)
        rows_after: list[dict[str, torch.Tensor]] = []

        class After(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, rows_after=rows_after, **kwargs):
                rows_after.append(logits(model))

        InOrder(
            model, arguments(tmp_path), train_dataset=TorchRows(found), data_collator=named(),
            optimizers=(optimizer, None), callbacks=[seen, After()],
        ).train()  # fmt: skip
        for name in rows_after[0]:
            first, second = (step[name] for step in seen.steps)
            assert torch.count_nonzero(first[0]) > 0 == torch.count_nonzero(first[1:])
            assert torch.count_nonzero(second[1]) > 0 == torch.count_nonzero(second[[0, 2]])
            assert torch.equal(rows_after[0][name][0], rows_after[1][name][0]) is not moves
            assert torch.equal(rows_after[0][name][2], rows_after[1][name][2])  # never seen: no momentum either


def test_batches_of_one_task_each_need_no_special_care(tmp_path):
    model = adapted()
    found = [row for task in TASKS for row in rows(24) if row["task"] == task][:16]
    loader = DataLoader(found, batch_size=4, collate_fn=named())
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3)
    for batch in loader:
        model(input_ids=batch["input_ids"], labels=batch["labels"], task_ids=batch["task_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_of_the_trainer_is_an_adapter(tmp_path):
    model = adapted()
    settings = arguments(tmp_path, save_strategy="steps", save_steps=2)
    Trainer(model, settings, train_dataset=TorchRows(rows()), data_collator=named()).train()
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    assert again.task_names == TASKS
    assert isinstance(again.peft_config["default"], PolyConfig)
    for name, parameter in again.named_parameters():
        if "poly_" in name:
            assert torch.equal(parameter, model.get_parameter(name))


# ------------------------------------------------------------------------------------ the same tasks in the same order
TURNED = TASKS[::-1]


@pytest.mark.parametrize("names", [["default"], ["first", "second"]])
def test_a_checkpoint_with_the_tasks_in_another_order_is_not_loaded(tmp_path, names):
    def trainer(tasks: list[str], **settings) -> Trainer:
        model = adapted(task_names=tasks)
        for name in names if names != ["default"] else ():
            model.add_adapter(name, poly("llama", r=2, n_skills=3, n_splits=2, task_names=tasks))
            model.set_adapter(name)
        saved = {"save_strategy": "steps", "save_steps": 1, **settings}
        return Trainer(model, arguments(tmp_path, **saved), train_dataset=TorchRows(with_ids(rows())))

    trainer(TASKS).train()
    again = trainer(TURNED)
    before = parameters(again.model)
    match = (
        r"task_names of the checkpoint '.*checkpoint-1.*' are not those of the model: id 0 is 'rte' there, and 'boolq' "
        r"in adapter '\w+', so tasks would get the weights.*add_tasks"
    )
    for call in (
        lambda: again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")),
        lambda: again._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1")),  # DeepSpeed comes by here only
    ):
        with pytest.raises(ValueError, match=match):
            call()
    again.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=match):
        again._load_best_model()
    assert all(torch.equal(before[name], p) for name, p in parameters(again.model).items())
    trainer(TASKS, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_collator_and_metrics_that_number_the_tasks_otherwise_are_refused(tmp_path):
    found = TorchRows(classes(rows()))
    match = r"The task_names of {} are not those of the model: id {} is {} there, and {} in adapter 'default'.*Pass"

    def trainer(collator: DataCollatorWithTaskIds, **kwargs) -> Trainer:
        data = {"train_dataset": found, "eval_dataset": found, "data_collator": collator}
        return Trainer(adapted("bert"), arguments(tmp_path), **data, **kwargs)

    turned = trainer(DataCollatorWithTaskIds(task_names=TURNED))
    for call in (turned.train, turned.evaluate, lambda: turned.predict(found)):
        with pytest.raises(ValueError, match=match.format("DataCollatorWithTaskIds", 0, "'boolq'", "'rte'")):
            call()
    longer = trainer(DataCollatorWithTaskIds(task_names=[*TASKS, "cola"]))
    with pytest.raises(ValueError, match=match.format("DataCollatorWithTaskIds", 3, "'cola'", "no task")):
        longer.train()
    metrics = trainer(named(), compute_metrics=PerTaskMetrics(accuracy, ["rte", "boolq", "sst2"]))
    for call in (metrics.train, metrics.evaluate):
        with pytest.raises(ValueError, match=match.format("PerTaskMetrics", 1, "'boolq'", "'sst2'")):
            call()
    fewer = trainer(DataCollatorWithTaskIds(task_names=TASKS[:3]))
    fewer.model.add_tasks(["cola"])
    fewer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_column_under_another_name_is_found_out_while_it_is_there(tmp_path, kind):
    found = [{("task_name" if key == "task" else key): value for key, value in row.items()} for row in rows()]
    hint = r" Is it in `task_name`\? Rename" if kind == "datasets" else ""
    with pytest.raises(ValueError, match=f"neither a column `task`, .* It has: .*{hint}"):
        Trainer(adapted(), arguments(tmp_path), train_dataset=KINDS[kind](found), data_collator=named()).train()


@pytest.mark.parametrize("case", ["bert", "t5", "llama"])
def test_accumulated_batches_are_one_batch_where_the_model_is_said_not_to_count_items(tmp_path, case):
    """transformers takes any model with `**kwargs` for one that divides its loss by `num_items_in_batch`."""
    found = TorchRows(classes(rows(4)) if case == "bert" else rows(4))
    losses = []
    for settings in ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}):
        model = adapted(case)
        if case != "llama":
            model.get_base_model().accepts_loss_kwargs = False
        trainer = InOrder(
            model, arguments(tmp_path, max_steps=1, logging_steps=1, **settings), train_dataset=found,
            data_collator=named(),
        )  # fmt: skip
        trainer.train()
        losses.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
