"""The numbers of a routing, against cases computed by hand, naive loops, torch.distributions and scipy; and reading it
from models and from saved adapters of this package and of PEFT's own Poly."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from adapters import adapt, poly, spread
from safetensors.torch import load_file, save_file
from scipy.cluster import hierarchy
from scipy.spatial import distance
from tiny import MLP, TASKS, llama, t5

import peft_poly
from peft_poly.insight import analysis
from peft_poly.insight.analysis import Routing, read_routing

EVEN = [0.5, 0.5]


def routing_of(*layers, names=None):
    """A routing from nested lists of probabilities, one `(t, h, k)` per layer."""
    p = {f"layer{i}": torch.tensor(layer, dtype=torch.float32) for i, layer in enumerate(layers)}
    w = {key: value / value.sum(dim=-1, keepdim=True) for key, value in p.items()}
    n_tasks = len(next(iter(p.values())))
    return Routing(tuple(names or map(str, range(n_tasks))), w, p)


def random_routing(n_tasks=5, n_splits=2, n_skills=4, n_layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return routing_of(*torch.rand(n_layers, n_tasks, n_splits, n_skills, generator=generator).tolist())


def gates_of(*layers, names=None):
    """A routing from nested lists of gates, one `(t, r)` per layer."""
    gates = {f"layer{i}": torch.tensor(layer, dtype=torch.float32).unsqueeze(1) for i, layer in enumerate(layers)}
    names = list(names or map(str, range(len(layers[0]))))
    config = peft_poly.PolyConfig(poly_type="gates", r=len(layers[0][0]), task_names=names)
    return Routing(tuple(names), gates, {}, config)


def random_gates(n_tasks=5, r=6, n_layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return gates_of(*(1 + torch.randn(n_layers, n_tasks, r, generator=generator)).tolist())


def entropy(shares):
    return -sum(share * math.log(share) for share in shares if share > 0)


class TestMetrics:
    def test_a_task_that_takes_one_skill_is_decided(self):
        metrics = analysis.layer_metrics(routing_of([[[1.0, 0.0]], [[0.0, 1.0]]]))["layer0"]
        assert metrics == analysis.Metrics(discreteness=0, sparsity=0.5, usage=1, effective_skills=1)

    def test_an_untrained_router_is_undecided(self):
        metrics = analysis.layer_metrics(routing_of([[EVEN], [EVEN], [EVEN]]))["layer0"]
        assert metrics.discreteness == pytest.approx(1)
        assert metrics.sparsity == 0
        assert metrics.usage == pytest.approx(1)
        assert metrics.effective_skills == pytest.approx(2)

    def test_a_case_by_hand(self):
        metrics = analysis.mean_metrics(routing_of([[[0.9, 0.1]], [[0.6, 0.2]]]))
        binary = [entropy([p, 1 - p]) for p in (0.9, 0.1, 0.6, 0.2)]
        assert metrics.discreteness == pytest.approx(sum(binary) / 4 / math.log(2), rel=1e-6)
        assert metrics.sparsity == 0.5
        assert metrics.usage == pytest.approx(entropy([1.5 / 1.8, 0.3 / 1.8]) / math.log(2), rel=1e-6)
        effective = (math.exp(entropy([0.9, 0.1])) + math.exp(entropy([0.75, 0.25]))) / 2
        assert metrics.effective_skills == pytest.approx(effective, rel=1e-6)

    def test_one_skill_is_used_fully(self):
        metrics = analysis.mean_metrics(routing_of([[[0.5]], [[0.5]]]))
        assert (metrics.usage, metrics.effective_skills) == (1, 1)

    def test_usage_is_the_mean_over_splits(self):
        one_skill_then_both = [[[1.0, 0.0], [0.5, 0.5]]]
        assert analysis.mean_metrics(routing_of(one_skill_then_both)).usage == pytest.approx(0.5)

    def test_the_mean_is_over_the_layers(self):
        decided, undecided = [[[1.0, 0.0]]], [[EVEN]]
        metrics = analysis.mean_metrics(routing_of(decided, undecided))
        assert metrics.discreteness == pytest.approx(0.5)
        assert metrics.effective_skills == pytest.approx(1.5)

    @pytest.mark.parametrize("seed", range(3))
    def test_with_one_split_they_are_what_the_papers_code_logs(self, seed):
        p = torch.rand(7, 1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        metrics = analysis.mean_metrics(routing_of(p.tolist()))
        bernoulli = torch.distributions.Bernoulli(probs=p)
        usage = torch.distributions.Categorical(probs=p[:, 0].mean(0)).entropy() / math.log(6)
        assert metrics.discreteness == pytest.approx(bernoulli.entropy().mean().item() / math.log(2), rel=1e-5)
        assert metrics.sparsity == pytest.approx((p > 0.5).double().mean().item())
        assert metrics.usage == pytest.approx(usage.item(), rel=1e-5)

    def test_the_effective_number_of_skills_of_each_task(self):
        routing = routing_of([[[1.0, 0.0, 0.0]], [[0.4, 0.4, 0.0]], [[0.3, 0.3, 0.3]]])
        assert analysis.effective_skills(routing).tolist() == pytest.approx([1, 2, 3])

    def test_probabilities_that_have_all_underflowed_are_no_error(self):
        zero = torch.zeros(2, 1, 3)
        routing = Routing(("a", "b"), {"layer0": zero}, {"layer0": zero})
        assert analysis.mean_metrics(routing).usage == 0
        assert torch.isfinite(analysis.task_similarity(routing)).all()


class TestGateMetrics:
    def test_gates_of_one_are_the_shared_lora(self):
        metrics = analysis.layer_metrics(gates_of([[1.0, 1.0], [1.0, 1.0]]))["layer0"]
        assert metrics == analysis.GateMetrics(distance=0, between=0, negative=0, effective_ranks=pytest.approx(2))

    def test_tasks_that_move_together_are_not_told_apart(self):
        metrics = analysis.mean_metrics(gates_of([[3.0, 1.0], [3.0, 1.0]]))
        assert (metrics.distance, metrics.between) == (pytest.approx(math.sqrt(2)), 0)

    def test_tasks_that_move_in_opposite_ways_have_nothing_in_common(self):
        metrics = analysis.mean_metrics(gates_of([[3.0, 1.0], [-1.0, 1.0]]))
        assert (metrics.distance, metrics.between, metrics.negative) == (pytest.approx(math.sqrt(2)), 1, 0.25)

    @pytest.mark.parametrize("seed", range(3))
    def test_each_is_what_a_loop_says(self, seed):
        routing = random_gates(n_tasks=4, r=3, seed=seed)
        for layer, metrics in analysis.layer_metrics(routing).items():
            gates = routing.weights[layer][:, 0].tolist()
            square = sum((g - 1) ** 2 for row in gates for g in row) / 12
            mean = [sum(row[rank] for row in gates) / 4 for rank in range(3)]
            own = sum((row[rank] - mean[rank]) ** 2 for row in gates for rank in range(3)) / 12
            shares = [[g**2 / sum(other**2 for other in row) for g in row] for row in gates]
            assert metrics.distance == pytest.approx(math.sqrt(square), rel=1e-6)
            assert metrics.between == pytest.approx(own / square, rel=1e-5)
            assert metrics.negative == sum(g < 0 for row in gates for g in row) / 12
            assert metrics.effective_ranks == pytest.approx(sum(math.exp(entropy(row)) for row in shares) / 4, rel=1e-6)

    def test_a_task_uses_the_ranks_whose_gates_are_not_zero(self):
        routing = gates_of([[2.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
        assert analysis.effective_skills(routing).tolist() == pytest.approx([1, 2, 1])

    def test_the_top_ranks_are_those_furthest_from_one(self):
        routing = gates_of([[1.1, -0.5, 2.0], [1.0, 1.0, 1.0]])
        assert [rank for rank, _ in analysis.top_skills(routing, 0)] == [1, 2, 0]
        assert analysis.top_skills(routing, 0, n=1)[0][1] == pytest.approx(-0.5)

    def test_the_cosine_of_gates_may_be_negative(self):
        routing = gates_of([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        assert analysis.task_similarity(routing).tolist() == [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
        assert analysis.nearest_tasks(routing, 1, n=2) == [("2", 0), ("0", -1)]
        assert analysis.task_linkage(routing)[0, 2] == pytest.approx(1)

    @pytest.mark.parametrize("granularity", ["layer", "block", "model"])
    def test_what_is_read_is_what_the_model_computes_with(self, tmp_path, granularity):
        model = adapt(llama(), poly("llama", poly_type="gates", r=3, router_granularity=granularity))
        model.save_pretrained(tmp_path)
        routing, expected = read_routing(model), model.routing_weights()
        assert routing.shape == (3, 1, 3)
        assert not routing.probabilities
        for layer, router in routing.weights.items():
            key = next(key for key in expected if key.startswith(layer) or granularity == "model")
            torch.testing.assert_close(router, expected[key])
        same(read_routing(tmp_path), routing)


class TestMatrix:
    @pytest.mark.parametrize("layer", [None, "layer1"])
    @pytest.mark.parametrize("split", [None, 1])
    def test_it_is_the_mean_of_the_weights(self, layer, split):
        routing = random_routing()
        layers = routing.layers if layer is None else [layer]
        splits = range(2) if split is None else [split]
        matrix = analysis.task_skill_matrix(routing, layer, split)
        for task in range(5):
            for skill in range(4):
                cells = [routing.weights[key][task, q, skill].item() for key in layers for q in splits]
                assert matrix[task, skill].item() == pytest.approx(sum(cells) / len(cells))
        assert matrix.sum(dim=1).tolist() == pytest.approx([1] * 5)

    def test_an_unknown_layer_is_refused_and_the_known_are_named(self):
        with pytest.raises(ValueError, match=r"no layer 'layer9'.*layer0, layer1, layer2"):
            analysis.task_skill_matrix(random_routing(), "layer9")

    @pytest.mark.parametrize("split", [-1, 2])
    def test_a_split_out_of_range_is_refused(self, split):
        with pytest.raises(ValueError, match=rf"`split` must lie in \[0, 1\], got {split}"):
            analysis.task_skill_matrix(random_routing(), split=split)

    def test_the_top_skills_come_heaviest_first(self):
        routing = routing_of([[[0.1, 0.4, 0.5]], [[0.6, 0.2, 0.2]]], names=["a", "b"])
        assert [skill for skill, _ in analysis.top_skills(routing, "a", n=2)] == [2, 1]
        assert analysis.top_skills(routing, "b", n=1)[0] == (0, pytest.approx(0.6))


class TestSimilarity:
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_the_cosine_of_all_mixing_weights(self, seed):
        routing = random_routing(seed=seed)
        rows = torch.cat([w.double().flatten(1) for w in routing.weights.values()], dim=1)
        similarity = analysis.task_similarity(routing)
        for a in range(5):
            for b in range(5):
                assert similarity[a, b].item() == pytest.approx(1 - distance.cosine(rows[a], rows[b]), abs=1e-12)

    def test_tasks_without_a_common_skill_are_unlike(self):
        similarity = analysis.task_similarity(routing_of([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]]))
        assert similarity.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]

    @pytest.mark.parametrize("method", ["average", "single", "complete"])
    def test_the_tree_is_scipys(self, method):
        routing = random_routing(n_tasks=8)
        rows = torch.cat([w.double().flatten(1) for w in routing.weights.values()], dim=1).numpy()
        expected = hierarchy.linkage(distance.pdist(rows, "cosine"), method)
        ours = analysis.task_linkage(routing, method)
        assert ours[:, 2] == pytest.approx(expected[:, 2])
        assert hierarchy.cophenet(ours) == pytest.approx(hierarchy.cophenet(expected))

    def test_like_tasks_are_neighbours_in_the_order_of_the_tree(self):
        order = analysis.task_order(routing_of([[[0.9, 0.1]], [[0.1, 0.9]], [[0.9, 0.2]], [[0.2, 0.9]]]))
        assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}

    def test_one_task_has_an_order_but_no_tree(self):
        routing = routing_of([[EVEN]])
        assert analysis.task_order(routing) == [0]
        with pytest.raises(ValueError, match="at least two"):
            analysis.task_linkage(routing)

    def test_the_nearest_tasks_come_first_and_without_the_task_itself(self):
        routing = routing_of([[[1.0, 0.0]], [[0.0, 1.0]], [[0.9, 0.1]]], names=["a", "b", "c"])
        near = analysis.nearest_tasks(routing, "a")
        assert [name for name, _ in near] == ["c", "b"]
        assert near[0][1] == pytest.approx(0.9 / math.hypot(0.9, 0.1))

    def test_a_task_is_found_by_name_id_or_id_as_text(self):
        routing = routing_of([[EVEN], [EVEN]], names=["rte", "sst2"])
        assert [routing.task_id(task) for task in ("sst2", 1, "1")] == [1, 1, 1]
        with pytest.raises(ValueError, match="Did you mean 'sst2'"):
            routing.task_id("sst")
        with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
            routing.task_id("2")

    def test_a_name_that_looks_like_an_id_is_a_name(self):
        assert routing_of([[EVEN], [EVEN]], names=["1", "0"]).task_id("1") == 0


def model_with_tasks(case="llama", base=llama, **settings):
    return adapt(base(), poly(case, n_tasks=None, task_names=TASKS, **{"n_splits": 2, **settings}))


def same(ours, theirs):
    assert set(ours.layers) == set(theirs.layers)
    assert ours.task_names == theirs.task_names
    for layer in ours.layers:
        torch.testing.assert_close(ours.weights[layer], theirs.weights[layer], rtol=0, atol=0)
    assert ours.probabilities.keys() == theirs.probabilities.keys()
    for layer, p in theirs.probabilities.items():
        torch.testing.assert_close(ours.probabilities[layer], p, rtol=0, atol=0)


class TestReading:
    def test_a_models_weights_are_those_that_it_mixes_with(self):
        model = model_with_tasks()
        routing, expected = read_routing(model), model.routing_weights()
        assert routing.layers == list(expected)
        assert routing.shape == (3, 2, 4)
        assert routing.config.task_names == TASKS
        for layer, weights in expected.items():
            torch.testing.assert_close(routing.weights[layer], weights)
            logits = model.get_submodule(f"base_model.model.{layer}").poly_router["default"].module_logits
            torch.testing.assert_close(routing.probabilities[layer].flatten(1), torch.sigmoid(logits))

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_saved_adapter_needs_no_model(self, tmp_path, safe):
        model = model_with_tasks()
        if safe:
            model.save_pretrained(tmp_path)
        else:
            model.peft_config["default"].save_pretrained(tmp_path)
            torch.save(peft.get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
        same(read_routing(tmp_path), read_routing(model))

    @pytest.mark.parametrize(
        ("granularity", "layers"),
        [("block", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
         ("model", ["all layers"])],
    )  # fmt: skip
    def test_a_shared_router_appears_once(self, tmp_path, granularity, layers):
        model = model_with_tasks("t5", t5, router_granularity=granularity)
        model.save_pretrained(tmp_path)
        assert read_routing(model).layers == layers
        same(read_routing(tmp_path), read_routing(model))

    def test_an_adapter_of_pefts_own_poly_is_read_too(self, tmp_path):
        config = peft.PolyConfig(target_modules=["lin0"], n_tasks=2, n_skills=3, n_splits=2, r=2)
        model = spread(peft.get_peft_model(MLP(), config))
        model.save_pretrained(tmp_path)
        routing = read_routing(tmp_path)
        router = model.base_model.model.lin0.poly_router["default"].eval()
        assert routing.task_names == ("0", "1")
        torch.testing.assert_close(routing.weights["lin0"], router(torch.arange(2), None).detach())

    def test_block_ten_comes_behind_block_nine(self, tmp_path):
        base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)))
        model = peft.get_peft_model(base, peft_poly.PolyConfig(target_modules="all-linear", n_tasks=2))
        model.save_pretrained(tmp_path)
        assert read_routing(tmp_path).layers == [str(layer) for layer in range(12)]

    def test_it_follows_the_verbs_that_change_the_tasks(self):
        model = model_with_tasks()
        model.add_tasks(["cb"], init="rte")
        routing = read_routing(model)
        assert routing.task_names == (*TASKS, "cb")
        assert analysis.nearest_tasks(routing, "cb", n=1)[0] == ("rte", pytest.approx(1))
        model.average_skills()
        assert read_routing(model).shape == (4, 2, 1)
        assert routing.shape == (4, 2, 4)
        assert routing.config.n_tasks == 4

    def test_one_of_several_adapters_is_read(self):
        model = model_with_tasks()
        model.add_adapter("other", poly("llama", n_tasks=2))
        assert read_routing(model).shape[0] == 3
        assert read_routing(model, "other").shape[0] == 2
        with pytest.raises(ValueError, match=r"no task-routed adapter 'third'.*default.*other"):
            read_routing(model, "third")

    def test_an_injected_adapter_is_read(self):
        config = peft_poly.PolyConfig(target_modules=["lin0"], task_names=["a", "b"])
        model = peft.inject_adapter_in_model(config, MLP())
        assert read_routing(model).layers == ["lin0"]

    def test_a_model_without_an_adapter_is_refused(self):
        with pytest.raises(ValueError, match="MLP has no task-routed layer"):
            read_routing(MLP())

    def test_reading_changes_nothing_in_the_model(self):
        model = model_with_tasks().train()
        routing = read_routing(model)
        routing.weights[routing.layers[0]].zero_()
        assert model.base_model.model.model.layers[0].self_attn.q_proj.poly_router["default"].training
        assert all(weights.sum() > 0 for weights in model.routing_weights().values())


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        model_with_tasks().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.mark.parametrize("source", ["nowhere", "nobody/nothing", "/no/such/folder"])
    def test_what_is_not_there_is_named(self, source):
        with pytest.raises(FileNotFoundError, match=f"'{source}' is no folder"):
            read_routing(source)

    def test_a_folder_that_holds_adapters_in_subfolders_names_them(self, folder):
        with pytest.raises(FileNotFoundError, match=r"no adapter_config.json in .*folder\(s\) adapter hold one"):
            read_routing(folder.parent)
        assert read_routing(folder.parent, subfolder="adapter").shape == (3, 2, 4)

    def test_a_folder_without_weights_is_refused(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors or adapter_model.bin"):
            read_routing(folder)

    def test_another_kind_of_adapter_is_refused(self, tmp_path):
        peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a LORA adapter, which has no router"):
            read_routing(tmp_path)

    @pytest.mark.parametrize("text", ["{", "{}", '{"peft_type": "NEW"}'])
    def test_a_config_that_cannot_be_read_is_refused(self, folder, text):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config.json of .* cannot be read"):
            read_routing(folder)

    def test_a_broken_file_is_refused(self, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=r"adapter_model.safetensors of .* cannot be read"):
            read_routing(folder)

    def test_weights_without_a_router_are_refused(self, folder):
        save_file({"lora_A": torch.zeros(2)}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="it holds no router"):
            read_routing(folder)

    def test_a_router_that_does_not_fit_the_config_is_refused(self, folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"n_splits": 1}))
        with pytest.raises(ValueError, match=r"shape \(3, 8\).*asks for \(3, 4\)"):
            read_routing(folder)

    def test_a_router_with_nan_is_refused(self, folder):
        path = folder / "adapter_model.safetensors"
        tensors = {key: torch.full_like(value, torch.nan) for key, value in load_file(path).items()}
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"The router of .*_proj in .* holds NaN"):
            read_routing(folder)
