"""Names of adapters: one that PEFT can neither make nor save is refused at once, and the model is left as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict

import peft
import pytest
import torch
from torch import nn

from peft_poly import PolyConfig

KINDS = {"poly": {"n_skills": 2, "init_weights": False}, "gates": {"poly_type": "gates", "init_weights": False}}
X, IDS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), [0, 1, 0, 1]


def base() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(OrderedDict(dense=nn.Linear(8, 8), out=nn.Linear(8, 3)))
    return nn.Sequential(OrderedDict(encoder=nn.Linear(8, 8), head=head))


def settings(kind: str = "poly", **others) -> PolyConfig:
    return PolyConfig(target_modules=["encoder"], r=2, lora_alpha=4, n_tasks=2, **KINDS[kind], **others)


def by_get(name: str, config: PolyConfig) -> nn.Module:
    return peft.get_peft_model(base(), config, adapter_name=name)


def by_add(name: str, config: PolyConfig) -> nn.Module:
    model = peft.get_peft_model(base(), copy.deepcopy(config))
    model.add_adapter(name, config)
    model.set_adapter(name)
    return model


def by_injection(name: str, config: PolyConfig) -> nn.Module:
    return peft.inject_adapter_in_model(config, base(), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", [by_get, by_add, by_injection])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("double", "attribute"),
        ("train", "attribute"),
        ("keys", "attribute"),
        ("get", "attribute"),
        ("training", "attribute"),
        ("", "empty"),
        ("v1.5", "dot"),
        ("poly_lora_A", "names of tensors"),
        ("poly_router", "names of tensors"),
    ],
)
def test_a_name_that_no_module_can_have_is_refused(kind, door, name, why):
    with pytest.raises(ValueError, match=rf"cannot be called '{name}'.*{why}.*'adapter"):
        door(name, settings(kind))


@pytest.mark.parametrize("door", [by_get, by_add])
@pytest.mark.parametrize("name", ["head", "dense", "out", "weight", "bias", "modules_to_save"])
def test_a_name_within_the_saved_modules_is_refused_for_it_could_not_be_saved(door, name):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'.*saved with it"):
        door(name, settings(modules_to_save=["head"]))


def test_a_second_adapter_is_refused_beside_one_that_saves_the_same_module():
    model = by_get("first", settings(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="cannot be called 'dense'"):
        model.add_adapter("dense", settings(modules_to_save=["head"]))


def test_loading_under_such_a_name_is_refused_and_leaves_the_model_as_it_was(tmp_path):
    model = by_get("default", settings()).eval()
    model.save_pretrained(tmp_path)
    before = model(X, task_ids=IDS)
    with pytest.raises(ValueError, match="cannot be called 'double'"):
        model.load_adapter(tmp_path, adapter_name="double")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(X, task_ids=IDS), before)
    with pytest.raises(ValueError, match="cannot be called 'double'"):
        peft.PeftModel.from_pretrained(base(), tmp_path, adapter_name="double")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", [by_get, by_add])
@pytest.mark.parametrize(
    "name", ["encoder", "0", "1", "a b", "ä", "T", "self", "router", "model", "base_layer", "active"]
)
def test_other_names_are_made_trained_saved_and_loaded(tmp_path, kind, door, name):
    model = door(name, settings(kind, modules_to_save=["head"])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    folder = tmp_path / name if (tmp_path / name).exists() else tmp_path
    for loaded_as in (name, "default"):
        again = peft.PeftModel.from_pretrained(base(), folder, adapter_name=loaded_as).eval()
        torch.testing.assert_close(again(X, task_ids=IDS), model(X, task_ids=IDS))
