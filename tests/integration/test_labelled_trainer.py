"""The stock `Trainer` with tasks of different kinds: batches, loss, metrics, resuming, the best model, processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import labelled_steps
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from labelled import ATTENTION, LABELS, NAMES, TAGS, bert, naive_losses
from labelled_steps import rows, trainer
from rows import TorchRows, arguments, tokenizer
from transformers import DataCollatorForTokenClassification, EvalPrediction, Trainer

from peft_poly import DataCollatorWithTaskIds, PerTaskMetrics, PolyConfig
from peft_poly.labels import read_task_labels

HERE = Path(__file__).parent


def weights(run):
    return {key: p.detach().clone() for key, p in run.model.named_parameters() if p.requires_grad}


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], msg=key, **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


class TestLoss:
    @pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
    def test_an_accumulated_batch_trains_as_a_whole_one(self, settings, tmp_path):
        whole = trainer(tmp_path / "whole", per_device_train_batch_size=8, **settings)
        parts = trainer(
            tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings
        )  # a row without a label is a part of a batch by itself
        whole.train(), parts.train()
        close(weights(whole), weights(parts))
        losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_a_base_model_whose_forward_takes_no_loss_arguments_trains_the_same(self, tmp_path):
        base = bert()
        base.accepts_loss_kwargs = False
        config = PolyConfig(task_type="SEQ_CLS", task_labels=LABELS, target_modules=ATTENTION, r=2, router_noise=False)
        runs = []
        for made in (None, peft.get_peft_model(base, config)):
            run = trainer(tmp_path / "run", made, gradient_accumulation_steps=2, per_device_train_batch_size=4)
            if made is not None:
                made.load_state_dict(runs[0][0])
            start = {key: value.clone() for key, value in run.model.state_dict().items()}
            run.train()
            runs.append((start, weights(run)))
        close(runs[0][1], runs[1][1])

    def test_the_first_loss_is_the_mean_over_labelled_rows(self, tmp_path):
        run = trainer(tmp_path, per_device_train_batch_size=24, max_steps=1)
        run.get_train_dataloader()  # which tells the collator of the labels
        batch = run.data_collator(list(rows().found))
        logits = run.model(input_ids=batch["input_ids"], task_ids=batch["task_ids"]).logits
        kept = [i for i, row in enumerate(rows().found) if row["labels"] is not None]
        found, tasks = [batch["labels"][i].tolist() for i in kept], [rows()[i]["task"] for i in kept]
        found = [values[:3] if task == "genres" else values[0] for values, task in zip(found, tasks, strict=True)]
        want = torch.stack(naive_losses(logits[kept], found, tasks)).mean().item()
        run.train()
        assert run.state.log_history[0]["loss"] == pytest.approx(want, rel=1e-3)

    def test_a_head_that_no_row_asks_for_stays_bit_equal(self, tmp_path):
        run = trainer(tmp_path)
        run.train_dataset = TorchRows([row for row in rows(40) if row["task"] in ("topic", "stars")])
        before = weights(run)
        run.train()
        moved = {key.rpartition(".")[2] for key, p in weights(run).items() if not torch.equal(p, before[key])}
        of_heads = {key for key in moved if key.startswith(("weight_", "bias_"))}
        assert of_heads == {"weight_1", "bias_1", "weight_2", "bias_2"}


class TestEvaluation:
    def test_each_task_is_measured_with_its_own_logits(self, tmp_path):
        run = trainer(tmp_path)
        metrics = run.evaluate()
        predicted = run.predict(rows(10))
        assert {key.removeprefix("eval_") for key in metrics} >= {
            "sentiment_accuracy", "topic_accuracy", "stars_error", "genres_cells", "accuracy", "error", "cells",
        }  # fmt: skip
        logits, labels = predicted.predictions, predicted.label_ids
        topics = [i for i in range(10) if NAMES[i % 4] == "topic" and labels[i][0] != -100]
        right = np.mean([logits[i].argmax() == labels[i][0] for i in topics])
        assert metrics["eval_topic_accuracy"] == pytest.approx(right)
        stars = [abs(logits[i, 0] - labels[i, 0]) for i in range(2, 10, 4) if labels[i, 0] != -100]
        assert metrics["eval_stars_error"] == pytest.approx(np.mean(stars))
        both = (metrics["eval_topic_accuracy"] + metrics["eval_sentiment_accuracy"]) / 2
        assert metrics["eval_accuracy"] == pytest.approx(both)
        assert str(run.compute_metrics).splitlines()[0].split() == ["task", "accuracy", "error", "cells"]

    def test_what_is_not_finite_stays_out_of_the_state(self):
        labels = read_task_labels(LABELS, NAMES)
        prediction = EvalPrediction(predictions=np.zeros((4, 4)), label_ids=np.array([0, 1, 2.0, -100]))
        metrics = PerTaskMetrics(lambda p: {"bad": float("nan"), "rows": len(p.label_ids)}, NAMES)
        with pytest.warns(UserWarning, match="The metric 'bad' of task 'sentiment' is nan and is left out"):
            found = metrics(prediction, task_ids=np.arange(4), task_labels=labels)
        assert found == {"rows": 1.0, "sentiment_rows": 1, "topic_rows": 1, "stars_rows": 1}
        assert all(math.isfinite(value) for value in found.values())

    def test_the_best_model_and_a_resumed_run(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "stars_error", "greater_is_better": False}
        run = trainer(tmp_path, **saving, **best)
        run.train()
        errors = [log["eval_stars_error"] for log in run.state.log_history if "eval_stars_error" in log]
        assert run.state.best_metric == min(errors)
        assert run.evaluate()["eval_stars_error"] == pytest.approx(run.state.best_metric)
        whole = trainer(tmp_path / "whole", **saving)
        whole.train()
        again = trainer(tmp_path / "again", **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        close(weights(again), weights(whole))
        json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())

    def test_a_checkpoint_of_other_labels_is_not_resumed(self, tmp_path):
        trainer(tmp_path, save_strategy="steps", save_steps=4).train()
        other = {**LABELS, "sentiment": ["good", "bad"]}
        config = PolyConfig(task_type="SEQ_CLS", task_labels=other, target_modules=ATTENTION, r=2)
        run = trainer(tmp_path, peft.get_peft_model(bert(), config))
        with pytest.raises(ValueError, match="task_labels of the checkpoint"):
            run.train(resume_from_checkpoint=True)


class TestTokens:
    def test_tags_are_padded_counted_and_measured(self, tmp_path):
        config = PolyConfig(task_type="TOKEN_CLS", task_labels=TAGS, target_modules=ATTENTION, r=2, router_noise=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(bert(tf.BertForTokenClassification), config)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        found = [
            {"input_ids": list(range(3, 3 + n)), "task": list(TAGS)[n % 3], "labels": [n % 2, -100, *[1] * (n - 2)]}
            for n in range(3, 9)
        ]
        seen = {}

        def measure(prediction):
            seen[prediction.task] = (prediction.predictions.shape[-1], prediction.labels.names)
            known = prediction.label_ids != -100
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[known].mean())}

        ends = []
        for size, accumulated in ((6, 1), (1, 6)):
            model.load_state_dict(start)
            args = arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, optim="sgd"
            )
            collate = DataCollatorWithTaskIds(DataCollatorForTokenClassification(tokenizer()), list(TAGS))
            run = Trainer(
                model, args, train_dataset=TorchRows(found), eval_dataset=TorchRows(found), data_collator=collate,
                compute_metrics=PerTaskMetrics(measure, list(TAGS)),
            )  # fmt: skip
            run.train()
            ends.append(weights(run))
        close(*ends)
        run.evaluate()
        assert seen == {
            "entity": (4, ("O", "PER", "LOC", "ORG")),
            "part": (2, ("N", "V")),
            "chunk": (3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        }


@pytest.mark.processes
def test_two_processes_do_together_what_one_does(tmp_path):
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, HERE / "labelled_steps.py", tmp_path],
        capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = labelled_steps.steps(tmp_path / "alone", 1)
    for rank in range(2):
        together = torch.load(tmp_path / f"rank{rank}.pt")
        for name, run in alone.items():
            assert together[name]["losses"] == pytest.approx(run["losses"], rel=1e-4)
            close(together[name]["weights"], run["weights"], atol=1e-5)
            for task, row in run["table"].items():
                assert together[name]["table"][task] == pytest.approx(row, rel=1e-3)
        whole = labelled_steps.sharded()
        assert together["sharded"]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        close(together["sharded"]["weights"], whole["weights"], atol=1e-5)
