"""What may be passed as task ids: every accepted form gives the same LongTensor, every other one is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TASKS

from peft_poly import PolyConfig
from peft_poly.tasks.ids import no_task_message, resolve_task, resolve_tasks, rows_of_call

NAMED = PolyConfig(task_names=TASKS)
NUMBERED = PolyConfig(n_tasks=3)

MIXED_BATCHES = {
    "int64 tensor": torch.tensor([2, 0, 1]),
    "column": torch.tensor([[2], [0], [1]]),
    "int32 tensor": torch.tensor([2, 0, 1], dtype=torch.int32),
    "int16 tensor": torch.tensor([2, 0, 1], dtype=torch.int16),
    "int8 tensor": torch.tensor([2, 0, 1], dtype=torch.int8),
    "uint8 tensor": torch.tensor([2, 0, 1], dtype=torch.uint8),
    "int32 column": torch.tensor([[2], [0], [1]], dtype=torch.int32),
    "strided tensor": torch.tensor([2, 9, 0, 9, 1, 9])[::2],
    "list": [2, 0, 1],
    "tuple": (2, 0, 1),
    "range-like list of numpy ints": [np.int64(2), np.int32(0), np.uint8(1)],
    "list of 0-dim tensors": [torch.tensor(2), torch.tensor(0), torch.tensor(1)],
    "numpy int64": np.array([2, 0, 1]),
    "numpy int32": np.array([2, 0, 1], dtype=np.int32),
    "numpy uint8": np.array([2, 0, 1], dtype=np.uint8),
    "numpy column": np.array([[2], [0], [1]]),
    "list of lists": [[2], [0], [1]],
}
NAMED_BATCHES = {
    "names": ["boolq", "rte", "sst2"],
    "tuple of names": ("boolq", "rte", "sst2"),
    "names and ints": ["boolq", 0, "sst2"],
    "numpy strings in a list": list(np.array(["boolq", "rte", "sst2"])),
    "numpy strings": np.array(["boolq", "rte", "sst2"]),
    "numpy objects": np.array(["boolq", 0, "sst2"], dtype=object),
}
ONE_FOR_ALL = {
    "int": 2,
    "numpy int": np.int64(2),
    "0-dim tensor": torch.tensor(2),
    "0-dim int32 tensor": torch.tensor(2, dtype=torch.int32),
    "0-dim numpy array": np.array(2),
    "name": "boolq",
    "numpy string": np.str_("boolq"),
}


def table(forms: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("given", forms.values(), ids=forms.keys())


@table(MIXED_BATCHES | NAMED_BATCHES)
def test_a_mixed_batch_in_any_form_gives_the_same_long_tensor(given):
    ids, uniform = resolve_tasks(given, NAMED, n_rows=3)
    assert ids.dtype == torch.long
    assert ids.tolist() == [2, 0, 1]
    assert uniform is False


@table(MIXED_BATCHES)
def test_numbers_need_no_names(given):
    assert resolve_tasks(given, NUMBERED, n_rows=3)[0].tolist() == [2, 0, 1]


@table(ONE_FOR_ALL)
@pytest.mark.parametrize("n_rows", [None, 1, 7])
def test_one_id_or_name_serves_any_number_of_rows(given, n_rows):
    ids, uniform = resolve_tasks(given, NAMED, n_rows=n_rows)
    assert ids.tolist() == [2]
    assert ids.dtype == torch.long
    assert uniform is True


@pytest.mark.parametrize("given", [[1, 1, 1], ["sst2"] * 3, torch.tensor([1, 1, 1]), ["sst2", 1, 1]])
def test_equal_ids_are_known_to_be_uniform(given):
    ids, uniform = resolve_tasks(given, NAMED, n_rows=3)
    assert (ids.tolist(), uniform) == ([1], True)


def test_the_callers_tensor_is_left_as_it_was():
    given = torch.tensor([[2], [0]], dtype=torch.int32)
    resolve_tasks(given, NAMED, n_rows=2)
    assert given.dtype == torch.int32
    assert given.tolist() == [[2], [0]]


RANGE = r"Task ids of adapter 'default' must lie in \[0, 2\], got {}\. It has 3 tasks: rte, sst2, boolq\."


@pytest.mark.parametrize("bad", [-1, 3, 1_000_000, 2**70, -(2**70)])
@pytest.mark.parametrize("wrap", [lambda i: i, lambda i: [0, i, 1]], ids=["alone", "in a list"])
def test_an_id_out_of_range_is_refused(bad, wrap):
    with pytest.raises(ValueError, match=RANGE.format(bad)):
        resolve_tasks(wrap(bad), NAMED)


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda i: torch.tensor([0, i]),
        lambda i: torch.tensor([[0], [i]], dtype=torch.int32),
        lambda i: torch.tensor(i),
        lambda i: np.array([i, 1]),
        lambda i: ("rte", i),
    ],
)
def test_an_id_out_of_range_is_refused_in_every_form(bad, make):
    with pytest.raises(ValueError, match=RANGE.format(bad)):
        resolve_tasks(make(bad), NAMED)


def test_the_range_error_of_an_adapter_without_names_says_its_size():
    match = r"adapter 'other' must lie in \[0, 0\], got 1\. It has 1 task\."
    with pytest.raises(ValueError, match=match):
        resolve_tasks(1, PolyConfig(), "other")


NOT_INTEGERS = {
    "float tensor": (torch.tensor([0.0, 1.0]), r"a tensor of dtype torch\.float32"),
    "bool tensor": (torch.tensor([True, False]), r"a tensor of dtype torch\.bool"),
    "complex tensor": (torch.tensor([1j, 0]), r"a tensor of dtype torch\.complex64"),
    "0-dim float tensor": (torch.tensor(1.0), r"a tensor of dtype torch\.float32"),
    "float array": (np.array([0.0, 1.0]), r"a tensor of dtype torch\.float64"),
    "bool array": (np.array([True, False]), r"a tensor of dtype torch\.bool"),
    "float": (1.0, r"1\.0"),
    "bool": (True, r"True"),
    "list with a float": ([0, 1.0], r"1\.0 in \[0, 1\.0\]"),
    "list with a bool": ([0, True], r"True in \[0, True\]"),
    "names with a float": (["rte", 1.0], r"1\.0"),
    "list with None": ([0, None], r"None in \[0, None\]"),
    "only None": ([None], r"None in \[None\]"),
    "names with None": (["rte", None], r"None"),
    "list with bytes": ([b"rte"], r"b'rte'"),
    "list with a float tensor": ([torch.tensor(0.5)], r"a tensor of dtype torch\.float32"),
}


@pytest.mark.parametrize(("given", "said"), NOT_INTEGERS.values(), ids=NOT_INTEGERS.keys())
def test_what_is_no_integer_is_refused(given, said):
    with pytest.raises(ValueError, match=f"task_ids must be integers or task names, got {said}"):
        resolve_tasks(given, NAMED)


@pytest.mark.parametrize(
    "given", [{"rte"}, {"rte": 0}, object(), b"rte", lambda: 0], ids=["set", "dict", "object", "bytes", "function"]
)
def test_what_is_no_batch_at_all_is_refused(given):
    match = "task_ids must be a tensor, a list of ids or names, one id or one name, got " + type(given).__name__
    with pytest.raises(ValueError, match=match):
        resolve_tasks(given, NAMED)


SHAPES = {
    "two columns": torch.zeros(3, 2, dtype=torch.long),
    "a row": torch.zeros(1, 3, dtype=torch.long),
    "three dimensions": torch.zeros(3, 1, 1, dtype=torch.long),
    "empty tensor": torch.zeros(0, dtype=torch.long),
    "empty column": torch.zeros(0, 1, dtype=torch.long),
    "empty list": [],
    "empty array": np.array([], dtype=np.int64),
    "nested list": [[0, 1], [1, 0]],
}


@table(SHAPES)
def test_a_wrong_shape_is_refused(given):
    with pytest.raises(ValueError, match=r"task_ids must have the shape \(batch,\) or \(batch, 1\), got \("):
        resolve_tasks(given, NAMED)


def test_a_ragged_list_is_refused():
    with pytest.raises(ValueError, match="task_ids must be a tensor, a list of ids or names"):
        resolve_tasks([[0], [1, 2]], NAMED)


@pytest.mark.parametrize("given", [[0, 1], torch.tensor([[0], [1]]), ["rte", "sst2"], [1, 1], [1]])
def test_a_wrong_number_of_ids_is_refused(given):
    match = f"task_ids has {len(given)} entries but the batch has 3 rows. Pass one id per row, or one id or name"
    with pytest.raises(ValueError, match=match):
        resolve_tasks(given, NAMED, n_rows=3)


@pytest.mark.parametrize("wrap", [lambda name: name, lambda name: ["rte", name], lambda name: [0, name]])
def test_an_unknown_name_is_refused_with_the_nearest_one(wrap):
    match = r"Unknown task 'sst'\. Did you mean 'sst2'\? Adapter 'default' knows: rte, sst2, boolq\."
    with pytest.raises(ValueError, match=match):
        resolve_tasks(wrap("sst"), NAMED)


def test_a_number_written_with_fewer_zeros_is_the_nearest_and_many_names_are_not_all_listed():
    tenants = PolyConfig(task_names=[f"Cust-{n:02}" for n in range(50)])
    with pytest.raises(ValueError, match=r"Did you mean 'Cust-03'\? .* Cust-29, and 20 more\.$"):
        resolve_tasks("cust-3", tenants)
    with pytest.raises(ValueError, match=r"Did you mean 'Cust-30'\?"):
        resolve_tasks("cust-030", tenants)


@pytest.mark.parametrize("name", ["", "translation", "0"])
def test_a_name_like_none_of_them_gets_no_suggestion(name):
    with pytest.raises(ValueError, match=f"Unknown task '{name}'. Adapter 'default' knows: rte, sst2, boolq"):
        resolve_tasks(name, NAMED)


@pytest.mark.parametrize("given", ["rte", ["rte", "rte"], [0, "rte"]])
def test_a_name_is_refused_where_the_tasks_have_none(given):
    match = (
        r"Task 'rte' was given by name, but adapter 'default' has no names for its 3 task\(s\)\. Pass an id in \[0, 2\]"
    )
    with pytest.raises(ValueError, match=match):
        resolve_tasks(given, NUMBERED)


def test_one_task_can_be_resolved_by_itself():
    assert resolve_task("sst2", NAMED) == 1
    assert resolve_task(2, NUMBERED) == 2
    with pytest.raises(ValueError, match="got 3"):
        resolve_task(3, NUMBERED)
    with pytest.raises(ValueError, match=r"Unknown task 'stt2'\. Did you mean 'sst2'"):
        resolve_task("stt2", NAMED)


ROWS = {
    "input_ids": ((), {"input_ids": torch.zeros(4, 5, dtype=torch.long)}, (4, "input_ids")),
    "positional": ((torch.zeros(4, 5, dtype=torch.long),), {}, (4, 0)),
    "generate's inputs": ((), {"inputs": torch.zeros(4, 5, dtype=torch.long)}, (4, "inputs")),
    "embeddings": ((), {"inputs_embeds": torch.zeros(4, 5, 8)}, (4, "inputs_embeds")),
    "audio": ((), {"input_values": torch.zeros(4, 100)}, (4, "input_values")),
    "images": ((), {"pixel_values": torch.zeros(4, 3, 8, 8)}, (4, "pixel_values")),
    "text before images": (
        (),
        {"pixel_values": torch.zeros(6, 3, 8, 8), "input_ids": torch.zeros(2, 5).long()},
        (2, "input_ids"),
    ),
    "choices": ((), {"input_ids": torch.zeros(4, 3, 5, dtype=torch.long)}, (4, "input_ids")),
    "features of a custom model": ((torch.zeros(4, 3, 5),), {}, (4, 0)),
    "one row without batch axis": ((torch.zeros(5),), {}, (None, None)),
    "nothing that tells": ((), {"labels": torch.zeros(4)}, (None, None)),
    "no tensor": (("text",), {"input_ids": [[1, 2]]}, (None, None)),
}


@pytest.mark.parametrize(("args", "kwargs", "expected"), ROWS.values(), ids=ROWS.keys())
def test_the_rows_of_a_call_are_counted(args, kwargs, expected):
    assert rows_of_call(args, kwargs) == expected


def test_the_message_about_no_task_says_how_rows_of_a_trainer_bring_theirs():
    message = no_task_message(NAMED, "default")
    assert "adapter 'default' has 3 of them (rte, sst2, boolq). Pass `task_ids=`" in message
    assert message.endswith("In a Trainer, the rows' `task` reaches the model through `DataCollatorWithTaskIds`.")
