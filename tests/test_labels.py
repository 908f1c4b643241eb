"""Labels of a task: what may be given, how it is read, and what is refused."""

from __future__ import annotations

import pytest

from peft_poly.labels import TaskLabels, read_labels, read_task_labels


class TestReading:
    @pytest.mark.parametrize(
        ("given", "kind", "names"),
        [
            (["bad", "good"], "single_label", ("bad", "good")),
            (("bad", "good"), "single_label", ("bad", "good")),
            (3, "single_label", ("LABEL_0", "LABEL_1", "LABEL_2")),
            (1, "regression", ("LABEL_0",)),
            ({"labels": 1}, "regression", ("LABEL_0",)),
            ({"labels": ["a", "b"]}, "single_label", ("a", "b")),
            ({"labels": ["a", "b"], "kind": "multi_label"}, "multi_label", ("a", "b")),
            ({"labels": 2, "kind": "multi_label"}, "multi_label", ("LABEL_0", "LABEL_1")),
            ({"labels": ["spam"], "kind": "multi_label"}, "multi_label", ("spam",)),
            ({"labels": 1, "kind": "multi_label"}, "multi_label", ("LABEL_0",)),
        ],
    )
    def test_lists_numbers_and_dicts_are_read(self, given, kind, names):
        assert read_labels("task", given) == TaskLabels(kind, names)

    def test_weights_belong_to_labels(self):
        assert read_labels("task", {"labels": ["a", "b"], "weights": [1, 2.5]}).weights == (1.0, 2.5)

    def test_the_order_is_that_of_the_tasks(self):
        assert list(read_task_labels({"b": 2, "a": 1}, ["a", "b"])) == ["a", "b"]

    def test_a_config_of_transformers_can_say_them(self):
        assert read_labels("stars", 1).config == {
            "num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression",
        }  # fmt: skip


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (0, "must be a list of names, a number of labels"),
            (-1, "must be a list of names, a number of labels"),
            (True, "must be a list of names, a number of labels"),
            (2.0, "must be a list of names, a number of labels"),
            ("good", "must be a list of names, a number of labels"),
            ([], "must be a list of names, a number of labels"),
            (None, "must be a list of names, a number of labels"),
            (["a", "a"], r"\['a'\] occur more than once"),
            (["a", 1], "must be names, got 1"),
            (["a", " "], "must be names, got ' '"),
            (["a"], "has the one label 'a', of which there is nothing to choose"),
            ({"kind": "multi_label"}, "lacks the key 'labels'"),
            ({"labels": 2, "loss": "bce"}, "has the key 'loss'.*may be labels, kind, weights"),
            ({"labels": 2, "kind": "multi"}, "kind 'multi'. It must be one of single_label, multi_label, regression"),
            ({"labels": ["one"], "kind": "regression"}, "predicts a number, so its labels have no names"),
            ({"labels": 3, "kind": "regression"}, "predicts a number"),
            ({"labels": 1, "weights": 0.1}, "must be 1 positive numbers"),
            ({"labels": 2, "weights": [1]}, "must be 2 positive numbers"),
            ({"labels": 2, "weights": [1, 0]}, "must be 2 positive numbers"),
            ({"labels": 2, "weights": "ab"}, "must be 2 positive numbers"),
        ],
    )
    def test_what_is_none_of_these_is_refused_with_the_task(self, given, message):
        with pytest.raises(ValueError, match=message) as error:
            read_labels("tone", given)
        assert "'tone'" in str(error.value)

    @pytest.mark.parametrize("given", [{}, [2, 3], 4, "sentiment"])
    def test_labels_of_tasks_are_a_dict(self, given):
        with pytest.raises(ValueError, match=r"`task_labels` must be a dict"):
            read_task_labels(given, ["tone"])

    def test_a_task_without_labels_is_named(self):
        with pytest.raises(ValueError, match=r"The task 'topic' has no labels.*There are labels for: tone"):
            read_task_labels({"tone": 2}, ["tone", "topic"])

    def test_labels_of_no_task_are_named(self):
        with pytest.raises(ValueError, match=r"'tine', which is no task. Known are: tone"):
            read_task_labels({"tone": 2, "tine": 2}, ["tone"])
