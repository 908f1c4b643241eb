"""`unknown_task="mean"`: a name that the adapter does not have is answered by the mean row, in eval mode alone.

The reference is a copy of the model to which the name was added with `add_tasks(init="mean")`.
"""

from __future__ import annotations

import copy

import adapters
import numpy as np
import peft
import pytest
import torch
from tiny import CASES, MLP, TASKS, first

import peft_poly

STRANGER = "somebody new"
UNKNOWN = "Unknown task 'somebody new'"


SIZES = {"poly": {"n_skills": 3, "n_splits": 2}, "gates": {}}


def adapted(case: str, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    sizes = SIZES[settings.get("poly_type", "poly")]
    settings = {"task_names": TASKS, "r": 2, **sizes, "unknown_task": "mean", **settings}
    return adapters.adapt(CASES[case].make(), adapters.poly(case, **settings))


def grown(model: peft.PeftModel) -> peft.PeftModel:
    other = copy.deepcopy(model)
    other.add_tasks([STRANGER], init="mean")
    return other


def rows(case: str) -> dict[str, torch.Tensor]:
    return CASES[case].inputs(rows=4)


MIXTURES = [
    STRANGER,
    [STRANGER] * 4,
    ["rte", STRANGER, "boolq", STRANGER],
    [0, STRANGER, 2, 1],
    [np.int64(1), STRANGER, 2, "rte"],
    np.array(["rte", STRANGER, "boolq", "sst2"]),
]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("kind", "granularity"), [("poly", "layer"), ("poly", "block"), ("gates", "layer")])
@pytest.mark.parametrize("tasks", MIXTURES, ids=lambda tasks: type(tasks).__name__)
def test_a_stranger_gets_the_mean_row_beside_tasks_that_are_known(case, kind, granularity, tasks):
    model = adapted(case, poly_type=kind, router_granularity=granularity)
    inputs = rows(case)
    ids = [TASKS.index(t) if t in TASKS else 3 if isinstance(t, str) else int(t) for t in np.atleast_1d(
        np.array(tasks, dtype=object))]  # fmt: skip
    with torch.no_grad():
        expected = first(grown(model)(**inputs, task_ids=ids[0] if len(ids) == 1 else ids))
        torch.testing.assert_close(first(model(**inputs, task_ids=tasks)), expected)
    torch.testing.assert_close(first(model(**inputs, task_ids=tasks)), expected)  # with gradients


@pytest.mark.parametrize("case", ["llama", "t5"])
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": False}])
def test_generation_keeps_the_mean_row(case, how):
    model = adapted(case)
    inputs = {key: value for key, value in rows(case).items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 4, "num_beams": 1, **how}
    tasks = ["rte", STRANGER, "boolq", STRANGER]
    expected = grown(model).generate(**inputs, task_ids=tasks, **settings)
    assert torch.equal(model.generate(**inputs, task_ids=tasks, **settings), expected)


@pytest.mark.parametrize("door", ["use_task", "set_task", "injected"])
def test_other_doors_let_it_in_too(door):
    model, inputs = adapted("mlp"), rows("mlp")
    with torch.no_grad():
        expected = grown(model)(**inputs, task_ids=STRANGER)
        if door == "set_task":
            model.set_task(STRANGER)
            found = model(**inputs)
        else:
            called = model.base_model.model if door == "injected" else model
            with peft_poly.use_task(called, STRANGER):
                found = called(**inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("door", ["task_ids", "use_task", "set_task", "injected"])
def test_while_training_it_is_an_error(door):
    model, inputs = adapted("mlp").train(), rows("mlp")
    called = model.base_model.model if door == "injected" else model
    with pytest.raises(ValueError, match=f"{UNKNOWN}.*rte, sst2, boolq.*eval mode.*add_tasks"):  # noqa: PT012
        if door == "task_ids":
            model(**inputs, task_ids=["rte", STRANGER, "rte", "rte"])
        elif door == "set_task":
            model.set_task(STRANGER)
            model(**inputs)
        else:
            with peft_poly.use_task(called, STRANGER):
                called(**inputs)


@pytest.mark.parametrize("tasks", [3, -1, [0, 3, 1, 1], [STRANGER, 3, 0, 0], [STRANGER, np.int64(3), 0, 0],
                                   torch.tensor([0, 1, 2, 3])])  # fmt: skip
def test_an_id_out_of_range_stays_an_error(tasks):
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\]"):
        adapted("mlp")(**rows("mlp"), task_ids=tasks)


def test_the_number_of_rows_is_checked_as_ever():
    with pytest.raises(ValueError, match="task_ids has 3 entries but the batch has 4 rows"):
        adapted("llama")(**rows("llama"), task_ids=[STRANGER, "rte", "rte"])


def test_by_default_it_is_an_error():
    model = adapted("mlp", unknown_task="error")
    with pytest.raises(ValueError, match=UNKNOWN):
        model(**rows("mlp"), task_ids=STRANGER)


def test_the_setting_may_change_at_any_time():
    model, inputs = adapted("mlp", unknown_task="error"), rows("mlp")
    model.peft_config["default"].unknown_task = "mean"
    torch.testing.assert_close(model(**inputs, task_ids=STRANGER), grown(model)(**inputs, task_ids=STRANGER))
    model.peft_config["default"].unknown_task = "error"
    with pytest.raises(ValueError, match=UNKNOWN):
        model(**inputs, task_ids=STRANGER)


def test_what_changes_an_adapter_takes_no_strangers(tmp_path):
    model = adapted("llama")
    for call in (
        lambda: model.merge_adapter(task=STRANGER),
        lambda: model.export_lora(STRANGER, tmp_path / "lora"),
        lambda: model.remove_tasks(STRANGER),
        lambda: model.add_tasks(["another"], init=STRANGER),
        lambda: model.task_id(STRANGER),
    ):
        with pytest.raises(ValueError, match=STRANGER):
            call()


def test_a_merged_task_is_not_mistaken_for_a_stranger():
    model = adapted("mlp")
    model.merge_adapter(task="boolq")
    with pytest.raises(ValueError, match="is merged into the base weights"):
        model(**rows("mlp"), task_ids=STRANGER)


def test_a_name_that_is_added_while_it_is_in_use_is_no_stranger_any_more():
    model, inputs = adapted("mlp"), rows("mlp")
    with model.use_task([STRANGER, "second", "rte", "rte"]):
        model.add_tasks(["second"], init="sst2")
        with torch.no_grad():
            found, expected = model(**inputs), grown(model)(**inputs, task_ids=[4, 3, 0, 0])
    torch.testing.assert_close(found, expected)


def test_it_is_saved_and_read_again(tmp_path):
    model, inputs = adapted("llama"), rows("llama")
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(CASES["llama"].make(), tmp_path)
    torch.testing.assert_close(first(again(**inputs, task_ids=STRANGER)), first(model(**inputs, task_ids=STRANGER)))


def test_an_adapter_without_names_has_no_strangers():
    model = adapters.adapt(MLP(), adapters.poly("mlp", unknown_task="mean"))
    with pytest.raises(ValueError, match="has no names"):
        model(**rows("mlp"), task_ids=STRANGER)


def test_the_compiler_takes_it_whole():
    model, inputs = adapted("mlp"), rows("mlp")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(**inputs, task_ids=["rte", STRANGER, "boolq", STRANGER])
        expected = grown(model)(**inputs, task_ids=["rte", STRANGER, "boolq", STRANGER])
    torch.testing.assert_close(found, expected)
