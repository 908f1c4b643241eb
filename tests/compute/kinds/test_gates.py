"""Gates, against a loop over rows and ranks in float64, PEFT's own LoRA, and dense merges."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import adapt, poly, spread
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from tiny import CASES, MLP, TASKS, first, llama, naive_merge, naive_pair
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_poly import Linear, PolyConfig, PolyLayer, convert_checkpoint, export_lora, from_loras
from peft_poly.compute.kinds import KINDS

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
IDS = [2, 0, 2, 1]


def gates(case="mlp", **settings):
    return poly(case, **{"poly_type": "gates", "r": 3, "lora_alpha": 5, **settings})


def make_layer(base=None, dtype=torch.float64, **settings) -> Linear:
    base = nn.Linear(8, 6) if base is None else base
    settings = {"poly_type": "gates", "r": 3, "lora_alpha": 5, "n_tasks": 3, "init_weights": False, **settings}
    layer = Linear(base, "default", PolyConfig(**settings)).to(dtype)
    nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer.eval()


def naive(layer, x, tasks):
    """Row by row, rank by rank, in float64."""
    base, rows = copy.deepcopy(layer.base_layer).double(), []
    A, B = (held["default"][0, 0].double() for held in (layer.poly_lora_A, layer.poly_lora_B))
    for row, task in zip(x.double(), tasks, strict=True):
        y = base(row)
        for rank, z in enumerate(layer.poly_router["default"].module_logits[task].double()):
            y = y + (row @ A[:, rank]).unsqueeze(-1) * (1 + z) * B[rank] * layer.scaling["default"]
        rows.append(y)
    return torch.stack(rows)


@pytest.fixture(params=["training", "grad", "no grad", "inference"])
def mode(request):
    return request.param


def call(layer, x, mode, tasks):
    layer.train(mode == "training")
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode in ("training", "grad")):
        return layer(x, task_ids=tasks)


class TestMaths:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tasks", [IDS, [1] * 4], ids=["mixed", "one"])
    def test_every_row_has_the_gates_of_its_task(self, mode, tasks, dtype):
        layer = make_layer(dtype=dtype)
        x = torch.randn(4, 5, 8).to(dtype)
        got = call(layer, x, mode, tasks)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), naive(layer, x, tasks), rtol=DTYPES[dtype], atol=DTYPES[dtype])

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 20), (4, 3, 2), (4, 2, 1, 3), (4, 2, 1, 2, 2)], ids=str)
    def test_inputs_of_any_shape(self, mode, shape):
        layer, x = make_layer(), torch.randn(*shape, 8, dtype=torch.float64)
        torch.testing.assert_close(call(layer, x, mode, IDS), naive(layer, x, IDS))

    @pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 3, 2), (4, 2, 1, 3)], ids=str)
    def test_plain_operations_add_the_same(self, shape):  # what `torch.func`, traces and the compiler see
        layer, x = make_layer(), torch.randn(*shape, 8, dtype=torch.float64)
        added = KINDS["gates"].update(layer, "default", x, torch.tensor(IDS))
        torch.testing.assert_close(layer.base_layer(x) + added, naive(layer, x, IDS))

    def test_a_vector_has_one_task(self, mode):
        layer, x = make_layer(), torch.randn(8, dtype=torch.float64)
        torch.testing.assert_close(call(layer, x, mode, 1), naive(layer, x[None], [1])[0])

    def test_conv1d(self, mode):
        layer = make_layer(Conv1D(6, 8))
        x = torch.randn(4, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(call(layer, x, mode, IDS), naive(layer, x, IDS))

    def test_a_thousand_tasks_in_one_batch(self, mode):
        layer = make_layer(n_tasks=1000)
        x, tasks = torch.randn(1000, 8, dtype=torch.float64), torch.randperm(1000).tolist()
        torch.testing.assert_close(call(layer, x, mode, tasks), naive(layer, x, tasks))

    def test_a_layer_in_training_is_bit_equal_with_and_without_gradients(self):
        layer, x = make_layer(dtype=torch.float32).train(), torch.randn(4, 5, 8)
        with torch.no_grad():
            without = layer(x, task_ids=IDS)
        assert torch.equal(layer(x, task_ids=IDS), without)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_starts_as_the_shared_lora_of_peft(self, mode, dtype):
        layer = make_layer(dtype=dtype)
        layer.poly_router["default"].reset()
        config = peft.LoraConfig(r=3, lora_alpha=5)
        lora = LoraLinear(layer.base_layer, "default", config=config, r=3, lora_alpha=5).to(dtype)
        lora.lora_A["default"].weight.data = layer.poly_lora_A["default"][0, 0].T.detach()
        lora.lora_B["default"].weight.data = layer.poly_lora_B["default"][0, 0].T.detach()
        x = torch.randn(4, 5, 8).to(dtype)
        torch.testing.assert_close(call(layer, x, mode, IDS), lora(x), rtol=DTYPES[dtype], atol=DTYPES[dtype])

    def test_an_adapter_starts_as_the_base_model_and_all_gates_at_one(self):
        base = MLP()
        model = peft.get_peft_model(copy.deepcopy(base), gates(init_weights=True)).eval()
        assert all((w == 1).all() for w in model.routing_weights().values())
        inputs = CASES["mlp"].inputs()
        assert torch.equal(model(**inputs, task_ids=[0, 1, 2]), base(**inputs))

    @pytest.mark.parametrize("case", CASES)
    def test_a_model_is_its_dense_merge_for_each_task(self, case):
        model = adapt(CASES[case].make(), gates(case))
        inputs = CASES[case].inputs()
        with torch.no_grad():
            mixed = first(model(**inputs, task_ids=[2, 0, 1]))
            for row, task in enumerate([2, 0, 1]):
                dense = first(naive_merge(model, task).get_base_model()(**inputs))
                torch.testing.assert_close(mixed[row], dense[row], rtol=1e-4, atol=1e-5)

    def test_an_id_out_of_range_is_an_error(self):
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            make_layer()(torch.randn(1, 8, dtype=torch.float64), task_ids=3)


class TestConfig:
    def test_what_is_not_given_is_filled_in(self):
        config = PolyConfig(poly_type="gates", task_names=TASKS)
        assert (config.n_skills, config.n_splits, config.n_tasks) == (1, 1, 3)

    @pytest.mark.parametrize("setting", ["n_skills", "n_splits"])
    @pytest.mark.parametrize("value", [2, 4, 8])
    def test_more_than_one_skill_or_split_is_an_error(self, setting, value):
        with pytest.raises(ValueError, match=rf"`{setting}` must be 1 with poly_type='gates'.*got {value}"):
            PolyConfig(poly_type="gates", **{setting: value})

    def test_a_temperature_is_an_error(self):
        with pytest.raises(ValueError, match=r"`router_temperature` has no meaning with poly_type='gates'.*got 0\.5"):
            PolyConfig(poly_type="gates", router_temperature=0.5)

    def test_settings_survive_saving_and_loading(self, tmp_path):
        model = adapt(MLP(), gates(n_tasks=None, task_names=TASKS))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        config = loaded.peft_config["default"]
        assert (config.poly_type, config.n_skills, config.n_splits, config.r) == ("gates", 1, 1, 3)
        assert config.task_names == TASKS
        for key, weights in model.routing_weights().items():
            assert torch.equal(loaded.routing_weights()[key], weights)

    def test_a_layer_shows_its_sizes_and_no_skills(self):
        assert repr(make_layer().poly_router["default"]) == "GateRouter(n_tasks=3, r=3)"


def updates(model, task):
    """Each layer's dense update for a task, in float64."""
    layers = [m for m in model.modules() if isinstance(m, PolyLayer)]
    return [torch.matmul(*naive_pair(layer, "default", task)) for layer in layers]


class TestLife:
    def test_a_mean_task_is_the_mean_of_the_updates(self):
        model = adapt(MLP(), gates()).double()
        model.add_tasks(1)
        for new, *known in zip(updates(model, 3), *(updates(model, task) for task in range(3)), strict=True):
            torch.testing.assert_close(new, sum(known) / 3)

    def test_a_weighted_task_is_the_weighted_mean_of_the_updates(self):
        model = adapt(MLP(), gates()).double()
        model.add_tasks(1, init={0: 1, 2: 3})
        for new, zero, two in zip(updates(model, 3), updates(model, 0), updates(model, 2), strict=True):
            torch.testing.assert_close(new, 0.25 * zero + 0.75 * two)

    def test_a_uniform_task_is_the_shared_lora(self):
        model = adapt(MLP(), gates()).double()
        model.add_tasks(1, init="uniform")
        layers = [m for m in model.modules() if isinstance(m, PolyLayer)]
        for new, layer in zip(updates(model, 3), layers, strict=True):
            torch.testing.assert_close(new, layer.poly_lora_A["default"][0, 0] @ layer.poly_lora_B["default"][0, 0])

    def test_tasks_join_leave_and_are_renamed(self):
        model = adapt(MLP(), gates(n_tasks=None, task_names=TASKS)).double()
        before = {name: updates(model, task) for task, name in enumerate(TASKS)}
        model.add_tasks(["cb"], init="sst2")
        model.rename_task("boolq", "qa")
        model.remove_tasks("rte")
        assert model.task_names == ["sst2", "qa", "cb"]
        for task, name in enumerate(["sst2", "boolq", "sst2"]):
            for now, then in zip(updates(model, task), before[name], strict=True):
                assert torch.equal(now, then)

    def test_the_router_alone_trains_the_gates(self):
        model = spread(peft.get_peft_model(MLP(), gates()))
        model.train_router_only()
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"module_logits"}
        model(**CASES["mlp"].inputs(), task_ids=[2, 0, 2]).square().sum().backward()
        for layer in (m for m in model.modules() if isinstance(m, PolyLayer)):
            grad = layer.poly_router["default"].module_logits.grad
            assert grad[[0, 2]].abs().sum(dim=1).min() > 0
            assert not grad[1].any()  # a task without rows
        model.train_all()
        assert all(p.requires_grad == ("poly_" in name) for name, p in model.named_parameters())

    @pytest.mark.parametrize("granularity", ["layer", "block", "model"])
    def test_the_average_is_the_mean_of_the_updates_for_every_task(self, granularity):
        model = adapt(llama(), gates("llama", router_granularity=granularity)).double()
        known = [updates(model, task) for task in range(3)]
        model.average_skills()
        for task in range(3):
            for now, *then in zip(updates(model, task), *known, strict=True):
                torch.testing.assert_close(now, sum(then) / 3)
        trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"poly_lora_A", "poly_lora_B"}

    def test_an_average_in_bf16_is_rounded_once(self):
        model = adapt(MLP(), gates()).bfloat16()
        layers = [m for m in model.modules() if isinstance(m, PolyLayer)]
        wanted = []
        for layer in layers:
            mean = layer.poly_router["default"].module_logits.float().add(1).mean(dim=0)
            wanted.append((mean[:, None] * layer.poly_lora_B["default"][0, 0].float()).bfloat16())
        model.average_skills()
        for layer, B in zip(layers, wanted, strict=True):
            assert torch.equal(layer.poly_lora_B["default"][0, 0], B)

    def test_an_averaged_adapter_survives_saving_and_is_exported(self, tmp_path):
        model, inputs = adapt(MLP(), gates()), CASES["mlp"].inputs()
        model.average_skills()
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "adapter").eval()
        export_lora(loaded, 1, tmp_path / "lora")
        lora = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "lora").eval()
        with torch.no_grad():
            wanted = model(**inputs, task_ids=0)
            assert torch.equal(loaded(**inputs, task_ids=2), wanted)
            torch.testing.assert_close(lora(**inputs), wanted)


class TestOut:
    @pytest.mark.parametrize("case", ["llama", "gpt2", "mlp"])
    def test_an_exported_task_is_a_lora_of_the_same_rank_with_equal_outputs(self, tmp_path, case):
        base, inputs = CASES[case].make(), CASES[case].inputs()
        model = adapt(copy.deepcopy(base), gates(case))
        export_lora(model, 2, tmp_path / "lora")
        lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        assert lora.peft_config["default"].r == 3
        with torch.no_grad():
            torch.testing.assert_close(first(lora(**inputs)), first(model(**inputs, task_ids=2)), rtol=1e-5, atol=1e-6)

    def test_a_merged_task_is_the_adapted_one(self):
        model, inputs = adapt(llama(), gates("llama")), CASES["llama"].inputs()
        with torch.no_grad():
            wanted = first(model(**inputs, task_ids=1))
            model.merge_adapter(task=1)
            torch.testing.assert_close(first(model(**inputs, task_ids=1)), wanted, rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()
            torch.testing.assert_close(first(model(**inputs, task_ids=1)), wanted, rtol=1e-4, atol=1e-5)
            merged = model.merge_and_unload(task=1)
            torch.testing.assert_close(first(merged(**inputs)), wanted, rtol=1e-4, atol=1e-5)

    def test_pefts_own_poly_cannot_have_it(self, tmp_path):
        adapt(MLP(), gates(lora_alpha=1)).save_pretrained(tmp_path / "a")
        with pytest.raises(ValueError, match=r"poly_type='gates'.*cannot express.*Export its tasks with `export_lora`"):
            convert_checkpoint(tmp_path / "a", tmp_path / "b", to="POLY")
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize("granularity", ["layer", "block", "model"])
    def test_a_checkpoint_can_be_written_anew_with_names(self, tmp_path, granularity):
        model = adapt(llama(), gates("llama", router_granularity=granularity))
        model.save_pretrained(tmp_path / "a")
        convert_checkpoint(tmp_path / "a", tmp_path / "b", task_names=TASKS)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "b").eval()
        inputs = CASES["llama"].inputs()
        with torch.no_grad():
            assert torch.equal(first(loaded(**inputs, task_ids="sst2")), first(model(**inputs, task_ids=1)))


class TestTogether:
    """Adapters of different kinds in one model."""

    def make(self):
        model = peft.get_peft_model(MLP(), poly("mlp", n_splits=2))
        model.add_adapter("gated", gates(n_tasks=2, r=5))
        return spread(model).eval().double()

    def test_each_computes_as_alone(self):
        model, x = self.make(), CASES["mlp"].inputs()["x"].double()
        for adapter, task in (("default", 2), ("gated", 1), ("default", 0)):
            model.set_adapter(adapter)
            got = model(x, task_ids=task)
            torch.testing.assert_close(got, naive_merge(model, task, (adapter,)).get_base_model()(x))

    @pytest.mark.parametrize("training", [True, False])
    def test_active_together_their_updates_add_up(self, training):
        model, x = self.make(), CASES["mlp"].inputs()["x"].double()
        model.base_model.set_adapter(["default", "gated"])
        wanted = naive_merge(model, 1, ("default", "gated")).get_base_model()(x)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(model(x, task_ids=1), wanted)


class TestFromLoras:
    def loras(self, root, base, case, ranks, **settings):
        for seed, (name, r) in enumerate(ranks.items()):
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                r=r, target_modules=CASES[case].target_modules, task_type=CASES[case].task_type,
                init_lora_weights=False, lora_alpha=3 + 4 * seed, **settings,
            )  # fmt: skip
            peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(root / name)
        return {name: root / name for name in ranks}

    @pytest.mark.parametrize("granularity", ["layer", "model"])
    @pytest.mark.parametrize("case", ["llama", "gpt2"])
    @pytest.mark.parametrize("ranks", [{"a": 4, "b": 4}, {"a": 2, "b": 5, "c": 1}], ids=str)
    def test_each_task_is_its_lora_without_approximation(self, tmp_path, case, ranks, granularity):
        base, inputs = CASES[case].make().double(), CASES[case].inputs()
        settings = {"fan_in_fan_out": True} if case == "gpt2" else {}
        loras = self.loras(tmp_path, base, case, ranks, **settings)
        model = from_loras(copy.deepcopy(base), loras, poly_type="gates", router_granularity=granularity).eval()
        config = model.peft_config["default"]
        assert (config.r, config.n_skills, config.task_names) == (sum(ranks.values()), 1, list(ranks))
        with torch.no_grad():
            for name, folder in loras.items():
                lora = PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
                got = first(model(**inputs, task_ids=name))
                torch.testing.assert_close(got, first(lora(**inputs)), rtol=1e-5, atol=1e-6)

    def test_a_task_added_to_them_is_the_mean_of_the_loras(self, tmp_path):
        model = from_loras(MLP(), self.loras(tmp_path, MLP(), "mlp", {"a": 2, "b": 3}), poly_type="gates").double()
        model.add_tasks(["both"])
        for both, a, b in zip(updates(model, 2), updates(model, 0), updates(model, 1), strict=True):
            torch.testing.assert_close(both, (a + b) / 2)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"own_weight": 0.9}, "`own_weight` has no meaning with poly_type='gates', got 0.9"),
            ({"n_splits": 2}, "`n_splits` must be 1 with poly_type='gates'"),
            ({"poly_type": "gate"}, r"`poly_type` must be one of \['gates', 'poly'\], got 'gate'"),
        ],
        ids=str,
    )
    def test_settings_without_meaning_are_refused_and_the_base_is_left_as_it_was(self, tmp_path, settings, message):
        base, loras = MLP(), self.loras(tmp_path, MLP(), "mlp", {"a": 2})
        with pytest.raises(ValueError, match=message):
            from_loras(base, loras, **{"poly_type": "gates", **settings})
        assert all(type(m) is not Linear for m in base.modules())

    def test_a_lora_with_several_ranks_is_refused(self, tmp_path):
        loras = self.loras(tmp_path, MLP(), "mlp", {"a": 2}, rank_pattern={"lin0": 4})
        with pytest.raises(ValueError, match=r"one rank in all layers, but that of task 'a' has \[2, 4\]"):
            from_loras(MLP(), loras, poly_type="gates")
