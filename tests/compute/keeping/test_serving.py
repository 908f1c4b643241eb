"""What is kept while a model serves: outputs stay those of calls outside, memory is bounded, changes are errors."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch
from adapters import adapt, poly
from tiny import CASES, TASKS, naive_merge

from peft_poly import PolyLayer
from peft_poly.compute.kinds import mixture

KINDS = {"poly": {}, "mhr": {"n_splits": 2}, "gates": {"poly_type": "gates"}}


def make(case="llama", **settings):
    config = poly(case, **{"n_tasks": None, "task_names": TASKS, "lora_alpha": 8, **settings})
    return adapt(CASES[case].make(), config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def logits(model, ids, rows=3, case="llama", **inputs):
    with torch.no_grad():
        out = model(**CASES[case].inputs(rows=rows, **inputs), task_ids=ids)
    return getattr(out, "logits", out)


@pytest.fixture
def mixes(monkeypatch):
    """How many tasks were mixed at each time."""
    sizes, mixed = [], mixture.mixed

    def noting(layer, name, tasks, *args, **kwargs):
        sizes.append(len(tasks))
        return mixed(layer, name, tasks, *args, **kwargs)

    monkeypatch.setattr(mixture, "mixed", noting)
    return sizes


BATCHES = [["rte", "sst2", "boolq"], ["sst2", "sst2", "rte"], ["sst2", "rte", "sst2"], "boolq", [2, 0, 1], ["rte"] * 3]


class TestOutputs:
    @pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
    @pytest.mark.parametrize("case", ["llama", "gpt2", "t5", "mlp"])
    def test_each_row_is_what_its_merged_model_gives(self, case, settings):
        model = make(case, **settings)
        merged = (
            [naive_merge(model.base_model.model, task) for task in range(3)] if "poly_type" not in settings else None
        )
        with model.serving():
            for ids in [*BATCHES, *BATCHES]:
                out = logits(model, ids, case=case)
                names = [ids] * 3 if isinstance(ids, str) else ids
                for row, name in enumerate(names):
                    if merged:
                        with torch.no_grad():
                            dense = merged[name if isinstance(name, int) else TASKS.index(name)]
                            wanted = dense(**CASES[case].inputs())
                        wanted = getattr(wanted, "logits", wanted)
                        torch.testing.assert_close(out[row], wanted[row], rtol=1e-4, atol=1e-5)
        for ids in BATCHES:
            with model.serving():
                logits(model, ids, case=case)
                inside = logits(model, ids, case=case)
            torch.testing.assert_close(inside, logits(model, ids, case=case), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
    def test_generation_inside_gives_the_tokens_of_generation_outside(self, settings):
        model, prompt = make(**settings), CASES["llama"].inputs()
        for beams in (1, 2):
            options = {"task_ids": ["sst2", "rte", "sst2"], "max_new_tokens": 4, "num_beams": beams, "do_sample": False}
            with model.serving():
                inside = [model.generate(**prompt, **options) for _ in range(2)]
            outside = model.generate(**prompt, **options)
            assert all(torch.equal(tokens, outside) for tokens in inside)

    def test_the_set_task_and_the_block_of_use_task_are_followed(self):
        model = make()
        alone = {task: logits(model, task) for task in TASKS}
        with model.serving(), torch.no_grad():
            for task in [*TASKS, *TASKS]:
                model.set_task(task)
                torch.testing.assert_close(model(**CASES["llama"].inputs()).logits, alone[task])
                with model.use_task("boolq"):
                    torch.testing.assert_close(model(**CASES["llama"].inputs()).logits, alone["boolq"])

    def test_two_adapters_are_each_kept(self):
        model = make()
        model.add_adapter("other", poly("llama", task_names=TASKS, n_tasks=None, r=2))
        outside = {}
        for names in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(names)
            outside[str(names)] = logits(model, [0, 2, 1])
        with model.serving():
            for _ in range(2):
                for names in ("default", "other", ["default", "other"]):
                    model.base_model.set_adapter(names)
                    torch.testing.assert_close(logits(model, [0, 2, 1]), outside[str(names)])

    def test_gradients_of_a_frozen_model_s_inputs_pass(self):
        model = make("mlp")
        x = CASES["mlp"].inputs()["x"].requires_grad_()
        outside = torch.autograd.grad(model(x=x, task_ids=[0, 1, 2]).sum(), x)[0]
        with model.serving():
            inside = torch.autograd.grad(model(x=x, task_ids=[0, 1, 2]).sum(), x)[0]
        torch.testing.assert_close(inside, outside)


class TestKept:
    def test_each_task_is_mixed_once_in_each_layer(self, mixes):
        model = make()
        with model.serving():
            for ids in [*BATCHES, *BATCHES]:
                logits(model, ids)
        assert sum(mixes) == len(TASKS) * len(layers_of(model))

    def test_nothing_is_kept_after_the_block(self, mixes):
        model = make()
        with model.serving() as store:
            logits(model, "rte")
        assert model.task_context.serving is None
        logits(model, "rte")
        assert sum(mixes) == 2 * len(layers_of(model))
        assert store.n_tasks == 1

    def test_the_least_recently_used_tasks_go(self, mixes):
        model = make("mlp", task_names=[f"t{task}" for task in range(8)])
        with model.serving(max_tasks=2) as store:
            for task in (0, 1, 0, 2):
                logits(model, task, case="mlp")
            assert store.n_tasks == 2
            mixes.clear()
            logits(model, 0, case="mlp")  # used after 1 was
            assert not mixes
            logits(model, 1, case="mlp")
            assert sum(mixes) == len(layers_of(model))

    @pytest.mark.parametrize("max_tasks", [1, 2, 5])
    def test_memory_is_bounded_and_told(self, max_tasks):
        model = make("mlp", task_names=[f"t{task}" for task in range(8)], r=4)
        numbers = sum((layer.in_features + layer.out_features) * 4 for layer in layers_of(model))
        generator = torch.Generator().manual_seed(0)
        with model.serving(max_tasks=max_tasks) as store:
            for _ in range(20):
                ids = torch.randint(8, (3,), generator=generator)
                inside = logits(model, ids, case="mlp")
                assert store.n_tasks <= max_tasks
                assert store.nbytes <= 2 * max_tasks * numbers * 4
        torch.testing.assert_close(inside, logits(model, ids, case="mlp"))

    def test_the_bytes_are_those_of_the_pairs_that_are_kept(self):
        model = make("mlp", r=4)
        size = sum((layer.in_features + layer.out_features) * 4 * 4 for layer in layers_of(model))
        with model.serving() as store:
            logits(model, TASKS[0], case="mlp")
            assert store.nbytes == size
            logits(model, TASKS[1], case="mlp")
            assert store.nbytes == 2 * size

    def test_a_block_in_a_block_shares_and_the_last_ends_it(self):
        model = make("mlp")
        with model.serving() as outer:
            with model.serving() as inner:
                assert inner is outer
            assert model.task_context.serving is outer
            with pytest.raises(ValueError, match="serves already, with max_tasks=None, got 3"), model.serving(3):
                pass
        assert model.task_context.serving is None

    def test_threads_share_what_is_kept(self, mixes):
        model, outs = make("mlp"), {}
        wanted = {task: logits(model, task, case="mlp") for task in TASKS}
        mixes.clear()

        def serve(task, number):
            outs[task, number] = logits(model, task, case="mlp")

        with model.serving():
            threads = [threading.Thread(target=serve, args=(task, number)) for task in TASKS for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sum(mixes) == len(TASKS) * len(layers_of(model))
        for (task, _), out in outs.items():
            torch.testing.assert_close(out, wanted[task])

    def test_gates_keep_nothing(self):
        model = make(poly_type="gates")
        with model.serving() as store:
            logits(model, [0, 1, 2])
        assert store.nbytes == 0


CHANGES = {
    "train()": lambda model: model.train(),
    "add_tasks": lambda model: model.add_tasks(["new"]),
    "remove_tasks": lambda model: model.remove_tasks("rte"),
    "average_skills": lambda model: model.average_skills(),
    "train_router_only": lambda model: model.train_router_only(),
    "train_all": lambda model: model.train_all(),
    "merge_adapter": lambda model: model.merge_adapter(task="rte"),
    "merge_and_unload": lambda model: model.merge_and_unload(task="rte"),
    "Adding an adapter": lambda model: model.add_adapter("other", poly("mlp", task_names=TASKS, n_tasks=None)),
    "Loading": lambda model: model.load_state_dict(model.state_dict()),
}


class TestPromise:
    @pytest.mark.parametrize("what", CHANGES)
    def test_what_would_change_parameters_is_an_error_and_changes_nothing(self, what):
        model = make("mlp")
        before = copy.deepcopy(model.state_dict())
        with model.serving():
            logits(model, "rte", case="mlp")
            with pytest.raises(RuntimeError, match=rf"`?{what[:9]}.*inside `with model.serving\(\):`, which promises"):
                CHANGES[what](model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        CHANGES[what](model)

    def test_a_saved_adapter_is_not_loaded_inside(self, tmp_path):
        model = make("mlp")
        model.save_pretrained(tmp_path)
        with model.serving(), pytest.raises(RuntimeError, match=r"inside `with model\.serving"):
            model.load_adapter(tmp_path, "default")
        with model.serving(), pytest.raises(RuntimeError, match=r"inside `with model\.serving"):
            model.load_adapter(tmp_path, "second")

    def test_an_optimizer_step_is_an_error_and_another_models_is_none(self):
        model, other = make("mlp"), torch.nn.Linear(2, 2)
        model.train_all()
        optimizer, fine = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, other))
        for each in (model, other):
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
        with model.serving():
            before = other.weight.clone()
            fine.step()
            assert not torch.equal(before, other.weight)
            with pytest.raises(RuntimeError, match="An optimizer step inside"):
                optimizer.step()
        optimizer.step()

    @pytest.mark.parametrize("settings", [{}, {"n_splits": 2}], ids=["poly", "mhr"])
    @pytest.mark.parametrize("part", ["poly_lora_A", "poly_lora_B", "module_logits"])
    def test_a_write_is_found_at_the_next_call(self, part, settings):
        model = make("mlp", **settings)
        with model.serving():
            logits(model, [0, 1, 2], case="mlp")
            logits(model, [0, 1, 2], case="mlp")
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if part in name).add_(1)
            with pytest.raises(RuntimeError, match="A parameter of adapter 'default' in lin0 has changed inside"):
                logits(model, [0, 1, 2], case="mlp")

    @pytest.mark.parametrize("max_tasks", [0, -1, True, 1.5, "all"])
    def test_a_limit_that_is_none_is_refused(self, max_tasks):
        message = r"`max_tasks` must be a positive integer, or None for no limit, got"
        with pytest.raises(ValueError, match=message), make("mlp").serving(max_tasks):
            pass

    def test_the_block_ends_after_an_error(self):
        model = make("mlp")
        with pytest.raises(KeyError), model.serving():
            raise KeyError
        assert model.task_context.serving is None
        model.train()


def test_parameters_made_in_inference_mode_are_computed_with_and_not_kept():
    with torch.inference_mode():
        model = make("mlp")
        for layer in layers_of(model):
            layer.poly_lora_A._parameters["default"] = torch.nn.Parameter(layer.poly_lora_A["default"].clone())
        outside = logits(model, [0, 1, 2], case="mlp")
        with model.serving() as store:
            for _ in range(2):
                torch.testing.assert_close(logits(model, [0, 1, 2], case="mlp"), outside)
        assert store.nbytes == 0


def test_other_methods_have_no_such_block():
    model = peft.get_peft_model(CASES["mlp"].make(), peft.LoraConfig(target_modules=["lin0"]))
    assert not hasattr(model, "serving")
