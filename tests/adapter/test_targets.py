"""Which layers are adapted: LoRA's selection, a refusal for each layer that cannot be, and a model left as it was."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny
import torch
import transformers as tf
from torch import nn

from peft_poly import PolyConfig, PolyLayer
from peft_poly.adapter.targets import check_target


class Attending(nn.Module):
    """`(b, l, 8) -> (b, l, 8)` with `torch.nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.fc(x), x, x)[0]


class Encoding(nn.Module):
    """`(b, l, 8) -> (b, l, 8)` with `torch.nn.TransformerEncoderLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.fc(x))


class Mixed(nn.Module):
    """Layers of many kinds, two linear ones before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.fc1 = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.fc2 = nn.Linear(16, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.conv(self.norm(self.fc1(self.embedding(ids))).transpose(1, 2)).transpose(1, 2))


def mamba() -> nn.Module:
    config = tf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False)
    return tf.MambaForCausalLM(config)


def sharded() -> nn.Module:
    model = Mixed()
    model.fc2._hf_tp_plan = "rowwise"
    return model


class Fp8Linear(nn.Linear):
    """As some quantisations have it: a linear layer whose weight is not the matrix, but a part of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class PackedLinear(nn.Linear):
    """A linear layer without a weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


def fp8() -> nn.Module:
    model = Mixed()
    model.fc2.__class__ = Fp8Linear
    model.fc2.weight = nn.Parameter(model.fc2.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def packed() -> nn.Module:
    model = Mixed()
    model.fc2.__class__ = PackedLinear
    model.fc2.register_buffer("packed", model.fc2.weight.data)
    del model.fc2.weight
    return model


NOT_LINEAR = (
    "^Target module {} is not supported: it is of type {}. Supported are `torch.nn.Linear`, .* leave it out with"
)
# model, targets (the last of which cannot be adapted), settings, error, message
REFUSALS = {
    "embedding": (Mixed, ["fc1", "embedding"], {}, TypeError, NOT_LINEAR.format("embedding", "Embedding")),
    "convolution": (Mixed, ["fc1", "conv"], {}, TypeError, NOT_LINEAR.format("conv", "Conv1d")),
    "norm": (Mixed, ["fc1", "norm"], {}, TypeError, NOT_LINEAR.format("norm", "LayerNorm")),
    "block": (tiny.llama, ["q_proj", "mlp"], {}, TypeError, NOT_LINEAR.format("model.layers.0.mlp", "LlamaMLP")),
    "splits": (
        Mixed, ["fc1", "fc2"], {"n_splits": 4}, ValueError,
        "^n_splits=4 does not divide the 6 out-features of fc2. Choose a divisor of both 16 and 6, or leave the",
    ),
    "splits-deep": (
        tiny.llama, ["q_proj", "down_proj"], {"n_splits": 3}, ValueError,
        r"^n_splits=3 does not divide the 16 in-features of model\.layers\.0\.self_attn\.q_proj\. Choose a divisor",
    ),
    "attention": (
        Attending, ["fc", "out_proj"], {}, TypeError,
        r"^Target module attention\.out_proj is not supported: `torch.nn.MultiheadAttention` reads its weight and",
    ),
    "fast-path": (
        Encoding, ["fc", "linear1"], {}, TypeError,
        r"^Target module encoder\.linear1 is not supported: in eval mode the fast path .*set_fastpath_enabled\(False\)",
    ),
    "mamba": (
        mamba, ["in_proj", "out_proj"], {}, ValueError,
        "^'out_proj' cannot be adapted in a mamba model: its fused kernel reads the weight and never calls the layer",
    ),
    "tensor-parallel": (
        sharded, ["fc1", "fc2"], {}, TypeError,
        "^Target module fc2 is not supported: it is sharded by tensor parallelism. Load the base model without",
    ),
    "unknown-quantisation": (
        fp8, ["fc1", "fc2"], {}, TypeError,
        r"^Target module fc2 is not supported: it is a quantised Fp8Linear, its weight is a Parameter of "
        r"torch\.float8_e4m3fn, and PEFT has no backend for that\. Load the base model unquantised, or .*bitsandbytes",
    ),
    "packed": (
        packed, ["fc1", "fc2"], {}, TypeError,
        "^Target module fc2 is not supported: it is a quantised PackedLinear, its weight is packed into other tensors",
    ),
    "nothing": (Mixed, ["fc9"], {}, ValueError, "Target modules .*fc9.* not found in the base model"),
}  # fmt: skip
refusals = pytest.mark.parametrize(("make", "targets", "settings", "error", "message"), REFUSALS.values(), ids=REFUSALS)


def inputs_of(model: nn.Module) -> torch.Tensor:
    if isinstance(model, (Attending, Encoding)):
        return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    return torch.randint(3, 11, (3, 4), generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> dict:
    """All that an injection may touch: modules, their classes and modes, parameters, trainability, hooks, configs."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": {name: (id(p), p.requires_grad, p.tolist()) for name, p in model.named_parameters()},
        "hooks": [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "configs": sorted(getattr(model, "peft_config", {})),
    }


class TestRefusals:
    @refusals
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_a_layer_that_cannot_be_adapted_is_named_and_the_model_left_as_it_was(
        self, make, targets, settings, error, message, training
    ):
        model = make().train(training)
        model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
        before, config = snapshot(model), PolyConfig(target_modules=targets, n_tasks=2, **settings)
        with pytest.raises(error, match=message):
            peft.get_peft_model(model, config)
        assert snapshot(model) == before

    @refusals
    def test_the_model_can_still_be_used_and_adapted(self, make, targets, settings, error, message):
        torch.manual_seed(0)
        model = make().eval()
        twin, x = copy.deepcopy(model), inputs_of(model)
        expected = tiny.first(model(x))
        with pytest.raises(error, match=message):
            peft.get_peft_model(model, PolyConfig(target_modules=targets, **settings))
        assert torch.equal(tiny.first(model(x)), expected)
        good, outputs = [name for name in targets if name != "fc9"][:1] or ["fc1"], []
        for base in (model, twin):
            torch.manual_seed(1)
            adapted = peft.get_peft_model(base, PolyConfig(target_modules=good, n_tasks=2, init_weights=False)).eval()
            outputs.append(tiny.first(adapted(x, task_ids=1)))
        assert torch.equal(*outputs)
        assert not torch.allclose(outputs[0], expected)

    @refusals
    @pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
    @pytest.mark.parametrize("granularity", ["layer", "model"])
    def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(
        self, make, targets, settings, error, message, frozen, granularity
    ):
        good = [name for name in targets if name != "fc9"][:1] or ["fc1"]
        model = peft.get_peft_model(make(), PolyConfig(target_modules=good, n_tasks=2, init_weights=False)).eval()
        if frozen:
            model.requires_grad_(False)
        before, expected = snapshot(model), tiny.first(model(x := inputs_of(model.get_base_model()), task_ids=1))
        bad = PolyConfig(target_modules=targets, n_tasks=5, router_granularity=granularity, **settings)
        with pytest.raises(error, match=message):
            model.add_adapter("other", bad)
        assert snapshot(model) == before
        assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
        assert model.targeted_module_names == [n for n in model.targeted_module_names if n.endswith(good[0])]
        assert torch.equal(tiny.first(model(x, task_ids=1)), expected)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            model(x, task_ids=4)

    @refusals
    def test_its_name_is_free_afterwards(self, make, targets, settings, error, message):
        good = [name for name in targets if name != "fc9"][:1] or ["fc1"]
        config = PolyConfig(target_modules=good, n_tasks=2, init_weights=False)
        model = peft.get_peft_model(make(), config).eval()
        with pytest.raises(error, match=message):
            model.add_adapter("other", PolyConfig(target_modules=targets, **settings))
        model.add_adapter("other", PolyConfig(target_modules=good, n_tasks=5, init_weights=False))
        model.set_adapter("other")
        assert tiny.first(model(inputs_of(model.get_base_model()), task_ids=4)).isfinite().all()

    @refusals
    def test_injection_without_a_peft_model_is_undone_too(self, make, targets, settings, error, message):
        good = [name for name in targets if name != "fc9"][:1] or ["fc1"]
        model = peft.inject_adapter_in_model(PolyConfig(target_modules=good), make().eval())
        before, expected = snapshot(model), tiny.first(model(x := inputs_of(model)))
        with pytest.raises(error, match=message):
            peft.inject_adapter_in_model(PolyConfig(target_modules=targets, **settings), model, "other")
        assert snapshot(model) == before
        assert torch.equal(tiny.first(model(x)), expected)

    def test_the_adapters_that_are_active_together_stay_so(self):
        model = peft.get_peft_model(Mixed(), PolyConfig(target_modules=["fc1"])).eval()
        model.add_adapter("other", PolyConfig(target_modules=["fc1", "fc2"]))
        model.base_model.set_adapter(["default", "other"])
        before = snapshot(model)
        with pytest.raises(ValueError, match="does not divide the 6 out-features of fc2"):
            model.add_adapter("third", PolyConfig(target_modules=["fc1", "fc2"], n_splits=4))
        assert snapshot(model) == before
        assert all(m.active_adapters == ["default", "other"] for m in model.modules() if isinstance(m, PolyLayer))


class TestBypassedLayers:
    @pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"])
    @pytest.mark.parametrize("target", ["out_proj", "conv1d"])
    def test_each_mamba_refuses_what_its_kernel_reads(self, model_type, target):
        model = nn.Sequential()
        model.mixer = nn.ModuleDict({target: nn.Linear(4, 4)})
        model.config = tf.PretrainedConfig()
        model.config.model_type = model_type
        with pytest.raises(
            ValueError, match=rf"'{target}' cannot be adapted in a {model_type} .*Remove \['conv1d', 'out"
        ):
            peft.get_peft_model(model, PolyConfig(target_modules=[target]))

    def test_the_layers_that_mamba_calls_can_be_adapted(self):
        model = peft.get_peft_model(
            mamba().eval(), PolyConfig(target_modules=["in_proj", "x_proj"], n_tasks=2, init_weights=False)
        ).eval()
        x = inputs_of(model.get_base_model())
        expected = tiny.first(tiny.naive_merge(model.get_base_model(), 1)(x))
        torch.testing.assert_close(tiny.first(model(x, task_ids=1)), expected, rtol=1e-4, atol=1e-5)

    def test_an_output_projection_of_another_architecture_can_be_adapted(self):
        model = nn.Sequential()
        model.out_proj = nn.Linear(4, 4)
        assert peft.get_peft_model(model, PolyConfig(target_modules=["out_proj"])).targeted_module_names == ["out_proj"]

    def test_without_the_fast_path_an_encoder_layer_can_be_adapted_and_the_adapter_acts(self):
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            config = PolyConfig(target_modules=["linear1", "linear2"], n_tasks=2, init_weights=False)
            model = peft.get_peft_model(Encoding().eval(), config).eval()
            x = inputs_of(model.get_base_model())
            with torch.no_grad():
                out, merged = model(x, task_ids=1), tiny.naive_merge(model.get_base_model(), 1)
                torch.testing.assert_close(out, merged(x), rtol=1e-4, atol=1e-5)
                with model.disable_adapter():
                    assert not torch.allclose(out, model(x), atol=1e-3)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    def test_a_layer_that_another_tuner_has_wrapped_is_judged_by_what_is_inside(self):
        lora = peft.get_peft_model(Mixed(), peft.LoraConfig(target_modules=["fc1", "embedding"])).base_model.model
        check_target(lora.fc1, "fc1", lora)
        with pytest.raises(TypeError, match=r"Target module embedding .* of type Embedding"):
            check_target(lora.embedding, "embedding", lora)


SELECTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "up_proj"]},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_the_layers_chosen_are_those_that_lora_would_choose(selection):
    ours, theirs = (
        peft.get_peft_model(tiny.llama(), config(task_type="CAUSAL_LM", **selection))
        for config in (PolyConfig, peft.LoraConfig)
    )
    assert ours.targeted_module_names == theirs.targeted_module_names
    adapted = [name for name, module in ours.base_model.model.named_modules() if isinstance(module, PolyLayer)]
    assert sorted(adapted) == sorted(ours.targeted_module_names)
