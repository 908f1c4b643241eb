"""The collator: ids beside any collator's batch, and a clear word about the row that has no fit task."""

from __future__ import annotations

import copy
import pickle

import datasets
import numpy as np
import pytest
import torch
from rows import rows, tokenizer, with_ids
from tiny import TASKS
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from peft_poly import DataCollatorWithTaskIds
from peft_poly.training.collator import tasks_of


def row(task: object = None, **columns: object) -> dict:
    return {"input_ids": [5, 6], **({} if task is None else {"task": task}), **columns}


# -------------------------------------------------------------------------------------------------- around any collator
UNEVEN = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
CHOICES = [{"input_ids": [[5, 6], [7, 8, 9]], "label": 1}, {"input_ids": [[5], [6, 7]], "label": 0}]
COLLATORS = {
    "default": (lambda: None, [{"input_ids": [5, 6], "label": 1}, {"input_ids": [7, 8], "label": 0}]),
    "padding": (lambda: DataCollatorWithPadding(tokenizer()), [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]),
    "seq2seq": (lambda: DataCollatorForSeq2Seq(tokenizer()), UNEVEN),
    "language modelling": (lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False), [UNEVEN[0], UNEVEN[0]]),
    "token classification": (lambda: DataCollatorForTokenClassification(tokenizer()), UNEVEN),
    "multiple choice": (lambda: DataCollatorForMultipleChoice(tokenizer()), CHOICES),
}


@pytest.mark.parametrize("kind", COLLATORS)
@pytest.mark.parametrize("columns", ["task", "task_ids", "both"])
def test_the_batch_is_the_collators_own_with_the_ids_beside_it(kind, columns):
    make, plain = COLLATORS[kind]
    said = [{"task": "boolq", "task_ids": 2}, {"task": "rte", "task_ids": 0}]
    keep = {"both": ("task", "task_ids")}.get(columns, (columns,))
    batch = DataCollatorWithTaskIds(make(), TASKS)(
        [{**columns, **{key: task[key] for key in keep}} for columns, task in zip(plain, said, strict=True)]
    )
    alone = (make() or default_data_collator)([dict(columns) for columns in plain])
    assert torch.equal(batch["task_ids"], torch.tensor([2, 0]))
    assert batch["task_ids"].dtype == torch.long
    assert set(batch) == {*alone, "task_ids"}
    assert all(torch.equal(batch[key], alone[key]) for key in alone)


def test_the_rows_themselves_stay_as_they_are():
    given = [row("rte"), row("sst2")]
    before = copy.deepcopy(given)
    DataCollatorWithTaskIds(task_names=TASKS)(given)
    assert given == before


@pytest.mark.parametrize(
    "value", [1, np.int64(1), np.int32(1), torch.tensor(1), torch.tensor([1]), np.array([1]), "sst2"]
)
def test_an_id_may_be_any_integer_and_a_name(value):
    batch = DataCollatorWithTaskIds(task_names=TASKS)([row(task_ids=value), row(task_ids=2)])
    assert batch["task_ids"].tolist() == [1, 2]


def test_rows_may_be_batch_encodings_and_objects():
    class Features:
        def __init__(self) -> None:
            self.input_ids, self.task_ids = [5, 6], 2

    assert DataCollatorWithTaskIds()([Features()])["task_ids"].tolist() == [2]
    assert DataCollatorWithTaskIds()([BatchEncoding(row(task_ids=1))])["task_ids"].tolist() == [1]


def test_a_column_of_none_is_no_task():
    batch = DataCollatorWithTaskIds(task_names=TASKS)([{**row("rte"), "task_ids": None}])
    assert batch["task_ids"].tolist() == [0]


def test_it_can_be_copied_and_pickled_and_has_the_attributes_of_the_one_inside():
    inner = DataCollatorWithPadding(tokenizer())
    collate = DataCollatorWithTaskIds(inner, TASKS)
    assert collate.tokenizer is inner.tokenizer  # which a Trainer saves
    assert not hasattr(DataCollatorWithTaskIds(), "tokenizer")
    for copied in (copy.deepcopy(collate), pickle.loads(pickle.dumps(collate))):
        assert copied([row("rte")])["task_ids"].tolist() == [0]


# ------------------------------------------------------------------------------------------------------------- packing
def test_rows_of_several_tasks_cannot_be_flattened_into_one():
    collate = DataCollatorWithTaskIds(DataCollatorWithFlattening(), TASKS)
    with pytest.raises(ValueError, match=r"made 1 row\(s\) of 2 rows with different tasks.*packing or padding-free"):
        collate([row("rte"), row("sst2")])
    assert collate([row("sst2"), row("sst2")])["task_ids"].tolist() == [1]


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([row("rte"), row("bolq")], r"Row 1 of the batch has the unknown task 'bolq'\. Did you mean 'boolq'\? Known"),
        ([row("xyz")], r"Row 0 of the batch has the unknown task 'xyz'\. Known are: rte, sst2, boolq\."),
        ([row(task_ids="bolq")], r"unknown task 'bolq'\. Did you mean 'boolq'"),
        ([row(2)], r"Row 0 of the batch has the task 2, but the column `task` is for names\. Put ids into"),
        ([row(task_ids=0), row(task_ids=3)], r"Row 1 of the batch has task_ids=3\. Ids must be 0 or more and below 3"),
        ([row(task_ids=-1)], r"task_ids=-1\. Ids must be 0 or more"),
        ([row(task_ids=1.0)], r"Row 0 of the batch has task_ids=1\.0\. It must be one integer or one name"),
        ([row(task_ids=True)], r"task_ids=True\. It must be one integer"),
        ([row(task_ids=[0, 1])], r"task_ids=\[0, 1\]\. It must be one integer"),
        ([row("rte", task_ids=1)], r"Row 0 of the batch has task='rte' but task_ids=1, which is 'sst2'\. Keep one"),
        ([row("rte"), row()], r"Row 1 of the batch has neither a column `task`.* nor `task_ids`.*It has: input_ids\."),
        ([row("rte"), row(task_ids=1)], r"row 0 has `task` and row 1 has `task_ids`"),
        ([row("rte", task_ids=0), row("rte")], r"row 0 has `task_ids` and `task` and row 1 has `task`"),
    ],
)
def test_a_row_without_a_fit_task_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithTaskIds(task_names=TASKS)(given)


def test_a_name_needs_names_and_an_id_does_not():
    with pytest.raises(ValueError, match=r"has the task 'rte' by name, but this collator knows no names.*task_names="):
        DataCollatorWithTaskIds()([row("rte")])
    assert DataCollatorWithTaskIds()([row(task_ids=7)])["task_ids"].tolist() == [7]
    assert DataCollatorWithTaskIds()([row("any", task_ids=7)])["task_ids"].tolist() == [7]


@pytest.mark.parametrize("name", ["tasks", "task_name", "task_id", "Task"])
def test_a_column_under_another_name_is_suggested(name):
    match = rf"It has: input_ids, {name}\. Is it in `{name}`\? Rename that column to `task` \(names\) or `task_ids`"
    with pytest.raises(ValueError, match=match):
        DataCollatorWithTaskIds(task_names=TASKS)([row(**{name: "rte"})])
    with pytest.raises(ValueError, match=match):
        tasks_of(datasets.Dataset.from_list([row(**{name: "rte"})]))


def test_a_task_of_none_is_not_a_missing_column():
    with pytest.raises(ValueError, match=r"Row 0 of the batch has no task: None stands in `task`\. The row: input_ids"):
        DataCollatorWithTaskIds(task_names=TASKS)([{**row(), "task": None}])
    found = [row("rte", task_ids=None), row(None, task_ids=None)]
    with pytest.raises(ValueError, match=r"Row 1 of the data set has no task: None stands in `task_ids` and `task`"):
        tasks_of(datasets.Dataset.from_list([found[0], {**found[1], "task": None}]))
    assert tasks_of(datasets.Dataset.from_list(found[:1])) == ["rte"]


def test_the_message_about_a_row_shows_a_little_of_it():
    long = {"input_ids": list(range(10**5)), "note": "claim 17", "labels": torch.zeros(50, 50), "task": "xyz"}
    with pytest.raises(ValueError, match="The row: input_ids=") as caught:
        DataCollatorWithTaskIds(task_names=TASKS)([long])
    shown = str(caught.value).partition("The row: ")[2]
    assert len(shown) <= 80
    assert shown.startswith("input_ids=[0, 1, 2, 3, 4, 5, 6,..., note='claim 17', labels=tensor([[0.")
    assert "\n" not in shown


@pytest.mark.parametrize("given", [TASKS, 7, "rte"])
def test_a_collator_that_cannot_be_called_is_refused(given):
    match = r"The collator must be a function or object that makes a batch.*got .*`DataCollatorWithTaskIds\(task_names="
    with pytest.raises(TypeError, match=match):
        DataCollatorWithTaskIds(given)


def test_what_is_no_row_no_batch_or_no_list_of_names_is_refused():
    with pytest.raises(TypeError, match="row 1 is a int"):
        DataCollatorWithTaskIds()([row(task_ids=1), 7])
    with pytest.raises(TypeError, match="must return a mapping, such as a dict, got tuple"):
        DataCollatorWithTaskIds(tuple)([row(task_ids=1)])
    with pytest.raises(ValueError, match="a list of names, got the one string 'rte'"):
        DataCollatorWithTaskIds(None, "rte")
    with pytest.raises(ValueError, match="is a DataCollatorWithTaskIds already"):
        DataCollatorWithTaskIds(DataCollatorWithTaskIds())


# -------------------------------------------------------------------------------------------------- of a data set
def test_the_tasks_of_a_data_set_are_those_of_its_rows():
    for found, expected in ((rows(5), TASKS + TASKS[:2]), (with_ids(rows(5)), [0, 1, 2, 0, 1])):
        assert tasks_of(found) == expected
        assert tasks_of(datasets.Dataset.from_list(found)) == expected
    assert tasks_of([row(task_ids=torch.tensor(2))]) == [2]
    with pytest.raises(ValueError, match=r"Row 1 of the data set has neither a column `task`"):
        tasks_of([row("rte"), row()])
    with pytest.raises(
        ValueError, match=r"The data set has neither a column `task`.* nor `task_ids`.* It has: input_ids\."
    ):
        tasks_of(datasets.Dataset.from_list([row()]))
