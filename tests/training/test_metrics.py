"""Metrics by task: each row counts for its own task, whatever shape the predictions have."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TASKS
from transformers import EvalPrediction

from peft_poly import PerTaskMetrics

IDS = np.array([0, 2, 0, 2, 2])
LABELS = np.array([1, 1, 0, 0, 1])
HITS = np.array([1, 0, 0, 0, 1])  # predicted


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def test_each_task_is_measured_on_its_own_rows_and_the_whole_on_all():
    metrics = PerTaskMetrics(accuracy, TASKS)
    found = metrics(EvalPrediction(HITS, LABELS), task_ids=IDS)
    by_hand = {
        "accuracy": 4 / 5,
        "rte_accuracy": 2 / 2,
        "boolq_accuracy": 2 / 3,  # no row of sst2: no figure for it
    }
    assert found == pytest.approx(by_hand)
    assert metrics.table == {"rte": {"accuracy": 1.0}, "boolq": {"accuracy": pytest.approx(2 / 3)}}


def test_the_table_is_printed_with_the_mean_over_tasks():
    metrics = PerTaskMetrics(accuracy, TASKS)
    metrics(EvalPrediction(HITS, LABELS), task_ids=IDS)
    assert str(metrics).splitlines() == [
        "task   accuracy",
        "rte           1",
        "boolq    0.6667",
        "mean     0.8333",
    ]


def test_tasks_without_names_are_called_by_their_ids():
    assert "2_accuracy" in PerTaskMetrics(accuracy)(EvalPrediction(HITS, LABELS), task_ids=IDS)


def test_all_that_a_trainer_hands_over_is_cut_into_rows():
    seen = []
    rows = np.arange(5)
    prediction = EvalPrediction(
        predictions=(rows, {"hidden": rows[:, None] * 10}, (rows * 2, None)),
        label_ids=(rows * 3, rows * 4),
        inputs=rows * 5,
        losses=rows * 6,
    )
    PerTaskMetrics(lambda p: seen.append(p) or {})(prediction, task_ids=IDS)
    for part, index in zip(seen[1:], ([0, 2], [1, 3, 4]), strict=True):
        first, hidden, (double, nothing) = part.predictions
        assert first.tolist() == index
        assert hidden["hidden"].ravel().tolist() == [10 * i for i in index]
        assert double.tolist() == [2 * i for i in index]
        assert nothing is None
        assert [labels.tolist() for labels in part.label_ids] == [[3 * i for i in index], [4 * i for i in index]]
        assert part.inputs.tolist() == [5 * i for i in index]
        assert part.losses.tolist() == [6 * i for i in index]


def test_ids_among_the_labels_serve_where_no_trainer_passes_them():
    both = EvalPrediction(HITS, (LABELS, IDS))  # TrainingArguments(label_names=["labels", "task_ids"])
    assert PerTaskMetrics(accuracy, TASKS)(both) == PerTaskMetrics(accuracy, TASKS)(
        EvalPrediction(HITS, LABELS), task_ids=IDS
    )
    seen = []
    PerTaskMetrics(lambda p: seen.append(p.label_ids) or {})(EvalPrediction(HITS, (LABELS, LABELS * 2, IDS)))
    assert len(seen[0]) == 2


@pytest.mark.parametrize("labels", [LABELS, (LABELS, np.zeros((5, 3)))])
def test_without_ids_it_says_where_they_come_from(labels):
    with pytest.raises(ValueError, match=r'no task ids.*label_names=\["labels", "task_ids"\]'):
        PerTaskMetrics(accuracy, TASKS)(EvalPrediction(HITS, labels))


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="There are 4 task ids for 5 predictions"):
        PerTaskMetrics(accuracy, TASKS)(EvalPrediction(HITS, LABELS), task_ids=IDS[:4])
    with pytest.raises(ValueError, match="Task id 2 has no name: there are 2 task_names"):
        PerTaskMetrics(accuracy, TASKS[:2])(EvalPrediction(HITS, LABELS), task_ids=IDS)


def test_two_metrics_of_one_name_are_refused():
    names = {"f1": 1.0, "rte_f1": 1.0}
    with pytest.raises(ValueError, match="'rte_f1' of all rows has the name of 'f1' of the task 'rte'"):
        PerTaskMetrics(lambda p: names, TASKS)(EvalPrediction(HITS, LABELS), task_ids=IDS)


def test_settings_that_tear_the_rows_apart_are_refused():
    metrics = PerTaskMetrics(accuracy)
    metrics.check_arguments(SimpleNamespace(eval_do_concat_batches=True))
    with pytest.raises(ValueError, match="Set `eval_do_concat_batches=True`"):
        metrics.check_arguments(SimpleNamespace(eval_do_concat_batches=False))


def test_a_function_that_returns_no_metrics_by_name_is_refused():
    metrics = PerTaskMetrics(lambda p: 0.5, TASKS)
    with pytest.raises(
        TypeError, match=r"must return metrics by name, such as \{'accuracy': 0\.5\}, got 0\.5, a float"
    ):
        metrics(EvalPrediction(HITS, LABELS), task_ids=IDS)


def test_what_is_no_function_and_no_list_of_names_is_refused():
    with pytest.raises(TypeError, match="compute_metrics must be a function of an EvalPrediction, got 'accuracy'"):
        PerTaskMetrics("accuracy", TASKS)
    with pytest.raises(ValueError, match="task_names must be a list of names, got the one string 'rte'"):
        PerTaskMetrics(accuracy, "rte")
