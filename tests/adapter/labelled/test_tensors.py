"""Labels as tensors: their shapes, which places are labelled, and the checks before a loss."""

from __future__ import annotations

import pytest
import torch
from labelled import LABELS, NAMES, targets

from peft_poly.adapter.labelled.tensors import LabelTable, check_labels, label_cells, places_labelled
from peft_poly.labels import read_task_labels

TABLE = LabelTable(read_task_labels(LABELS, NAMES), 4, "cpu")
TASKS = torch.arange(4)


def check(labels, tasks=TASKS, per_row=1, columns=None):
    check_labels(label_cells(labels, labels.shape[:1], 4), tasks, TABLE, per_row, columns)


class TestCells:
    def test_a_label_per_row_is_a_first_column(self):
        assert label_cells(torch.tensor([1, 2]), torch.Size([2]), 3).tolist() == [[1, -100, -100], [2, -100, -100]]

    def test_narrower_lists_are_filled_up(self):
        assert label_cells(torch.tensor([[0, 1]]), torch.Size([1]), 3).tolist() == [[0, 1, -100]]

    def test_tokens_are_places_too(self):
        assert label_cells(torch.ones(2, 5), torch.Size([2, 5]), 3).shape == (10, 3)

    @pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 5, 4), ()])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"`labels` must have the shape \(2, 5\), or \(2, 5, 3\).*got"):
            label_cells(torch.zeros(shape), torch.Size([2, 5]), 3)


def test_a_place_with_several_labels_counts_once():
    labels = torch.tensor([[0, 1], [-100, -100], [3, -100]])
    assert places_labelled(labels, 1).tolist() == [True, False, True]
    assert int(places_labelled(labels, 2).sum()) == 3  # tokens


class TestChecks:
    def test_labels_that_tasks_have_pass(self):
        check(targets())

    @pytest.mark.parametrize("row", range(4))
    def test_an_unlabelled_row_passes(self, row):
        labels = targets()
        labels[row] = -100
        check(labels)

    @pytest.mark.parametrize(
        ("row", "cells", "message"),
        [
            (0, [2], r"Row 0 .* task 'sentiment', has the label 2\. Allowed are the classes 0 \(bad\), 1 \(good\)"),
            (0, [-1], "has the label -1"),
            (0, [0.5], "has the label 0.5"),
            (0, [float("nan")], "has the label"),
            (0, [0, 1], r"has the label \[0, 1\]"),
            (1, [4], "Row 1 .* 'topic', has the label 4"),
            (2, [float("inf")], "Row 2 .* 'stars'.*is a finite number"),
            (2, [float("nan")], "is a finite number"),
            (3, [0, 2, 0], r"Row 3 .* 'genres', has the label \[0, 2, 0\]. Allowed is a list of 3 zeros and ones"),
            (3, [0, 1, 0, 1], r"has the label \[0, 1, 0, 1\]"),
        ],
    )
    def test_a_label_outside_of_its_task_is_named_with_row_task_value_and_what_is_allowed(self, row, cells, message):
        labels = targets()
        labels[row] = torch.tensor([*cells, -100, -100, -100][:4])
        with pytest.raises(ValueError, match=message):
            check(labels)

    @pytest.mark.parametrize("columns", [1, 2])
    def test_fewer_columns_than_a_task_has_labels_are_none_of_it(self, columns):
        labels = targets()[:, :columns]
        with pytest.raises(
            ValueError, match=r"Row 3 .* 'genres', has the label .*Allowed is a list of 3 zeros and ones"
        ):
            check(labels, columns=columns)
        labels[3] = -100
        check(labels, columns=columns)

    def test_a_token_is_named_with_its_row(self):
        cells = label_cells(torch.tensor([[0, 1, 1], [0, 7, 1]]), torch.Size([2, 3]), 4)
        with pytest.raises(ValueError, match=r"Row 1, token 1, of the batch.* has the label 7"):
            check_labels(cells, torch.tensor([0, 0, 0, 1, 1, 1]), TABLE, per_row=3)
