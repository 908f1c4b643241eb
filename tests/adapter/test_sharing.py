"""`router_granularity`: which layers share a router, that it is saved once, comes back shared, sums its gradients."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from peft_poly import PolyConfig, PolyLayer
from peft_poly.adapter.sharing import router_group

# Routers per granularity: t5 has 2 + 2 blocks, a bert block holds 6 linears and its pooler is outside of any block.
EXPECTED = {
    "t5": {"layer": 2 * 6 + 2 * 10, "block": 4, "model": 1},
    "llama": {"layer": 14, "block": 2, "model": 1},
    "gpt2": {"layer": 8, "block": 2, "model": 1},
    "bert": {"layer": 13, "block": 3, "model": 1},
    "mlp": {"layer": 2, "block": 2, "model": 1},
}
SHARED = ["block", "model"]


def adapted(case: str, granularity: str, make=None, **settings):
    case = tiny.CASES[case]
    torch.manual_seed(0)
    base = (make or case.make)()
    settings = {"task_type": case.task_type, "target_modules": case.target_modules, "n_tasks": 3, **settings}
    config = PolyConfig(r=2, n_splits=2, router_granularity=granularity, init_weights=False, **settings)
    model = peft.get_peft_model(base, config).eval()
    for router in routers(model).values():
        nn.init.normal_(router.module_logits)
    return model


def layers(model, adapter: str = "default") -> dict[str, PolyLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PolyLayer) and adapter in m.poly_router}


def routers(model, adapter: str = "default") -> dict[int, nn.Module]:
    return {id(layer.poly_router[adapter]): layer.poly_router[adapter] for layer in layers(model, adapter).values()}


def logits(model, case: str, tasks=(2, 0, 1)) -> torch.Tensor:
    with torch.no_grad():
        return tiny.first(model(**tiny.CASES[case].inputs(len(tasks)), task_ids=list(tasks)))


def reloaded(case: str, folder, **kwargs):
    torch.manual_seed(0)
    return PeftModel.from_pretrained(tiny.CASES[case].make(), folder, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        ("decoder.block.11.layer.2.DenseReluDense.wo", "decoder.block.11"),
        ("model.layers.0.mlp.experts.7.up_proj", "model.layers.0"),
        ("transformer.h.1.attn.c_attn", "transformer.h.1"),
        ("layers.1", "layers.1"),
        ("0.linear", "0"),
        ("2", "2"),
        ("lm_head", None),
        ("bert.pooler.dense", None),
        ("block1.fc2", None),
    ],
)
def test_a_layer_belongs_to_the_outermost_repeated_block_around_it(name, block):
    assert router_group("block", name) == block
    assert router_group("layer", name) is None
    assert router_group("model", name) == router_group("model", "elsewhere.5") is not None


@pytest.mark.parametrize("granularity", ["layer", *SHARED])
@pytest.mark.parametrize("case", tiny.CASES)
def test_there_are_as_many_routers_as_the_granularity_says(case, granularity):
    model = adapted(case, granularity)
    assert len(layers(model)) == EXPECTED[case]["layer"]
    assert len(routers(model)) == EXPECTED[case][granularity]
    counted = sum(p.numel() for name, p in model.named_parameters() if "module_logits" in name)
    assert counted == EXPECTED[case][granularity] * 3 * 2 * 4


def test_the_layers_of_a_block_share_and_those_of_two_blocks_do_not():
    by_name = {name: id(layer.poly_router["default"]) for name, layer in layers(adapted("llama", "block")).items()}
    blocks = [{router for name, router in by_name.items() if f".layers.{block}." in name} for block in (0, 1)]
    assert [len(block) for block in blocks] == [1, 1]
    assert blocks[0] != blocks[1]


@pytest.mark.parametrize("granularity", SHARED)
def test_a_shared_router_starts_as_any_other(granularity):
    model = peft.get_peft_model(tiny.llama(), PolyConfig(router_granularity=granularity, n_tasks=3))
    for router in routers(model).values():
        assert 0 < router.module_logits.abs().max() <= 1e-3


class TestSaving:
    @pytest.mark.parametrize("granularity", ["layer", *SHARED])
    @pytest.mark.parametrize("case", tiny.CASES)
    def test_the_file_holds_each_router_once(self, tmp_path, case, granularity):
        adapted(case, granularity).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum("module_logits" in key for key in saved) == EXPECTED[case][granularity]
        assert sum("poly_lora" in key for key in saved) == 2 * EXPECTED[case]["layer"]

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("granularity", SHARED)
    @pytest.mark.parametrize("case", tiny.CASES)
    def test_it_comes_back_shared_and_equal(self, tmp_path, case, granularity, low_cpu_mem_usage):
        model = adapted(case, granularity)
        model.save_pretrained(tmp_path)
        loaded = reloaded(case, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert len(routers(loaded)) == EXPECTED[case][granularity]
        assert not [name for name, p in loaded.named_parameters() if p.is_meta]
        torch.testing.assert_close(logits(loaded, case), logits(model, case))

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_loaded_router_still_acts_on_all_its_layers(self, tmp_path, low_cpu_mem_usage):
        adapted("llama", "model").save_pretrained(tmp_path)
        loaded = reloaded("llama", tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        parameters = {id(layer.poly_router["default"].module_logits) for layer in layers(loaded).values()}
        assert len(parameters) == 1

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_further_adapter_is_loaded_shared_beside_one_that_is_not(self, tmp_path, low_cpu_mem_usage):
        adapted("llama", "block").save_pretrained(tmp_path)
        model = adapted("llama", "layer")
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert (len(routers(model)), len(routers(model, "other"))) == (14, 2)
        model.set_adapter("other")
        torch.testing.assert_close(logits(model, "llama"), logits(reloaded("llama", tmp_path), "llama"))

    def test_a_file_that_holds_a_copy_for_each_layer_is_read_too(self, tmp_path):
        model = adapted("llama", "block")
        model.save_pretrained(tmp_path)
        file, prefix = tmp_path / "adapter_model.safetensors", "base_model.model."
        saved = load_file(file)
        for name, layer in layers(model).items():
            saved[f"{prefix}{name.removeprefix(prefix)}.poly_router.module_logits"] = (
                layer.poly_router["default"].module_logits.detach().clone()
            )
        assert sum("module_logits" in key for key in saved) == 14
        save_file(saved, file, metadata={"format": "pt"})
        torch.testing.assert_close(logits(reloaded("llama", tmp_path), "llama"), logits(model, "llama"))


class TestGradients:
    @pytest.mark.parametrize("granularity", SHARED)
    @pytest.mark.parametrize("case", tiny.CASES)
    def test_the_gradient_of_a_shared_router_is_the_sum_over_its_layers(self, case, granularity):
        shared, single = adapted(case, granularity), adapted(case, "layer")
        state = shared.state_dict()  # holds the shared logits under the name of every layer
        single.load_state_dict(state)
        inputs = tiny.CASES[case].inputs(3)
        for model in (shared, single):
            tiny.first(model(**inputs, task_ids=[2, 0, 2])).logsumexp(dim=-1).sum().backward()
        sums: dict[int, torch.Tensor] = {}
        for name, layer in layers(single).items():
            router = id(layers(shared)[name].poly_router["default"])
            sums[router] = sums.get(router, 0) + layer.poly_router["default"].module_logits.grad
        for key, router in routers(shared).items():
            assert router.module_logits.grad.abs().sum() > 0
            torch.testing.assert_close(router.module_logits.grad, sums[key], rtol=1e-4, atol=1e-5)

    def test_a_step_of_the_optimizer_moves_it_once(self):
        model = adapted("llama", "model")
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert sum(p is next(iter(routers(model).values())).module_logits for p in parameters) == 1


@pytest.mark.parametrize("granularity", SHARED)
class TestCopies:
    def test_a_copy_shares_among_its_own_layers_only(self, granularity):
        model = adapted("llama", granularity)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(routers(other)) == EXPECTED["llama"][granularity]
            assert not {id(r.module_logits) for r in routers(other).values()} & {
                id(r.module_logits) for r in routers(model).values()
            }
            assert torch.equal(logits(other, "llama"), logits(model, "llama"))

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_it_is_shared_on_a_half_precision_base(self, granularity, autocast_adapter_dtype):
        case, base = tiny.CASES["llama"], tiny.llama().to(torch.bfloat16)
        config = PolyConfig(router_granularity=granularity, target_modules=case.target_modules, n_tasks=3)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
        assert (
            len({id(layer.poly_router["default"].module_logits) for layer in layers(model).values()})
            == (EXPECTED["llama"][granularity])
        )
        dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
        assert {p.dtype for name, p in model.named_parameters() if "poly_" in name} == {dtype}
        assert logits(model, "llama").isfinite().all()

    def test_an_injected_adapter_shares_too(self, granularity):
        settings = {"target_modules": tiny.CASES["llama"].target_modules, "router_granularity": granularity}
        model = peft.inject_adapter_in_model(PolyConfig(**settings), tiny.llama())
        assert len(routers(model)) == EXPECTED["llama"][granularity]

    def test_deleting_one_adapter_leaves_the_routers_of_another(self, granularity):
        model = adapted("llama", granularity)
        expected = logits(model, "llama")
        model.add_adapter("other", PolyConfig(router_granularity="model", target_modules=["q_proj"], n_tasks=3))
        model.delete_adapter("other")
        assert len(routers(model)) == EXPECTED["llama"][granularity]
        assert torch.equal(logits(model, "llama"), expected)


def test_blocks_that_are_not_adapted_have_no_router():
    model = adapted("llama", "block", layers_to_transform=[1])
    assert len(layers(model)) == 7
    assert len(routers(model)) == 1
