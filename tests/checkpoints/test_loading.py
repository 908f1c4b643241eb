"""Weights are loaded over an adapter only if they are of its tasks, in its order."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Optional

import peft
import pytest
import torch
from adapters import adapt, poly
from tiny import CASES, MLP
from transformers import LlamaConfig, LlamaForCausalLM

from peft_poly import PolyConfig

INPUTS = CASES["mlp"].inputs()
TASKS = ["boolq", "copa", "rte"]


def config(names: Optional[list[str]]) -> peft.PeftConfig:
    return poly("mlp", n_tasks=len(names) if names else 3, task_names=names)


def adapter(seed: int, names: Optional[list[str]]) -> peft.PeftModel:
    torch.manual_seed(0)
    base = MLP().eval()
    torch.manual_seed(seed)
    return adapt(base, config(names))


def outputs(model: peft.PeftModel) -> torch.Tensor:
    return model(**INPUTS, task_ids=[2, 0, 1])


@pytest.fixture
def saved(tmp_path) -> Path:
    adapter(1, TASKS).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["boolq", "rte", "copa"], "id 1 is 'copa' there, and 'rte'"),
        ([*TASKS, "wic"], "id 3 is no task there, and 'wic'"),
        (["boolq", "copa"], "id 2 is 'rte' there, and no task"),
    ],
)
def test_other_tasks_are_refused_and_the_weights_stay(saved, names, said):
    model = adapter(2, names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"task_names of the checkpoint '.*saved' .*: {said} in adapter 'default'"):
        model.load_adapter(saved, "default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_adapter_of_a_subfolder_is_named_whole(tmp_path):
    model = adapter(1, TASKS)
    model.add_adapter("other", config(TASKS))
    model.save_pretrained(tmp_path)
    turned = adapter(2, TASKS[::-1])
    with pytest.raises(ValueError, match=r"the checkpoint '.*other' are not those of the model"):
        turned.load_adapter(tmp_path, "default", subfolder="other")


def test_a_config_of_other_tasks_is_refused_when_the_model_is_made(saved):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="are not those of the model: id 0 is 'boolq' there, and 'rte'"):
        peft.PeftModel.from_pretrained(MLP(), saved, config=config(TASKS[::-1]))


@pytest.mark.parametrize("names", [TASKS, None])
def test_the_same_tasks_and_unnamed_ones_are_loaded(saved, names):
    wanted = outputs(adapter(1, TASKS))
    model = adapter(2, names)
    assert not torch.equal(outputs(model), wanted)
    model.load_adapter(saved, adapter_name="default")
    assert torch.equal(outputs(model), wanted)


def test_a_new_adapter_may_have_any_tasks(saved):
    model = adapter(2, TASKS[::-1])
    model.load_adapter(saved, "other")
    assert model.peft_config["other"].task_names == TASKS


def test_weights_without_a_config_are_loaded(saved):
    (saved / "adapter_config.json").unlink()
    model = adapter(2, TASKS[::-1])
    model.load_adapter(saved, "default")
    assert torch.equal(outputs(model), outputs(adapter(1, TASKS)))


def test_a_lora_is_no_task_routed_adapter(tmp_path):
    torch.manual_seed(0)
    peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LORA adapter, which has no router"):
        adapter(2, TASKS).load_adapter(tmp_path, "default")


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_tensors_that_have_no_place_in_the_base_model_are_told(tmp_path, granularity):
    def base(layers: int) -> LlamaForCausalLM:
        sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))

    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "router_granularity": granularity}
    peft.get_peft_model(base(2), PolyConfig(task_names=TASKS, lora_alpha=4, **settings)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'default' is loaded without \d of its tensors, such as .*layers\.1\."):
        peft.PeftModel.from_pretrained(base(1), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Adapter .* is loaded without")
        model = peft.PeftModel.from_pretrained(base(2), tmp_path, is_trainable=True)
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
        model.load_adapter(tmp_path, "default")
