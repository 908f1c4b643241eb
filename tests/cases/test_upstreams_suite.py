"""What PEFT's own suite asks of a tuner, and LoRA does: as LoRA, or refused by name."""

from __future__ import annotations

import warnings

import peft
import peft.functional
import pytest
import torch
from adapters import adapt, poly, spread
from tiny import CASES, llama, naive_merge
from torch import nn

from peft_poly import PolyConfig, PolyLayer


def two(**settings) -> peft.PeftModel:
    torch.manual_seed(0)
    model = adapt(llama(), poly("llama", **settings), adapter_name="one")
    model.add_adapter("two", poly("llama", **settings))
    return spread(model).eval()


def layers(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**CASES["llama"].inputs(), **kwargs).logits


def by_function(model):
    peft.functional.set_adapter(model.get_base_model(), ["one", "two"])


def by_layer(model):
    for layer in layers(model):
        layer.set_adapter(["one", "two"])


def different(model):
    for index, layer in enumerate(layers(model)):
        layer.set_adapter([["one"], ["two"], ["two", "one"]][index % 3])


@pytest.mark.parametrize("activate", [by_function, by_layer, different])
@pytest.mark.parametrize("unload", [True, False])
def test_a_merge_without_names_merges_what_the_forward_computes(activate, unload):
    model = two()
    activate(model)
    want = logits(model, task_ids=1)
    if unload:
        torch.testing.assert_close(logits(model.merge_and_unload(task=1)), want, rtol=1e-4, atol=1e-5)
    else:
        before = {n: p.clone() for n, p in model.named_parameters()}
        model.merge_adapter(task=1)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.allclose(p, before[n], atol=1e-6) for n, p in model.named_parameters())


def test_merging_again_warns_and_merges_the_rest():
    model = two()
    want = logits(naive_merge(model.get_base_model(), 1, ("one", "two")))
    model.merge_adapter(["one"], task=1)
    with pytest.warns(UserWarning, match="You are now additionally merging two"):
        model.merge_adapter(["one", "two"], task=1)
    torch.testing.assert_close(logits(model), want)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(["one", "two"])
    with pytest.raises(ValueError, match="'one' is merged already, with task 1"):
        model.merge_adapter(["one"], task=2)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["one", "two"])), want)


def test_a_weighted_adapter_is_refused_and_what_is_advised_is_exact():
    model = two()
    with pytest.raises(ValueError, match=r"not combined into one \(\['one', 'two'\] into 'sum'\)"):
        model.add_weighted_adapter(["one", "two"], [0.25, 2.0], "sum", combination_type="linear")
    assert set(model.peft_config) == {"one", "two"}
    delta = {}
    for index, layer in enumerate(layers(model)):
        delta[index] = 0.25 * layer.get_delta_weight("one", 1) + 2 * layer.get_delta_weight("two", 1)
        layer.set_scale("one", 0.25)
        layer.set_scale("two", 2.0)
    model.base_model.set_adapter(["one", "two"])
    want = logits(model, task_ids=1)
    bases = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.merge_adapter(task=1)
    torch.testing.assert_close(logits(model), want)
    for index, layer in enumerate(layers(model)):
        torch.testing.assert_close(layer.base_layer.weight, bases[index] + delta[index])


def test_what_only_a_lora_config_has_is_refused_by_name():
    for option in ("use_dora", "use_rslora", "ensure_weight_tying", "target_parameters", "rank_pattern"):
        with pytest.raises(TypeError, match=option):
            PolyConfig(**{option: True})
    with pytest.raises(AttributeError, match="_register_custom_module"):
        PolyConfig()._register_custom_module({})
    from peft.helpers import rescale_adapter_scale

    with pytest.raises(ValueError, match="only supported for models with `LoraLayer`"), rescale_adapter_scale(two(), 2):
        pass


class Experts(nn.Module):
    """Experts as transformers 5 keeps them: one parameter for all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.gate_up_proj)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x):
        return self.experts(self.q_proj(x))


def test_fused_experts_that_are_named_are_said_to_be_left_out():
    with pytest.warns(UserWarning, match=r"\['gate_proj', 'up_proj'\].*`experts.gate_up_proj`"):
        peft.get_peft_model(Block(), PolyConfig(target_modules=["q_proj", "gate_proj", "up_proj"], lora_alpha=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(Block(), PolyConfig(target_modules=["q_proj"], lora_alpha=8))
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), PolyConfig(target_modules=["0", "gate_proj"], lora_alpha=8))


@pytest.mark.parametrize(
    "layer", [nn.Embedding(4, 8), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.MultiheadAttention(8, 2)]
)
def test_layers_that_are_not_linear_are_refused_by_name(layer):
    with pytest.raises(TypeError, match=f"Target module 0 is not supported: it is of type {type(layer).__name__}"):
        peft.get_peft_model(nn.Sequential(layer), PolyConfig(target_modules=["0"]))
