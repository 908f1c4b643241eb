"""Tasks join, leave and are renamed: new router rows against logits computed by hand, old outputs bit for bit.

Where a new row has the logits of a known task, or a mean of several, its outputs are compared with a dense model into
which that row was put naively.
"""

from __future__ import annotations

from collections.abc import Callable

import adapters
import peft
import pytest
import torch
from adapters import adapt
from peft import PeftModel
from tiny import CASES, TASKS, bert, first, llama, naive_merge
from torch import nn

from peft_poly import PolyConfig, PolyLayer

GRANULARITIES = ["layer", "block", "model"]


def poly(case: str = "llama", **settings) -> PolyConfig:
    if "n_tasks" not in settings:
        settings = {"n_tasks": None, "task_names": TASKS, **settings}
    return adapters.poly(case, **{"r": 2, "n_skills": 3, "n_splits": 2, **settings})


def adapted(case: str = "llama", **settings) -> PeftModel:
    return adapt(CASES[case].make(), poly(case, **settings))


def logits(model: nn.Module, case: str = "llama", **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**CASES[case].inputs(), **kwargs))


def layers(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def rows(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    """The router rows of each layer, `(n_tasks, h * k)`."""
    return [layer.poly_router[adapter].module_logits.detach().clone() for layer in layers(model)]


# -------------------------------------------------------------------------------------------------- where rows start
INITS: dict[str, tuple[object, Callable]] = {
    "mean": ("mean", lambda old: (old[0] + old[1] + old[2]) / 3),
    "uniform": ("uniform", lambda old: torch.zeros_like(old[0])),
    "name": ("sst2", lambda old: old[1]),
    "id": (2, lambda old: old[2]),
    "weights": ({"rte": 3, "boolq": 1.0}, lambda old: 0.75 * old[0] + 0.25 * old[2]),
    "weights by id": ({0: 0.1, 1: 0.1}, lambda old: 0.5 * old[0] + 0.5 * old[1]),
    "name and id of one task": ({"rte": 1, 0: 1, "sst2": 2}, lambda old: 0.5 * old[0] + 0.5 * old[1]),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("init", INITS)
def test_new_rows_start_where_init_says_on_every_layer(init, granularity):
    model = adapted(router_granularity=granularity)
    before = rows(model)
    value, by_hand = INITS[init]
    assert model.add_tasks(["cb", "copa"], init=value) == [3, 4]
    for old, new in zip(before, rows(model), strict=True):
        assert new.shape == (5, 6)
        assert torch.equal(new[:3], old)
        torch.testing.assert_close(new[3], by_hand(old), rtol=1e-6, atol=1e-6)
        assert torch.equal(new[3], new[4])


def test_the_default_is_the_mean_of_the_known_tasks():
    one, other = adapted(), adapted()
    one.add_tasks(["cb"])
    other.add_tasks(["cb"], init="mean")
    assert all(torch.equal(*pair) for pair in zip(rows(one), rows(other), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_new_task_computes_what_its_row_says(case):
    model = adapted(case)
    model.add_tasks(["copy"], init="sst2")
    model.add_tasks(["flat"], init="uniform")
    model.add_tasks(["mix"], init={"rte": 1, "flat": 1})
    assert torch.equal(logits(model, case, task_ids="copy"), logits(model, case, task_ids="sst2"))
    for task in (3, 4, 5):
        dense = logits(naive_merge(model.get_base_model(), task), case)
        torch.testing.assert_close(logits(model, case, task_ids=task), dense, rtol=1e-4, atol=1e-5)
    weights = model.routing_weights()
    assert all(torch.equal(w[4], torch.full_like(w[4], 1 / 3)) for w in weights.values())


# ------------------------------------------------------------------------------------------- what was there stays as is
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", ["llama", "t5", "mlp"])
def test_what_the_known_tasks_compute_stays_bit_equal(case, granularity):
    model = adapted(case, router_granularity=granularity)
    calls = [{"task_ids": ["rte", "boolq", "sst2"]}, {"task_ids": [2, 2, 2]}, {"task_ids": "rte"}, {"task_ids": 1}]
    before = [logits(model, case, **call) for call in calls]
    model.add_tasks(["cb"])
    model.add_tasks(["copa", "wic"], init="uniform")
    model.rename_task("cb", "commitment")
    model.remove_tasks(["copa", "wic"])
    assert all(torch.equal(old, logits(model, case, **call)) for old, call in zip(before, calls, strict=True))


def test_skills_and_base_weights_are_not_touched():
    model = adapted()
    before = {n: (p, p._version) for n, p in model.named_parameters() if "module_logits" not in n}
    model.add_tasks(["cb"])
    after = {n: (p, p._version) for n, p in model.named_parameters() if "module_logits" not in n}
    assert all(after[name][0] is p and after[name][1] == version for name, (p, version) in before.items())


def test_a_batch_mixes_old_and_new_tasks():
    model = adapted()
    model.add_tasks(["cb"], init="uniform")
    mixed = logits(model, task_ids=["rte", "cb", "boolq"])
    for row, task in enumerate([0, 3, 2]):
        dense = logits(naive_merge(model.get_base_model(), task))
        torch.testing.assert_close(mixed[row], dense[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("granularity", "routers"), [("layer", 14), ("block", 2), ("model", 1)])
def test_a_shared_router_grows_once_and_stays_shared(granularity, routers):
    model = adapted(router_granularity=granularity)
    model.add_tasks(["cb", "copa"])
    found = {id(layer.poly_router["default"].module_logits) for layer in layers(model)}
    assert len(found) == routers
    assert all(layer.poly_router["default"].module_logits.shape == (5, 6) for layer in layers(model))
    assert sum(p.numel() for n, p in model.named_parameters() if "module_logits" in n) == routers * 5 * 6


def test_the_config_follows():
    model = adapted()
    model.add_tasks(["cb"])
    config = model.peft_config["default"]
    assert (config.n_tasks, config.task_names) == (4, [*TASKS, "cb"])
    assert model.task_names == [*TASKS, "cb"]
    assert model.task_id("cb") == 3
    assert [layer.n_tasks["default"] for layer in layers(model)] == [4] * 14
    assert all(w.shape == (4, 2, 3) for w in model.routing_weights().values())


def test_a_config_that_the_caller_kept_is_not_written_to():
    config = poly()
    names = config.task_names
    adapt(llama(), config).add_tasks(["cb"])
    assert names == TASKS


def test_tasks_without_names_are_added_by_count():
    model = adapted(n_tasks=2)
    before = logits(model, task_ids=1)
    assert model.add_tasks(3, init=0) == [2, 3, 4]
    assert model.peft_config["default"].n_tasks == 5
    assert model.task_names is None
    assert torch.equal(logits(model, task_ids=4), logits(model, task_ids=0))
    assert torch.equal(logits(model, task_ids=1), before)


def test_another_adapter_is_left_alone():
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly(task_names=["x", "y"], n_skills=2))
    adapters.spread(model).eval()
    two = rows(model, "two")
    model.add_tasks(["cb"])
    assert model.peft_config["two"].task_names == ["x", "y"]
    assert all(torch.equal(*pair) for pair in zip(two, rows(model, "two"), strict=True))
    assert model.add_tasks(["z"], init="y", adapter_name="two") == [2]
    assert model.peft_config["one"].task_names == [*TASKS, "cb"]
    model.set_adapter("two")
    assert torch.equal(logits(model, task_ids="z"), logits(model, task_ids="y"))


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("prepare", ["train_all", "train_router_only"])
def test_the_rows_train_as_they_did_before(prepare):
    model = adapted()
    getattr(model, prepare)()
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_tasks(["cb"])
    model.remove_tasks("rte")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_the_rows_of_a_frozen_adapter_stay_frozen(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.add_tasks(["cb"])
    assert not any(p.requires_grad for p in model.parameters())


def test_an_optimizer_made_afterwards_trains_the_new_row_and_not_the_others():
    model = adapted()
    model.train_router_only()
    model.add_tasks(["cb"], init="uniform")
    before = rows(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    inputs = CASES["llama"].inputs()
    model.train()(**inputs, labels=inputs["input_ids"], task_ids="cb").loss.backward()
    optimizer.step()
    for old, new in zip(before, rows(model), strict=True):
        assert torch.equal(old[:3], new[:3])
        assert not torch.equal(old[3], new[3])


# -------------------------------------------------------------------------------------------------------- save and load
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_grown_adapter_is_saved_and_loaded(tmp_path, granularity, low_cpu_mem_usage):
    model = adapted("bert", router_granularity=granularity)
    model.add_tasks(["cb", "copa"], init={"rte": 1, "sst2": 2})
    model.remove_tasks("sst2")
    model.rename_task("copa", "causes")
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)  # the same base model
    loaded = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert loaded.task_names == ["rte", "boolq", "cb", "causes"]
    for task in range(4):
        assert torch.equal(logits(loaded, "bert", task_ids=task), logits(model, "bert", task_ids=task))
    assert loaded.add_tasks(["wic"], init="causes") == [4]
    assert torch.equal(logits(loaded, "bert", task_ids="wic"), logits(model, "bert", task_ids="causes"))


def test_a_checkpoint_of_before_the_growth_does_not_fit_after_it(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    model.add_tasks(["cb"])
    saved = peft.load_peft_weights(str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"router of adapter 'default' in .* has \(3, 6\), its config asks for \(4, 6\)"
    ):
        peft.set_peft_model_state_dict(model, saved)


# --------------------------------------------------------------------------------------------------- names and set task
def test_new_names_work_wherever_an_id_goes():
    model = adapted()
    model.add_tasks(["cb"], init="boolq")
    expected = logits(model, task_ids=3)
    assert torch.equal(logits(model, task_ids="cb"), expected)
    with model.use_task("cb"):
        assert torch.equal(logits(model), expected)
    model.set_task("cb")
    assert torch.equal(logits(model), expected)
    inputs = CASES["llama"].inputs(rows=2)
    generated = model.generate(**inputs, task_ids=["cb", "rte"], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs, task_ids=[3, 0], max_new_tokens=3, do_sample=False))


def test_a_near_miss_suggests_a_new_name():
    model = adapted()
    model.add_tasks(["commitment_bank"])
    with pytest.raises(ValueError, match="commitment_bank"):
        logits(model, task_ids="comitment_bank")


def test_the_set_task_stays_the_same_task():
    model = adapted()
    expected = [logits(model, task_ids=task) for task in range(3)]
    model.set_task("boolq")
    model.add_tasks(["cb"])
    assert torch.equal(logits(model), expected[2])
    model.remove_tasks("rte")
    assert torch.equal(logits(model), expected[2])
    model.rename_task("boolq", "questions")
    assert torch.equal(logits(model), expected[2])
    model.set_task(1)  # boolq, whose id has moved up
    model.remove_tasks("sst2")
    assert torch.equal(logits(model), expected[2])


def test_changing_an_inactive_adapter_leaves_the_set_task_alone():
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly(task_names=["x", "y", "boolq"]))
    adapters.spread(model).eval()
    expected = logits(model, task_ids="boolq")
    model.set_task("boolq")
    model.rename_task("boolq", "z", adapter_name="two")
    model.remove_tasks(["x"], adapter_name="two")
    model.remove_tasks(["z"], adapter_name="two")
    assert torch.equal(logits(model), expected)
    model.set_task(2)
    model.add_tasks(["w", "v"], adapter_name="two")
    model.remove_tasks([2], adapter_name="two")
    assert torch.equal(logits(model), expected)


def two_active():
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly())
    adapters.spread(model).eval()
    model.base_model.set_adapter(["one", "two"])
    return model


def test_the_set_id_of_two_active_adapters_does_not_move_in_both_when_one_loses_a_task():
    model = two_active()
    expected = logits(model, task_ids=2)
    model.set_task(2)
    with pytest.raises(ValueError, match=r"Task 2 is the set task, of the active adapters 'one' and 'two'\. .*None"):
        model.remove_tasks([0], adapter_name="one")
    assert torch.equal(logits(model), expected)
    model.set_task(0)  # stays what it is in both
    expected = logits(model)
    model.remove_tasks([2], adapter_name="one")
    assert torch.equal(logits(model), expected)


def test_the_set_name_of_two_active_adapters_does_not_change_in_one():
    model = two_active()
    expected = logits(model, task_ids="boolq")
    model.set_task("boolq")
    with pytest.raises(ValueError, match="Task 'boolq' is the set task, of the active adapters 'one' and 'two'"):
        model.rename_task("boolq", "questions", adapter_name="one")
    assert model.base_model.peft_config["one"].task_names == ["rte", "sst2", "boolq"]
    model.remove_tasks(["rte"], adapter_name="one")  # a name keeps its meaning
    assert torch.equal(logits(model), expected)
    model.rename_task("sst2", "feelings", adapter_name="one")
    model.set_task(None)
    model.rename_task("boolq", "questions", adapter_name="one")
    assert model.base_model.peft_config["one"].task_names == ["feelings", "questions"]
    assert model.base_model.peft_config["two"].task_names == ["rte", "sst2", "boolq"]


# --------------------------------------------------------------------------------------------------- remove and rename
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("gone", ["sst2", 1, ["sst2"], [1, "sst2"]], ids=str)
def test_removed_tasks_are_gone_and_ids_behind_them_move_up(granularity, gone):
    model = adapted(router_granularity=granularity)
    before, expected = rows(model), logits(model, task_ids="boolq")
    model.remove_tasks(gone)
    assert model.task_names == ["rte", "boolq"]
    assert model.peft_config["default"].n_tasks == 2
    for old, new in zip(before, rows(model), strict=True):
        assert torch.equal(new, old[[0, 2]])
    assert torch.equal(logits(model, task_ids="boolq"), expected)
    assert torch.equal(logits(model, task_ids=1), expected)
    with pytest.raises(ValueError, match="sst2"):
        logits(model, task_ids="sst2")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 2"):
        logits(model, task_ids=2)


def test_the_last_task_left_needs_no_saying():
    model = adapted()
    expected = logits(model, task_ids="rte")
    model.remove_tasks(["sst2", "boolq"])
    assert torch.equal(logits(model), expected)


def test_a_renamed_task_keeps_its_id_and_its_row():
    model = adapted()
    expected = logits(model, task_ids="sst2")
    model.rename_task("sst2", "sentiment")
    model.rename_task(0, "entailment")
    assert model.task_names == ["entailment", "sentiment", "boolq"]
    assert torch.equal(logits(model, task_ids="sentiment"), expected)
    with pytest.raises(ValueError, match="'sst2'"):
        logits(model, task_ids="sst2")
    model.rename_task("sentiment", "sentiment")


# -------------------------------------------------------------------------------------------------------------- errors
ADD_ERRORS = {
    "taken": ((["cb", "rte"],), r"has the task\(s\) \['rte'\] already"),
    "repeated": ((["cb", "cb"],), r"Task names must differ, but \['cb'\] occur more than once"),
    "empty name": ((["cb", " "],), "Every task name must be a non-empty string, got ' '"),
    "no name": (([],), "must be a non-empty list of names"),
    "a string": (("cb",), "pass a list of new ones, such as \\['rte'\\], got 'cb'"),
    "a count": ((2,), "pass a list of new ones, such as \\['rte'\\], got 2"),
    "not a name": (([3],), "must be a non-empty string, got 3"),
    "unknown init": ((["cb"], "mena"), "mena"),
    "id out of range": ((["cb"], 3), r"must lie in \[0, 2\], got 3"),
    "init of another kind": ((["cb"], ["rte"]), r"`init` must be 'mean', 'uniform', a task, or \{task: weight\}"),
    "init none": ((["cb"], None), "`init` must be"),
    "init bool": ((["cb"], True), "`init` must be"),
    "unknown task in init": ((["cb"], {"rte": 1, "wic": 1}), "wic"),
    "negative weight": ((["cb"], {"rte": 2, "sst2": -1}), "weight of task 'sst2' in `init` must be a number from 0 up"),
    "infinite weight": ((["cb"], {"rte": float("inf")}), "must be a number from 0 up, got inf"),
    "weight that is no number": ((["cb"], {"rte": "half"}), "must be a number from 0 up, got 'half'"),
    "zero weights": ((["cb"], {"rte": 0}), "must not all be zero"),
    "no weights": ((["cb"], {}), "must not all be zero"),
    "unknown adapter": ((["cb"], "mean", "other"), "There is no adapter 'other'"),
}


@pytest.mark.parametrize("error", ADD_ERRORS)
def test_tasks_that_cannot_be_added_change_nothing(error):
    arguments, message = ADD_ERRORS[error]
    model = adapted("mlp")
    before = rows(model)
    with pytest.raises(ValueError, match=message):
        model.add_tasks(*arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("names", [["cb"], 0, -1, True, "cb", 1.5], ids=str)
def test_an_adapter_whose_tasks_have_no_names_takes_a_count(names):
    with pytest.raises(ValueError, match="have no names: pass how many to add, a positive integer"):
        adapted("mlp", n_tasks=2).add_tasks(names)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["wic"], "wic"),
        ([0, 3], r"must lie in \[0, 2\], got 3"),
        (TASKS, "would leave adapter 'default' without a task. Use `delete_adapter` instead"),
    ],
)
def test_tasks_that_cannot_be_removed_change_nothing(tasks, message):
    model = adapted("mlp")
    before = rows(model)
    with pytest.raises(ValueError, match=message):
        model.remove_tasks(tasks)
    assert_unchanged(model, before)


@pytest.mark.parametrize("task", ["boolq", 2])
def test_the_set_task_is_not_removed(task):
    model = adapted("mlp")
    before = rows(model)
    model.set_task(task)
    with pytest.raises(ValueError, match=r"is the set task\. Call `set_task` with another one, or None, first"):
        model.remove_tasks(["rte", "boolq"])
    assert_unchanged(model, before)
    logits(model, "mlp")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wic", "cb", "wic"),
        ("rte", "sst2", r"Task names must differ, but \['sst2'\] occur more than once"),
        ("rte", "", "must be a non-empty string, got ''"),
        (7, "cb", r"must lie in \[0, 2\], got 7"),
    ],
)
def test_a_task_that_cannot_be_renamed_keeps_its_name(old, new, message):
    model = adapted("mlp")
    before = rows(model)
    with pytest.raises(ValueError, match=message):
        model.rename_task(old, new)
    assert_unchanged(model, before)


def test_a_task_without_a_name_has_none_to_change():
    with pytest.raises(ValueError, match="The tasks of adapter 'default' have no names"):
        adapted("mlp", n_tasks=2).rename_task(0, "rte")


@pytest.mark.parametrize(("verb", "argument"), [("add_tasks", ["cb"]), ("remove_tasks", ["rte"])])
def test_the_tasks_of_a_merged_adapter_do_not_change(verb, argument):
    model = adapted("mlp")
    before = rows(model)
    model.merge_adapter(task="rte")
    with pytest.raises(ValueError, match=r"is merged. Call `unmerge_adapter\(\)` before its tasks change"):
        getattr(model, verb)(argument)
    assert_unchanged(model, before)


def test_without_an_active_adapter_the_verbs_say_so():
    model = adapted("mlp")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="No adapter is active"):
        model.add_tasks(["cb"])


def assert_unchanged(model: PeftModel, before: list[torch.Tensor]) -> None:
    assert model.task_names == TASKS
    assert model.peft_config["default"].n_tasks == 3
    assert all(torch.equal(*pair) for pair in zip(before, rows(model), strict=True))
