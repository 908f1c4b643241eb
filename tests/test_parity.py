"""Initial tensors and whole models: equal to a dense model per task, to PEFT's own Poly, to PEFT's LoRA."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import tiny
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.poly.layer import Linear as PeftPolyLinear
from torch import nn

from peft_poly import Linear, PolyConfig, PolyLayer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TASKS = [2, 0, 1, 2]
LINEAR = ["t5", "llama", "bert", "mlp"]  # what PEFT's own Poly can adapt: it has no Conv1D


def adapted(case: str, config_class=PolyConfig, seed: int = 0, dtype=torch.float64, noise: bool = True, **settings):
    """An adapted tiny model; base weights depend on `seed` only, the adapter's tensors are drawn if `noise`."""
    case = tiny.CASES[case]
    torch.manual_seed(seed)
    base = case.make().to(dtype).eval()
    torch.manual_seed(seed + 1)
    settings = {"r": 4, "n_tasks": 3, "task_type": case.task_type, "target_modules": case.target_modules, **settings}
    model = peft.get_peft_model(base, config_class(**settings)).eval()
    return redraw(model) if noise else model


def redraw(model):
    """Give every tensor of the adapter new values, B and the router's logits too."""
    for name, parameter in model.named_parameters():
        if "poly_" in name:
            nn.init.normal_(parameter, std=1.0 if "router" in name else 0.3)
    return model


def call(model, inputs: dict, tasks) -> torch.Tensor:
    if type(model) is peft.PeftModel and model.peft_config["default"].peft_type == "POLY":
        return tiny.first(model.base_model(**inputs, task_ids=tasks))  # without a task type PEFT's Poly gets no ids
    return tiny.first(model(**inputs, task_ids=tasks))


def inputs_of(case: str, rows: int = len(TASKS)) -> dict:
    inputs = tiny.CASES[case].inputs(rows)
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def dense_rows(model, inputs: dict, tasks: list[int], adapters=("default",)) -> torch.Tensor:
    """Row by row, the output of a plain model into which the row's task was merged by a naive loop."""
    merged = {task: tiny.naive_merge(model.get_base_model(), task, adapters) for task in set(tasks)}
    assert not any(isinstance(module, PolyLayer) for dense in merged.values() for module in dense.modules())
    rows = [merged[t](**{name: x[row : row + 1] for name, x in inputs.items()}) for row, t in enumerate(tasks)]
    return torch.cat([tiny.first(row) for row in rows])


class TestDense:
    @pytest.mark.parametrize("n_splits", [1, 2, 4])
    @pytest.mark.parametrize("case", tiny.CASES)
    def test_each_row_of_a_mixed_batch_is_what_a_model_of_its_task_says(self, case, n_splits):
        model, inputs = adapted(case, n_splits=n_splits, lora_alpha=2), inputs_of(case)
        out = call(model, inputs, torch.tensor(TASKS))
        torch.testing.assert_close(out, dense_rows(model, inputs, TASKS), **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(call(model, inputs, torch.tensor(TASKS)), out, **CLOSE)
        with model.disable_adapter():
            assert not torch.allclose(out, tiny.first(model(**inputs)), atol=1e-3)

    @pytest.mark.parametrize("granularity", ["layer", "block", "model"])
    @pytest.mark.parametrize("case", tiny.CASES)
    def test_a_uniform_batch_is_what_a_model_of_its_task_says(self, case, granularity):
        model, inputs = adapted(case, n_splits=2, router_granularity=granularity), inputs_of(case)
        torch.testing.assert_close(call(model, inputs, 1), dense_rows(model, inputs, [1] * 4), **CLOSE)

    @pytest.mark.parametrize("case", tiny.CASES)
    def test_training_without_noise_is_eval(self, case):
        model, inputs = adapted(case, n_splits=2, router_noise=False), inputs_of(case)
        torch.testing.assert_close(call(model.train(), inputs, TASKS), dense_rows(model.eval(), inputs, TASKS), **CLOSE)

    @pytest.mark.parametrize("case", ["t5", "gpt2", "mlp"])
    def test_two_active_adapters_of_different_size_add_up(self, case):
        model, inputs = adapted(case), inputs_of(case)
        first = tiny.CASES[case].target_modules[0]
        model.add_adapter("other", PolyConfig(r=2, n_tasks=5, n_splits=4, target_modules=[first], init_weights=False))
        model.base_model.set_adapter(["default", "other"])
        expected = dense_rows(model, inputs, TASKS, ("default", "other"))
        torch.testing.assert_close(call(model, inputs, TASKS), expected, **CLOSE)


SIZES = [(8, 12, 1, 4, 3), (8, 12, 4, 2, 5), (6, 4, 2, 3, 1), (5, 7, 1, 1, 2)]  # in, out, n_splits, n_skills, r


class TestInit:
    @pytest.mark.parametrize("init_weights", [True, False])
    @pytest.mark.parametrize(("d", "o", "n_splits", "n_skills", "r"), SIZES)
    def test_one_seed_gives_the_tensors_of_pefts_own_poly(self, d, o, n_splits, n_skills, r, init_weights):
        settings = {"r": r, "n_tasks": 3, "n_splits": n_splits, "n_skills": n_skills, "init_weights": init_weights}
        base, states = nn.Linear(d, o), []
        for linear, config in ((Linear, PolyConfig), (PeftPolyLinear, peft.PolyConfig)):
            torch.manual_seed(21)
            states.append(linear(base, "default", config(**settings)).state_dict())
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())

    @pytest.mark.parametrize(
        ("init_weights", "bound"), [(True, 1 / math.sqrt(64 // 4)), ("mhr", 1 / math.sqrt(3 * 64))]
    )
    def test_a_is_uniform_in_its_range_and_b_is_zero(self, init_weights, bound):
        config = PolyConfig(r=16, n_splits=4, n_skills=8, init_weights=init_weights)
        layer = Linear(nn.Linear(64, 128), "default", config)
        A = layer.poly_lora_A["default"]
        assert 0.999 * bound < A.abs().max() <= bound
        assert abs(A.std() / (bound / math.sqrt(3)) - 1) < 0.02
        assert abs(A.mean()) < 5 * bound / math.sqrt(3 * A.numel())
        assert not layer.poly_lora_B["default"].any()

    def test_without_init_b_is_uniform_in_the_range_of_its_rank(self):
        layer = Linear(nn.Linear(64, 128), "default", PolyConfig(r=16, n_splits=4, n_skills=8, init_weights=False))
        B = layer.poly_lora_B["default"]
        assert 0.999 / math.sqrt(16) < B.abs().max() <= 1 / math.sqrt(16)
        assert abs(B.std() / (1 / math.sqrt(3 * 16)) - 1) < 0.02

    @pytest.mark.parametrize("init_weights", [True, "mhr"])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_a_fresh_adapter_changes_nothing(self, init_weights, training):
        layer = Linear(nn.Linear(8, 12), "default", PolyConfig(n_tasks=3, init_weights=init_weights)).train(training)
        x = torch.randn(3, 8)
        assert torch.equal(layer(x, task_ids=[0, 1, 2]), layer.base_layer(x))


SETTINGS = [{}, {"n_splits": 4, "n_skills": 3, "r": 2, "n_tasks": 5}]


def pair(case: str, dtype=torch.float32, **settings):
    """One model adapted by us and by PEFT's own Poly, which takes no two-dimensional input, as of a pooler."""
    settings = {"exclude_modules": ["pooler.dense"] if case == "bert" else None, "dtype": dtype, **settings}
    return adapted(case, **settings), adapted(case, peft.PolyConfig, **settings)


class TestPeftsOwnPoly:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("case", LINEAR)
    def test_its_tensors_give_its_outputs_in_both_directions(self, case, settings):
        ours, theirs = pair(case, torch.float64, **settings)
        inputs, ids = inputs_of(case), torch.tensor(TASKS)
        for source, target in ((theirs, ours), (ours, theirs)):
            redraw(source)
            state = get_peft_model_state_dict(source)
            result = set_peft_model_state_dict(target, state)
            assert not result.unexpected_keys
            assert not [key for key in result.missing_keys if "poly_" in key]
            loaded = get_peft_model_state_dict(target)
            assert list(loaded) == list(state)
            assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
            torch.testing.assert_close(call(ours, inputs, ids), call(theirs, inputs, ids), **CLOSE)

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("case", LINEAR)
    def test_one_seed_gives_its_samples_and_its_gradients_in_training(self, case, settings):
        results, (ours, theirs) = [], pair(case, **settings)
        set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
        inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs_of(case).items()}
        for model in (ours, theirs):
            torch.manual_seed(13)
            out = call(model.train(), inputs, torch.tensor(TASKS))
            out.logsumexp(dim=-1).sum().backward()
            results.append((out, {name: p.grad for name, p in model.named_parameters() if "poly_" in name}))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-4, msg=name)

    def test_other_seeds_give_its_distribution_of_outputs_in_training(self):
        ours, theirs = (
            adapted("mlp", config, n_splits=2, dtype=torch.float32) for config in (PolyConfig, peft.PolyConfig)
        )
        set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
        n, ids = 20_000, torch.ones(20_000, dtype=torch.long)
        x = torch.randn(1, 1, 16).expand(n, 1, 16)
        with torch.no_grad():
            samples = [call(model.train(), {"x": x}, ids)[:, 0] for model in (ours, theirs)]
        spread = torch.stack(samples).std(dim=1)
        assert (spread > 1e-3).all()
        assert ((samples[0].mean(0) - samples[1].mean(0)).abs() < 5 * spread.mean(0) * math.sqrt(2 / n)).all()
        for a, b in zip(samples[0].T.double(), samples[1].T.double(), strict=True):
            distance = (torch.searchsorted(a.sort()[0], b.sort()[0]) / n - torch.arange(n) / n).abs().max()
            assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov at 0.1 %

    @pytest.mark.parametrize("init_weights", [True, False])
    @pytest.mark.parametrize("case", LINEAR)
    def test_one_seed_gives_its_initial_tensors_in_every_layer(self, case, init_weights):
        models = pair(case, n_splits=2, init_weights=init_weights, noise=False)
        states = [get_peft_model_state_dict(model) for model in models]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())

    def test_the_default_config_makes_its_model(self):
        models = []
        for config in (PolyConfig, peft.PolyConfig):
            torch.manual_seed(3)
            models.append(peft.get_peft_model(tiny.llama(), config(task_type="CAUSAL_LM")))
        ours, theirs = models
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        assert ours.targeted_module_names == theirs.targeted_module_names
        expected = dict(theirs.named_parameters())
        assert [name for name, _ in ours.named_parameters()] == list(expected)
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            assert parameter.requires_grad == expected[name].requires_grad, name

    def test_some_steps_of_training_end_where_its_end(self):
        ends, inputs, ids = [], tiny.CASES["mlp"].inputs(4), torch.tensor(TASKS)
        for model in pair("mlp", n_splits=2, noise=False):
            model.train()
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05, eps=1e-3)
            torch.manual_seed(17)
            for _ in range(20):
                loss = (call(model, inputs, ids) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends.append({"loss": loss.detach(), **get_peft_model_state_dict(model)})
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
        start = adapted("mlp", noise=False, dtype=torch.float32)
        assert ends[0]["loss"] < 0.8 * (call(start, inputs, ids) - 1).square().mean()


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("case", tiny.CASES)
def test_one_task_is_a_lora_of_the_same_rank(case, n_splits):
    poly, inputs = adapted(case, n_splits=n_splits, lora_alpha=3), inputs_of(case)
    settings = {"target_modules": tiny.CASES[case].target_modules, "task_type": tiny.CASES[case].task_type}
    base = copy.deepcopy(poly).unload()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=3, **settings)).eval()
    layers = dict(lora.named_modules())
    for name, layer in poly.named_modules():
        if isinstance(layer, PolyLayer):
            A, B = tiny.naive_pair(layer, "default", 2)
            layers[name].lora_A["default"].weight.data = A.T.contiguous()
            layers[name].lora_B["default"].weight.data = B.T.contiguous()
    torch.testing.assert_close(call(poly, inputs, 2), tiny.first(lora(**inputs)), **CLOSE)


@pytest.mark.parametrize("case", ["t5", "llama", "gpt2", "bert"])
def test_without_target_modules_the_layers_are_those_of_lora(case):
    task_type = tiny.CASES[case].task_type
    models = [
        peft.get_peft_model(tiny.CASES[case].make(), c(task_type=task_type)) for c in (PolyConfig, peft.LoraConfig)
    ]
    assert models[0].targeted_module_names == models[1].targeted_module_names
