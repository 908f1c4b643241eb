"""Which task a call gets: its own ids, else those of `use_task`, else that of `set_task`; nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from contextlib import ExitStack

import peft
import pytest
import torch
from adapters import adapt, spread
from tiny import MLP, TASKS, naive_merge, naive_pair
from torch import nn

import peft_poly
from peft_poly import PolyConfig, PolyLayer
from peft_poly.tasks.batch import TaskBatch, generation


def config(**settings) -> PolyConfig:
    settings = {"r": 4, "n_skills": 3, "n_splits": 2, "task_names": TASKS, "init_weights": False, **settings}
    return PolyConfig(target_modules=["lin0", "lin1"], **settings)


@pytest.fixture
def model() -> peft.PeftModel:
    return adapt(MLP(), config())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 16)


def expected(model: nn.Module, x: torch.Tensor, *tasks: int) -> torch.Tensor:
    """Row by row through the dense model of its task."""
    dense = {task: naive_merge(model, task).get_base_model() for task in set(tasks)}
    return torch.cat([dense[task](x[row : row + 1]) for row, task in enumerate(tasks)])


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


NO_TASK = r"No task is known for this call, and adapter 'default' has 3 of them \(rte, sst2, boolq\)\. Pass `task_ids=`"


# --------------------------------------------------------------------------------------------------- who wins
def test_a_call_without_a_task_is_refused(model, x):
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


def test_the_message_counts_tasks_without_names(x):
    model = peft.get_peft_model(MLP(), config(task_names=None, n_tasks=4))
    with pytest.raises(ValueError, match=r"adapter 'default' has 4 of them \(ids 0 to 3\)"):
        model(x)


def test_one_task_needs_no_saying(x):
    model = peft.get_peft_model(MLP(), config(task_names=["only"])).eval()
    same(model(x), expected(model, x, 0, 0, 0))


def test_a_mixed_batch_equals_the_dense_models_row_by_row(model, x):
    same(model(x, task_ids=[2, 0, 1]), expected(model, x, 2, 0, 1))
    assert not torch.allclose(expected(model, x, 0, 0, 0), expected(model, x, 1, 1, 1), atol=1e-2)


@pytest.mark.parametrize("task", [1, "sst2"])
def test_the_set_task_serves_calls_that_say_none(model, x, task):
    model.set_task(task)
    same(model(x), expected(model, x, 1, 1, 1))
    same(model(x, task_ids="boolq"), expected(model, x, 2, 2, 2))
    same(model(x), expected(model, x, 1, 1, 1))


def test_none_clears_the_set_task(model, x):
    model.set_task("rte")
    model.set_task(None)
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


@pytest.mark.parametrize("bad", [[0, 1, 2], torch.tensor([0]), True, 1.0])
def test_set_task_takes_one_task_only(model, bad):
    with pytest.raises(ValueError, match="`set_task` takes one id, one name or None, got"):
        model.set_task(bad)


@pytest.mark.parametrize(("bad", "message"), [(3, r"lie in \[0, 2\], got 3"), ("sst", "Did you mean 'sst2'")])
def test_setting_an_unknown_task_is_refused_and_changes_nothing(model, x, bad, message):
    model.set_task("rte")
    with pytest.raises(ValueError, match=message):
        model.set_task(bad)
    same(model(x), expected(model, x, 0, 0, 0))


def test_use_task_goes_before_set_task_and_the_call_before_both(model, x):
    model.set_task("rte")
    with model.use_task([1, 2, 1]):
        same(model(x), expected(model, x, 1, 2, 1))
        same(model(x, task_ids=2), expected(model, x, 2, 2, 2))
        same(model(x), expected(model, x, 1, 2, 1))
    same(model(x), expected(model, x, 0, 0, 0))


def test_use_task_nests_and_comes_back(model, x):
    with model.use_task("rte"):
        with model.use_task(["sst2", "rte", "boolq"]):
            same(model(x), expected(model, x, 1, 0, 2))
            with peft_poly.use_task(model, torch.tensor([2, 2, 0])):
                same(model(x), expected(model, x, 2, 2, 0))
            same(model(x), expected(model, x, 1, 0, 2))
        same(model(x), expected(model, x, 0, 0, 0))
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


def test_using_no_task_hides_the_outer_one(model, x):
    with model.use_task("rte"), model.use_task(None), pytest.raises(ValueError, match=NO_TASK):
        model(x)


def test_set_task_inside_use_task_waits_for_its_end(model, x):
    with model.use_task("rte"):
        model.set_task("boolq")
        same(model(x), expected(model, x, 0, 0, 0))
    same(model(x), expected(model, x, 2, 2, 2))


def test_use_task_refuses_what_a_call_would_refuse_and_enters_nothing(model, x):
    for bad, message in ((3, r"lie in \[0, 2\]"), (["rte", "st2"], "Did you mean 'sst2'"), ([0.5], "must be integers")):
        with pytest.raises(ValueError, match=message), model.use_task(bad):
            pytest.fail("the block was entered")
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


def test_use_task_needs_a_task_routed_layer():
    match = r"MLP has no task-routed layer\. Add an adapter with a PolyConfig"
    with pytest.raises(ValueError, match=match), peft_poly.use_task(MLP(), 0):
        pytest.fail("the block was entered")


# ------------------------------------------------------------------------------------------------ nothing stale
def test_an_exception_in_the_block_restores_the_task_before(model, x):
    with model.use_task("rte"):
        with pytest.raises(RuntimeError, match="on purpose"), model.use_task("sst2"):
            raise RuntimeError("on purpose")
        same(model(x), expected(model, x, 0, 0, 0))


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("task_ids", ["sst2", [0, 1, 2]])
def test_a_failed_forward_leaves_no_task_behind(model, x, task_ids):
    whole = model.base_model.model.act
    model.base_model.model.act = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x, task_ids=task_ids)
    model.base_model.model.act = whole
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 3], "st2"])
def test_refused_ids_leave_no_task_behind(model, x, bad):
    model.set_task("boolq")
    with pytest.raises(ValueError, match=r"entries|lie in|Unknown"):
        model(x, task_ids=bad)
    same(model(x), expected(model, x, 2, 2, 2))


def test_a_finished_call_leaves_no_task_behind(model, x):
    model(x, task_ids=[0, 1, 2])
    with pytest.raises(ValueError, match=NO_TASK):
        model(x)


def test_a_call_in_a_block_with_another_number_of_rows_is_refused(model, x):
    with model.use_task([0, 1]), pytest.raises(ValueError, match="task_ids has 2 entries but the input of MLP has 3"):
        model(x)


# ------------------------------------------------------------------------------------------------ several adapters
def two_adapters() -> peft.PeftModel:
    """Tasks of one name with different ids, sizes of different shape, both active."""
    model = peft.get_peft_model(MLP(), config(task_names=["x", "y"]))
    model.add_adapter("other", config(task_names=["y", "z", "x"], r=2, n_skills=2, n_splits=4))
    model.base_model.set_adapter(["default", "other"])
    return spread(model).eval()


def naive_mlp(model: peft.PeftModel, x: torch.Tensor, tasks: dict[str, list[int]]) -> torch.Tensor:
    base = model.get_base_model()
    rows = []
    for row in range(x.shape[0]):
        hidden = x[row].double()
        for name in ("lin0", "lin1"):
            layer = getattr(base, name)
            result = hidden @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
            for adapter, ids in tasks.items():
                A, B = naive_pair(layer, adapter, ids[row])
                result = result + hidden @ A @ B / layer.r[adapter]
            hidden = base.act(result) if name == "lin0" else result
        rows.append(hidden)
    return torch.stack(rows).float()


@pytest.mark.parametrize(
    ("task_ids", "default", "other"),
    [
        (["x", "y", "x"], [0, 1, 0], [2, 0, 2]),
        (["x", "x", "x"], [0, 0, 0], [2, 2, 2]),
        ("y", [1, 1, 1], [0, 0, 0]),
        ([1, 0, 0], [1, 0, 0], [1, 0, 0]),
        (["x", 0, 0], [0, 0, 0], [2, 0, 0]),  # one task to the first adapter, a mixed batch to the second
        ([0, "y", "y"], [0, 1, 1], [0, 0, 0]),  # and the other way round
    ],
)
def test_each_active_adapter_has_its_own_ids_for_a_name(x, task_ids, default, other):
    model = two_adapters()
    wanted = naive_mlp(model, x, {"default": default, "other": other})
    same(model(x, task_ids=task_ids), wanted)
    with model.use_task(task_ids):
        same(model(x), wanted)


def test_every_active_adapter_must_know_the_task(x):
    model = two_adapters()
    with pytest.raises(ValueError, match=r"Unknown task 'z'\..* Adapter 'default' knows: x, y"):
        model(x, task_ids="z")
    model.set_adapter("other")
    same(model(x, task_ids="z"), naive_mlp(model, x, {"other": [1, 1, 1]}))


def test_changing_the_adapter_inside_a_block_resolves_the_names_anew(x):
    model = two_adapters()
    model.set_adapter("default")
    with model.use_task(["x", "y", "x"]):
        same(model(x), naive_mlp(model, x, {"default": [0, 1, 0]}))
        model.set_adapter("other")
        same(model(x), naive_mlp(model, x, {"other": [2, 0, 2]}))
    model.set_task("x")
    same(model(x), naive_mlp(model, x, {"other": [2, 2, 2]}))
    model.set_adapter("default")
    same(model(x), naive_mlp(model, x, {"default": [0, 0, 0]}))


@pytest.mark.parametrize("tasks", ["sst2", 1, ["rte", "sst2", "sst2"], torch.tensor([0, 1, 1])], ids=str)
def test_ids_that_have_moved_inside_a_block_are_refused(model, x, tasks):
    with model.use_task(tasks):
        model(x)
        model.remove_tasks("boolq")
        for call in (lambda: model(x), lambda: model.get_base_model()(x)):
            with pytest.raises(ValueError, match="Tasks or adapters were removed after these were entered"):
                call()
        same(model(x, task_ids="sst2"), expected(model, x, 1, 1, 1))
        with model.use_task("sst2"):
            same(model(x), expected(model, x, 1, 1, 1))
    same(model(x, task_ids=[0, 1, 0]), expected(model, x, 0, 1, 0))


def test_a_block_of_an_adapter_that_was_deleted_is_not_one_of_the_next_of_its_name(model, x):
    with model.use_task("rte"):
        model.add_adapter("other", config())
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", config(task_names=TASKS[::-1]))
        model.set_adapter("default")
        with pytest.raises(ValueError, match="removed after these were entered: 'rte'"):
            model(x)
        model(x, task_ids="rte")


def test_tasks_that_join_inside_a_block_leave_it_as_it_is(model, x):
    with model.use_task(["rte", "boolq", "sst2"]):
        wanted = model(x)
        model.add_tasks(["new"])
        assert torch.equal(model(x), wanted)


def test_a_merge_inside_a_block_is_not_computed_for_the_blocks_task(model, x):
    with model.use_task("rte"):
        model.merge_adapter(task="sst2")
        with pytest.raises(ValueError, match="Task 'sst2' of adapter 'default' is merged"):
            model(x)
        same(model(x, task_ids="sst2"), model.get_base_model()(x))


# -------------------------------------------------------------------------------------------------- one layer alone
def test_a_layer_takes_task_ids_itself(model, x):
    layer = model.get_base_model().lin0
    dense = [naive_merge(model, task).get_base_model().lin0 for task in range(3)]
    same(layer(x, task_ids=["boolq", 0, 1]), torch.stack([dense[t](x[row]) for row, t in enumerate((2, 0, 1))]))
    with pytest.raises(ValueError, match="task_ids has 2 entries but the batch has 3 rows"):
        layer(x, task_ids=[0, 1])
    with model.use_task("rte"):
        same(layer(x), dense[0](x))
        same(layer(x, task_ids=1), dense[1](x))


def test_one_row_without_a_batch_axis_is_one_row(model, x):
    layer = model.get_base_model().lin0
    same(layer(x[0, 0], task_ids=2), naive_merge(model, 2).get_base_model().lin0(x[0, 0]))


def test_one_task_fits_flattened_rows_and_a_mixed_batch_does_not(model, x):
    class Flattening(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    wrapped = Flattening(model.get_base_model())
    for uniform in (1, "sst2", [1, 1, 1], torch.tensor([1, 1, 1])):
        with peft_poly.use_task(wrapped, uniform):
            same(wrapped(x), expected(model, x, 1, 1, 1))
    match = r"task_ids has 3 entries but the input of MLP has 15 rows\..*flattened tokens or windows"
    with peft_poly.use_task(wrapped, [0, 1, 1]), pytest.raises(ValueError, match=match):
        wrapped(x)


@pytest.mark.parametrize("n_rows", [1, 2, 6, 7])
def test_rows_are_repeated_in_generation_only(n_rows):
    batch = TaskBatch([2, 0, 1], {"default": torch.tensor([2, 0, 1])}, {"default": False})
    with pytest.raises(ValueError, match=f"3 entries but the input of q has {n_rows} rows"):
        batch.rows("default", n_rows, "q")
    with generation(repeats=2):
        if n_rows == 6:
            assert batch.rows("default", 6).tolist() == [2, 2, 0, 0, 1, 1]
        else:
            with pytest.raises(ValueError, match="3 entries"):
                batch.rows("default", n_rows)
    with pytest.raises(ValueError, match="3 entries"):
        batch.rows("default", 6)


# ---------------------------------------------------------------------------------------------------------- threads
def in_thread(function) -> object:
    """The result of `function` in a thread of its own, or the exception it raised."""
    results: list = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # handed to the caller
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_the_set_task_is_seen_by_every_thread(model, x):
    model.set_task("boolq")
    same(in_thread(lambda: model(x)), expected(model, x, 2, 2, 2))
    in_thread(lambda: model.set_task("rte"))
    same(model(x), expected(model, x, 0, 0, 0))


def test_use_task_is_seen_by_its_own_thread_only(model, x):
    with model.use_task("rte"):
        error = in_thread(lambda: model(x))
        assert isinstance(error, ValueError)
        assert "No task is known" in str(error)
        model.set_task("boolq")
        same(in_thread(lambda: model(x)), expected(model, x, 2, 2, 2))
        same(model(x), expected(model, x, 0, 0, 0))


def test_generation_is_a_matter_of_its_own_thread():
    batch = TaskBatch([2, 0], {"default": torch.tensor([2, 0])}, {"default": False})
    with generation(repeats=2):
        assert isinstance(in_thread(lambda: batch.rows("default", 4)), ValueError)


# ---------------------------------------------------------------------------------------------------------- copies
def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": by_torch_save}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("inside", [False, True], ids=["set", "in a block"])
def test_a_copy_made_while_a_task_is_chosen_works_and_is_independent(model, x, make, inside):
    model.set_task("sst2")
    with ExitStack() as stack:
        if inside:
            stack.enter_context(model.use_task("boolq"))
        other = make(model)
        # the default goes with the copy, the batch of the block does not
        same(other(x), expected(model, x, 1, 1, 1))
    other.set_task("rte")
    same(other(x), expected(model, x, 0, 0, 0))
    same(model(x), expected(model, x, 1, 1, 1))
    contexts = {id(layer.task_context) for layer in other.modules() if isinstance(layer, PolyLayer)}
    assert contexts == {id(other.base_model.task_context)}
    assert other.base_model.task_context.configs is other.peft_config


def test_a_copy_learns_its_own_gradients(model, x):
    other = copy.deepcopy(model)
    other(x, task_ids=[0, 1, 2]).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())
