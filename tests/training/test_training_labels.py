"""Labels of rows of different kinds in one batch, and those that are none of their task's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from labelled import LABELS, NAMES
from rows import tokenizer
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from peft_poly import DataCollatorWithTaskIds
from peft_poly.labels import read_task_labels
from peft_poly.training.labels import label_tensor, plain_label_tensor

READ = read_task_labels(LABELS, NAMES)


def row(task, label, **columns):
    return {"input_ids": [3, 4], "task": task, "labels": label, **columns}


class TestDescribed:
    def test_classes_lists_numbers_and_names_go_into_one_tensor(self):
        found = label_tensor([1, "LABEL_3", 2.5, [0, 1, 1], "bad", ["war"], 4, None], [0, 1, 2, 3, 0, 3, 2, 1], READ)
        assert found.dtype == torch.float
        assert found.shape == (8, 4)
        assert found[:, :3].tolist() == [
            [1, -100, -100], [3, -100, -100], [2.5, -100, -100], [0, 1, 1],
            [0, -100, -100], [0, 1, 0], [4, -100, -100], [-100, -100, -100],
        ]  # fmt: skip

    def test_every_batch_has_the_shape_and_type_of_the_adapter_not_its_own(self):
        for value, task in ((0, 0), (1.5, 2), ([1, 1, 0], 3)):
            found = label_tensor([value], [task], READ)
            assert (found.shape, found.dtype) == ((1, 4), torch.float)

    def test_classes_alone_are_whole_numbers_in_one_dimension(self):
        found = label_tensor([1, "b"], [0, 1], read_task_labels({"x": 2, "y": ["a", "b"]}, ["x", "y"]))
        assert torch.equal(found, torch.tensor([1, 1]))

    def test_a_list_of_one_is_its_label_as_columns_of_lists_have_it(self):
        assert label_tensor([[1], [2.5]], [0, 2], READ)[:, 0].tolist() == [1, 2.5]

    def test_an_empty_list_of_names_is_none_of_them(self):
        assert label_tensor([[], ["love"]], [3, 3], READ)[:, :3].tolist() == [[0, 0, 0], [0, 0, 1]]
        with pytest.raises(ValueError, match=r"has the label \[\]. It must be a class"):
            label_tensor([[]], [0], READ)

    @pytest.mark.parametrize("left", [False, True])
    def test_tokens_are_filled_up_where_the_text_is(self, left):
        labels = read_task_labels({"tag": ["O", "X"], "size": 1}, ["tag", "size"])
        found = label_tensor([["O", -100, 1], [0.5]], [0, 1], labels, length=4, left=left)
        want = [[-100, 0, -100, 1], [-100, -100, -100, 0.5]] if left else [[0, -100, 1, -100], [0.5, -100, -100, -100]]
        assert found.tolist() == want

    @pytest.mark.parametrize(
        ("value", "task", "message"),
        [
            (2, 0, r"Row 0 .*'sentiment', has the label 2. Allowed are the classes 0 \(bad\), 1 \(good\)"),
            (0.5, 0, "has the label 0.5"),
            ("goood", 0, "Row 0 .*unknown label 'goood'. Did you mean 'good'\\? Known are: bad, good"),
            ([0, 1], 0, r"has the label \[0, 1\]. It must be a class"),
            ("four", 2, "'stars', has the label 'four', but the task predicts a number"),
            (True, 2, "has the label True, but the task predicts a number"),
            (float("nan"), 2, "Allowed is a finite number"),
            (1, 3, "has the label 1. It must be a list of 3 zeros and ones, one for each of drama, war, love"),
            ([1, 0], 3, r"has the label \[1, 0\]. It must be a list of 3"),
            ([1, 0, 2], 3, r"has the label \[1, 0, 2\]. Allowed is a list of 3 zeros and ones"),
            (["war", "peace"], 3, "unknown label 'peace'"),
        ],
    )
    def test_a_label_outside_of_its_task_is_refused(self, value, task, message):
        with pytest.raises(ValueError, match=message):
            label_tensor([value], [task], READ)

    def test_more_labels_than_tokens_are_refused(self):
        with pytest.raises(ValueError, match="a label for each of its tokens, 2 at most, got 3"):
            label_tensor([[0, 1, 1]], [0], READ, length=2)


class TestPlain:
    @pytest.mark.parametrize(
        ("values", "want", "dtype"),
        [
            ([1, 2], [1, 2], torch.long),
            ([1, 2.5], [1, 2.5], torch.float),
            ([[0, 1], [1, 1]], [[0, 1], [1, 1]], torch.long),
            ([[0, 1, 1], 2, 0.5], [[0, 1, 1], [2, -100, -100], [0.5, -100, -100]], torch.float),
        ],
    )
    def test_numbers_and_lists_need_no_description(self, values, want, dtype):
        found = plain_label_tensor(values)
        assert found.tolist() == want
        assert found.dtype == dtype

    def test_what_is_neither_is_left_to_the_collator(self):
        assert plain_label_tensor([[[1, 2]]]) is None


class TestCollator:
    def test_a_class_beside_a_number_keeps_the_number(self):
        collate = DataCollatorWithTaskIds(task_names=NAMES)
        assert collate([row("topic", 1), row("stars", 2.5)])["labels"].tolist() == [1, 2.5]

    @pytest.mark.parametrize("column", ["labels", "label"])
    @pytest.mark.parametrize("described", [True, False])
    def test_lists_and_numbers_in_one_batch(self, described, column):
        pad = DataCollatorWithPadding(tokenizer())
        collate = DataCollatorWithTaskIds(pad, NAMES, LABELS if described else None)
        found = [row("genres", np.array([0, 1, 1])), row("stars", 2), row("topic", torch.tensor(3))]
        found = [{column if key == "labels" else key: value for key, value in one.items()} for one in found]
        batch = collate(found)
        assert batch["labels"][:, :3].tolist() == [[0, 1, 1], [2, -100, -100], [3, -100, -100]]
        assert set(batch) == {"input_ids", "attention_mask", "labels", "task_ids"}

    def test_numbers_of_tokens_are_not_truncated(self):
        pad = DataCollatorForTokenClassification(tokenizer())
        collate = DataCollatorWithTaskIds(pad, task_labels={"tag": 2, "size": 1})
        batch = collate([row("tag", [0, 1]), row("size", [0.5], input_ids=[3])])
        assert batch["labels"].tolist() == [[0, 1], [0.5, -100]]

    def test_labels_of_no_task_are_refused(self):
        with pytest.raises(ValueError, match="which is no task"):
            DataCollatorWithTaskIds(task_names=["a"], task_labels={"a": 2, "b": 3})

    @pytest.mark.parametrize("label", ["good", ["war"]])
    def test_names_of_labels_that_nobody_described_are_refused(self, label):
        with pytest.raises(ValueError, match=r"Row 0 .*by name, but this collator knows no labels.*task_labels="):
            DataCollatorWithTaskIds(task_names=NAMES)([row("sentiment", label)])
