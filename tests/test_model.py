"""The tuner: what injection puts into a model and takes back if it fails."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import adapt, poly, spread
from peft import inject_adapter_in_model
from tiny import CASES, MLP, first, llama
from torch import nn

from peft_poly import Linear, PolyConfig, PolyLayer, PolyModel
from peft_poly.tasks.context import TaskContext


def layers(model: nn.Module) -> dict[str, PolyLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PolyLayer)}


def contexts(model: nn.Module) -> set[int]:
    return {id(layer.task_context) for layer in layers(model).values()}


def task_hooks(model: nn.Module) -> int:
    """How many modules tell their layers the rows of a call."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(isinstance(getattr(hook, "context", None), TaskContext) for hook in hooks)


# ------------------------------------------------------------------------------------------------------- injection
@pytest.mark.parametrize("case", CASES)
def test_every_target_becomes_a_task_routed_layer_and_nothing_else_does(case):
    base = CASES[case].make()
    wanted = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in CASES[case].target_modules}
    model = peft.get_peft_model(base, poly(case))
    found = layers(model.get_base_model())
    assert set(found) == wanted
    assert all(type(layer) is Linear and layer.layer_name == name for name, layer in found.items())
    assert isinstance(model.base_model, PolyModel)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_changes_nothing(case):
    base, inputs = CASES[case].make().eval(), CASES[case].inputs()
    with torch.no_grad():
        wanted = first(base(**inputs))
        model = peft.get_peft_model(base, poly(case, init_weights=True)).eval()
        torch.testing.assert_close(first(model(**inputs, task_ids=[0, 1, 2])), wanted, atol=1e-6, rtol=1e-5)


def test_all_layers_and_adapters_share_one_context():
    model = peft.get_peft_model(llama(), poly("llama"))
    model.add_adapter("other", poly("llama", n_tasks=5))
    assert contexts(model) == {id(model.base_model.task_context)}
    assert model.base_model.task_context.configs is model.peft_config
    assert task_hooks(model) == 2  # LlamaForCausalLM and LlamaModel


def test_adapters_injected_one_after_the_other_share_one_context():
    model = inject_adapter_in_model(poly("mlp"), MLP())
    inject_adapter_in_model(poly("mlp", n_tasks=5), model, "other")
    assert len(contexts(model)) == 1
    assert task_hooks(model) == 1


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_an_unloaded_model_keeps_nothing_of_the_adapter(verb):
    base, inputs = llama().eval(), CASES["llama"].inputs()
    names = [name for name, _ in base.named_modules()]
    model = adapt(copy.deepcopy(base), poly("llama", n_tasks=1))
    with torch.no_grad():
        wanted = first((base if verb == "unload" else model)(**inputs))
        plain = getattr(model, verb)()
        torch.testing.assert_close(first(plain(**inputs)), wanted, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in plain.named_modules()] == names
    assert task_hooks(plain) == 0


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_are_in_the_mode_of_the_model(training):
    model = peft.get_peft_model(llama().train(training), poly("llama", lora_dropout=0.1))
    model.add_adapter("other", poly("llama", lora_dropout=0.1))
    for layer in layers(model).values():
        assert layer.training is training
        for name in ("default", "other"):
            assert layer.poly_router[name].training is training
            assert layer.poly_dropout[name].training is training


def test_a_second_adapter_in_an_eval_model_keeps_it_deterministic():
    model, inputs = adapt(llama(), poly("llama")), CASES["llama"].inputs()
    model.add_adapter("other", poly("llama", lora_dropout=0.5))
    model.set_adapter("other")
    spread(model)
    one, other = (first(model(**inputs, task_ids=[0, 1, 2])) for _ in range(2))
    assert torch.equal(one, other)


# -------------------------------------------------------------------------------------- injection that cannot be
class Uneven(nn.Module):
    """Its second layer has features that 2 does not divide; its embedding is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.even = nn.Linear(16, 8)
        self.uneven = nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.uneven(self.even(x))


FAILURES = {
    "splits": (
        {"target_modules": ["even", "uneven"], "n_splits": 2},
        ValueError,
        "n_splits=2 does not divide the 5 out-features of uneven.*leave the layer out with `exclude_modules`",
    ),
    "no linear layer": (
        {"target_modules": ["even", "embedding"]},
        TypeError,
        "Target module embedding is not supported: it is of type Embedding",
    ),
    "read past its forward": (
        {"target_modules": ["even", "out_proj"]},
        TypeError,
        r"Target module attention.out_proj is not supported: `torch.nn.MultiheadAttention` reads its weight",
    ),
    "no such layer": ({"target_modules": ["evn"]}, ValueError, r"Target modules \{'evn'\} not found in the base model"),
}


def described(model: nn.Module) -> list:
    return [
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        task_hooks(model),
    ]


@pytest.mark.parametrize(("settings", "error", "message"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("adapt_by", [peft.get_peft_model, lambda base, config: inject_adapter_in_model(config, base)])
def test_an_injection_that_fails_leaves_the_model_as_it_was(settings, error, message, adapt_by):
    base = Uneven()
    base.even.weight.requires_grad_(False)
    before = described(base)
    with pytest.raises(error, match=message):
        adapt_by(base, PolyConfig(**settings))
    assert described(base) == before
    adapt(base, PolyConfig(target_modules=["even"], n_splits=2, n_tasks=2))  # and it can be adapted after all


@pytest.mark.parametrize(("settings", "error", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_second_adapter_that_fails_leaves_the_first(settings, error, message):
    model = adapt(Uneven(), PolyConfig(target_modules=["even"], n_tasks=2, init_weights=False))
    x, before = torch.randn(3, 16), described(model)
    wanted = model(x, task_ids=[1, 0, 1])
    with pytest.raises(error, match=message):
        model.add_adapter("other", PolyConfig(**settings))
    assert described(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x, task_ids=[1, 0, 1]), wanted)
