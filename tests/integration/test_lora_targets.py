"""The layers that a LoRA user's settings choose, and modules trained beside them.

Which layers are adapted is compared with PEFT's LoRA, sizes with PEFT's own Poly.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import poly, spread, trainable
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import CASES, MLP, bert, first, llama
from torch import nn

from peft_poly import PolyConfig, PolyLayer


def adapted(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


ALL_LAYERS = {"llama": ["q_proj", "up_proj"], "t5": ["q", "wo"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}
TARGETS = {
    "default": lambda names: {},
    "all-linear": lambda names: {"target_modules": "all-linear"},
    "list": lambda names: {"target_modules": names},
    "regex": lambda names: {"target_modules": rf".*\.1\..*({'|'.join(names)})"},
    "exclude names": lambda names: {"target_modules": names, "exclude_modules": names[:1]},
    "exclude regex": lambda names: {"target_modules": names, "exclude_modules": r".*\.0\..*"},
    "exclude from all-linear": lambda names: {"target_modules": "all-linear", "exclude_modules": names},
    "one block": lambda names: {"target_modules": names, "layers_to_transform": 1},
    "blocks": lambda names: {"target_modules": names, "layers_to_transform": [0, 1]},
    "blocks of the default": lambda names: {"layers_to_transform": [1]},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("setting", TARGETS)
@pytest.mark.parametrize("case", ALL_LAYERS)
def test_the_adapted_layers_are_those_of_lora(case, setting):
    settings = TARGETS[setting](ALL_LAYERS[case])
    lora = peft.get_peft_model(CASES[case].make(), peft.LoraConfig(task_type=CASES[case].task_type, **settings))
    model = peft.get_peft_model(CASES[case].make(), PolyConfig(task_type=CASES[case].task_type, **settings))
    assert adapted(model) == adapted(lora)
    assert adapted(model)
    assert all(isinstance(model.get_submodule(name), PolyLayer) for name in adapted(model))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}, ["1.mlp.down_proj", "1.mlp.up_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ["0.self_attn.q_proj"]),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [1]},
         ["1.self_attn.q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
         ["1.self_attn.q_proj"]),
    ],
)  # fmt: skip
def test_exactly_the_named_layers_are_adapted(settings, layers):
    model = peft.get_peft_model(llama(), PolyConfig(**settings))
    assert sorted(adapted(model)) == [f"base_model.model.model.layers.{name}" for name in layers]


class TwoStages(nn.Module):
    """Two lists of blocks, which `layers_pattern` tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2)])
        self.up = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2)])


@pytest.mark.parametrize("pattern", ["up", ["up"]])
def test_layers_pattern_says_which_list_of_blocks_is_counted(pattern):
    config = PolyConfig(target_modules=["lin"], layers_to_transform=[0], layers_pattern=pattern)
    assert adapted(peft.get_peft_model(TwoStages(), config)) == {"base_model.model.up.0.lin"}


def test_targets_that_match_nothing_are_refused_and_the_model_is_left_as_it_was():
    base = MLP()
    with pytest.raises(ValueError, match="nowhere"):
        peft.get_peft_model(base, PolyConfig(target_modules=["nowhere"]))
    assert not adapted(base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sizes", [{}, {"r": 3, "n_skills": 2, "n_splits": 2, "n_tasks": 7}, {"n_tasks": 2}], ids=str)
@pytest.mark.parametrize("case", ["t5", "llama", "bert"])
def test_sizes_and_keys_are_those_of_pefts_poly(case, sizes):
    settings = {"task_type": CASES[case].task_type, "target_modules": CASES[case].target_modules, **sizes}
    ours = peft.get_peft_model(CASES[case].make(), PolyConfig(**settings))
    theirs = peft.get_peft_model(CASES[case].make(), peft.PolyConfig(**settings))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    shapes = [{key: value.shape for key, value in peft.get_peft_model_state_dict(m).items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_printed_parameter_counts_are_those_of_the_model(capsys):
    model = peft.get_peft_model(MLP(), poly("mlp", r=2, n_skills=3, n_tasks=5))
    model.print_trainable_parameters()
    skills = 3 * 2 * (16 + 32) + 3 * 2 * (32 + 4)
    assert f"trainable params: {skills + 2 * 5 * 3:,} || all params:" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- modules to save
def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    case = CASES["mlp"]
    base = MLP()
    config = PolyConfig(target_modules=["lin0"], modules_to_save=["lin1"], n_tasks=3, init_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    head = model.base_model.model.lin1.modules_to_save["default"].weight
    before = head.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**case.inputs(), task_ids=[0, 1, 2]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(head, before)
    assert torch.equal(model.base_model.model.lin1.original_module.weight, base.lin1.weight)

    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(**case.inputs(), task_ids=[2, 0, 1]), model(**case.inputs(), task_ids=[2, 0, 1]))
    assert not trainable(loaded)


def test_a_classification_head_is_trained_saved_and_loaded_with_the_adapter(tmp_path):
    base = bert()
    model = peft.get_peft_model(copy.deepcopy(base), poly("bert", target_modules=["query"], n_tasks=3))
    spread(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    assert {name for name in trainable(model) if "classifier" in name} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    inputs = CASES["bert"].inputs()
    wanted = first(model(**inputs, task_ids=[2, 0, 1]))
    assert torch.equal(first(loaded(**inputs, task_ids=[2, 0, 1])), wanted)
    assert not torch.allclose(first(base.eval()(**inputs)), wanted, atol=1e-3)


@torch.no_grad()
def test_each_adapter_has_a_head_of_its_own(tmp_path):
    base, inputs = bert(), CASES["bert"].inputs()
    model = peft.get_peft_model(copy.deepcopy(base), poly("bert", target_modules=["query"]), adapter_name="one")
    model.add_adapter("two", poly("bert", target_modules=["key"], n_tasks=5))
    heads = model.base_model.model.classifier.modules_to_save
    for head in heads.values():
        head.weight.normal_()
    spread(model).eval()
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = first(model(**inputs, task_ids=[2, 0, 1]))
    assert not torch.allclose(outputs["one"], outputs["two"], atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one"):
        loaded.set_adapter(name)
        assert torch.equal(first(loaded(**inputs, task_ids=[2, 0, 1])), outputs[name])
