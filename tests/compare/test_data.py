"""Tasks out of a folder: what is read, what is left out and said, what is refused with the place and the cure."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from labelled_folder import rows_of, write_rows, write_tasks

from peft_poly.compare.data import Row, batches, load_tasks


def test_labels_are_the_outputs_of_a_task_or_its_options(tmp_path):
    write_tasks(tmp_path, ("near", "count"))
    write_rows(tmp_path, rows_of("far", 4, options=["red", "blue", "green"]), "far.jsonl")
    write_rows(tmp_path, rows_of("far", 4, "test", options=["red", "blue", "green"]), "far_test.jsonl")
    tasks = load_tasks(tmp_path)
    assert tasks.labels == {
        "count": ("one", "three", "two"), "far": ("red", "blue", "green"), "near": ("blue", "red"),
    }  # fmt: skip


def test_an_instruction_stands_before_the_text(tmp_path):
    write_tasks(tmp_path, ("near",))
    write_rows(tmp_path, [*rows_of("far", instruction="which"), *rows_of("far", 1, "test")], "far.jsonl")
    tasks = load_tasks(tmp_path)
    assert all(row.text.startswith("which is ") for row in tasks.train if row.task == "far")
    assert Row("near", "is red cat cat", "red") in tasks.train


def test_labels_and_tasks_may_be_numbers(tmp_path):
    rows = [{"task": n % 2, "input": f"the {n}", "output": n // 2 % 2, "split": "train"} for n in range(16)]
    write_rows(tmp_path, [*rows, *({**row, "split": "test"} for row in rows)])
    assert load_tasks(tmp_path).labels == {"0": ("0", "1"), "1": ("0", "1")}


def test_splits_stay_as_they_are_where_every_task_has_all_three(tmp_path):
    tasks = load_tasks(write_tasks(tmp_path))
    assert [len(part) for part in (tasks.train, tasks.validation, tasks.test)] == [48, 12, 24]
    assert tasks.notes == ("12 of 24 test rows are among the training rows, with the same label.",) or tasks.notes


def test_without_validation_rows_a_fifth_of_the_training_rows_of_each_task_is_held_out(tmp_path):
    for task, number in (("near", 20), ("far", 2)):
        write_rows(tmp_path, [*rows_of(task, number), *rows_of(task, 3, "test")], f"{task}.jsonl")
    tasks = load_tasks(tmp_path)
    assert Counter(row.task for row in tasks.validation) == {"near": 4, "far": 1}
    assert Counter(row.task for row in tasks.train) == {"near": 16, "far": 1}
    assert load_tasks(tmp_path) == tasks
    assert any("a fifth of the training rows is held out" in note for note in tasks.notes)


def test_a_multiple_choice_and_free_answers_are_left_out_and_named(tmp_path):
    write_tasks(tmp_path, ("near", "far"))
    choice = [{**row, "options": [row["output"], f"other {n}"]} for n, row in enumerate(rows_of("count", 6))]
    free = [{"task": "free", "input": "the", "output": f"answer {n}", "split": "train"} for n in range(6)]
    write_rows(tmp_path, choice + free, "others.jsonl")
    tasks = load_tasks(tmp_path)
    assert tasks.names == ["far", "near"]
    assert "Task 'count' is left out: its rows have options of their own" in tasks.notes[0]
    assert "Task 'free' is left out: its rows have no options, and 6 different outputs" in tasks.notes[1]


def test_test_rows_that_were_trained_on_are_counted(tmp_path):
    write_rows(tmp_path, [*rows_of("near"), *rows_of("near", 3, "test"), *rows_of("far")])
    write_rows(tmp_path, [{"task": "far", "input": "new", "output": "red", "split": "test"}], "far.jsonl")
    assert any(note.startswith("3 of 4 test rows are among the training rows") for note in load_tasks(tmp_path).notes)


def test_test_rows_with_labels_that_nobody_learns_are_named(tmp_path):
    write_tasks(tmp_path)
    strange = [{"task": "far", "input": f"new {n}", "output": "blu", "split": "test"} for n in range(2)]
    write_rows(tmp_path, strange, "strange.jsonl")
    found = [note for note in load_tasks(tmp_path).notes if "can learn them" in note]
    assert found == [
        "Task 'far' has 2 test row(s) with labels that none of the rows it is trained on has ('blu'): no method can "
        "learn them."
    ]


def test_a_label_that_another_task_learns_can_be_answered_by_a_head_for_all(tmp_path):
    write_tasks(tmp_path)
    write_rows(tmp_path, [{"task": "far", "input": "two cats", "output": "two", "split": "test"}], "strange.jsonl")
    (found,) = (note for note in load_tasks(tmp_path).notes if "can learn them" in note)
    assert found.endswith("has ('two'): only a head that all tasks share can learn them.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl, line 2: this is no JSON"),
        ("[1]", r"line 2: a row is an object with task, input, output, split"),
        ({"task": "near", "split": "train"}, "line 2: the row lacks input, output. A row has task, input, output"),
        ({**rows_of("near")[0], "output": None}, "line 2: the row lacks output"),
        ({**rows_of("near")[0], "split": "dev"}, "`split` must be one of train, validation, test, got 'dev'"),
        ({**rows_of("near")[0], "options": ["a"]}, r"the output 'red' is not one of the options \['a'\]"),
        ({**rows_of("near")[0], "options": ["red", "red"]}, "an option occurs twice"),
        ({**rows_of("near")[0], "options": "red"}, "`options` must be a list of labels, got 'red'"),
    ],
    ids=["no JSON", "no object", "keys", "null", "split", "not an option", "twice", "no list"],
)
def test_a_row_that_cannot_be_used_is_named_with_its_place(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(write_rows(tmp_path, [rows_of("near")[0], line]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*rows_of("near"), *rows_of("near", 2, "test")], r"has 1 task\(s\) to compare on, near"),
        (
            [*rows_of("near"), *({**row, "output": "x"} for row in rows_of("far"))],
            "Task 'far' has one label only, 'x': there is nothing to learn",
        ),
        (
            [*rows_of("near"), *rows_of("far", 1), *rows_of("far", 3, "test"), *rows_of("near", 1, "test")],
            r"needs 2 training rows or more; too few have: 'far' \(1\)",
        ),
        ([*rows_of("near"), *rows_of("far"), *rows_of("far", 1, "test")], "no test row .*: 'near'"),
    ],
    ids=["one task", "one label", "too few", "no test row"],
)
def test_tasks_that_nothing_can_be_learnt_or_tested_on_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(write_rows(tmp_path, rows))


def test_a_folder_without_rows_is_refused_with_an_example(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*\.jsonl file. Pass a folder .*\"output\": \"shipping\""):
        load_tasks(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        load_tasks(tmp_path / "absent")


def test_a_text_may_hold_what_unicode_calls_the_end_of_a_line_and_a_file_a_byte_order_mark(tmp_path):
    write_tasks(tmp_path, ("near", "far"))
    line = '{"task": "near", "input": "is\u2028red\x85", "output": "red", "split": "train"}\r\n'
    (tmp_path / "more.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert Row("near", "is\u2028red\x85", "red") in load_tasks(tmp_path).train


def test_batches_have_each_row_once_a_pass_and_are_the_same_for_one_seed(tmp_path):
    rows = load_tasks(write_tasks(tmp_path)).train
    found = [row for batch in itertools.islice(batches(rows, 10, 3), 24) for row in batch]
    assert Counter(found[: 5 * len(rows)]) == Counter(5 * rows)
    assert found == [row for batch in itertools.islice(batches(rows, 10, 3), 24) for row in batch]
    assert next(batches(rows, 48, 4)) != next(batches(rows, 48, 3))
