"""Copies, tied weights, state dicts, and checkpoints whose shapes do not fit, as a LoRA user knows them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from adapters import GATES, adapt, poly
from peft.utils.hotswap import hotswap_adapter
from tiny import CASES, MLP, first, gpt2, llama, t5
from torch import nn

from peft_poly import PolyConfig, PolyLayer, use_task

GRANULARITIES = ["layer", "block", "model"]
IDS = [2, 0, 1]


# -------------------------------------------------------------------------------------------------------------- copies
def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize(
    ("case", "granularity", "kind"),
    [("llama", "layer", {}), ("llama", "block", {}), ("mlp", "model", {}), ("llama", "block", GATES)],
    ids=str,
)
def test_a_copy_computes_the_same_and_is_independent(case, granularity, kind, copied_by: Callable):
    model = adapt(CASES[case].make(), poly(case, router_granularity=granularity, task_names=["a", "b", "c"], **kind))
    inputs = CASES[case].inputs()
    wanted = first(model(**inputs, task_ids=IDS))
    with use_task(model, "a"):  # a copy that is made during a call takes no task of the call with it
        other = copied_by(model)
    assert torch.equal(first(other(**inputs, task_ids=["c", "a", "b"])), wanted)
    with pytest.raises(ValueError, match="No task is known"):
        other(**inputs)

    model.set_task("b")
    with pytest.raises(ValueError, match="No task is known"):
        other(**inputs)
    for name, parameter in other.named_parameters():
        if name.endswith("module_logits"):
            parameter.fill_(0.5)
    assert torch.equal(first(model(**inputs, task_ids=IDS)), wanted)
    assert not torch.equal(first(other(**inputs, task_ids=IDS)), wanted)
    assert other.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_copy_trains_as_the_original_does():
    model = adapt(llama(), poly("llama", router_granularity="block")).train()
    other, inputs = copy.deepcopy(model), CASES["llama"].inputs()
    grads = []
    for trained in (model, other):
        torch.manual_seed(3)
        first(trained(**inputs, task_ids=IDS)).square().sum().backward()
        grads.append({name: p.grad for name, p in trained.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


# -------------------------------------------------------------------------------------------------------- tied weights
def tied_llama() -> nn.Module:
    config = copy.deepcopy(llama().config)
    config.tie_word_embeddings = True
    return type(llama())(config)


def is_tied(base: nn.Module) -> bool:
    return base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [t5, gpt2, tied_llama])
def test_tied_weights_stay_tied_and_are_not_adapted(make):
    base = make()
    assert is_tied(base)
    model = adapt(base, PolyConfig(target_modules="all-linear", n_tasks=3, init_weights=False))
    assert not isinstance(model.get_base_model().get_output_embeddings(), PolyLayer)
    assert is_tied(model.get_base_model())
    model.set_task(1)
    before = base.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert is_tied(model.get_base_model())
    model.unmerge_adapter()
    assert is_tied(model.get_base_model())
    assert is_tied(copy.deepcopy(model).merge_and_unload())
    unloaded = model.unload()
    assert is_tied(unloaded)
    assert torch.equal(unloaded.get_input_embeddings().weight, before)


# --------------------------------------------------------------------------------------------------------- state dicts
@torch.no_grad()
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_state_dict_moves_an_adapter_to_another_model_and_name(granularity):
    config, inputs = poly("llama", router_granularity=granularity), CASES["llama"].inputs()
    base = llama()
    model = adapt(copy.deepcopy(base), config)
    state_dict = peft.get_peft_model_state_dict(model)
    assert state_dict
    assert all(".poly_" in key and "default" not in key for key in state_dict)
    other = peft.get_peft_model(base, copy.deepcopy(config), adapter_name="another").eval()
    before = dict(state_dict)
    result = peft.set_peft_model_state_dict(other, state_dict, adapter_name="another")
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if ".poly_" in key]
    assert state_dict.keys() == before.keys()  # the caller's dict is left alone
    assert torch.equal(first(other(**inputs, task_ids=IDS)), first(model(**inputs, task_ids=IDS)))


@torch.no_grad()
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_state_dict_of_the_whole_model_loads_strictly(granularity):
    config, inputs = poly("llama", router_granularity=granularity), CASES["llama"].inputs()
    model, other = adapt(llama(), config), adapt(llama(), copy.deepcopy(config))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(first(other(**inputs, task_ids=IDS)), first(model(**inputs, task_ids=IDS)))


def test_a_missing_tensor_is_reported_when_loading(tmp_path):
    model = adapt(MLP(), poly("mlp"))
    state_dict = peft.get_peft_model_state_dict(model)
    missing = state_dict.pop("base_model.model.lin1.poly_router.module_logits")
    assert missing.shape == (3, 4)
    result = peft.set_peft_model_state_dict(model, state_dict)
    assert [key for key in result.missing_keys if ".poly_" in key] == [
        "base_model.model.lin1.poly_router.default.module_logits"
    ]
    torch.save(state_dict, tmp_path / "adapter_model.bin")
    model.peft_config["default"].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lin1\.poly_router\.default\.module_logits"):
        peft.PeftModel.from_pretrained(MLP(), tmp_path)


def test_hotswapping_is_refused_and_changes_nothing(tmp_path):
    adapt(MLP(), poly("mlp")).save_pretrained(tmp_path)
    model = adapt(MLP(), poly("mlp"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but PEFT_POLY was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- bad shapes
WIDE = {"n_splits": 2, "r": 4, "n_skills": 3}
MISFITS = [  # what the config says, what is in the checkpoint for lin0, what the config asks for
    ({**WIDE, "r": 5}, "poly_lora_A", (2, 3, 8, 4), (2, 3, 8, 5)),
    ({**WIDE, "n_skills": 6}, "poly_lora_B", (2, 3, 4, 16), (2, 6, 4, 16)),
    ({**WIDE, "n_splits": 4}, "poly_lora_A", (2, 3, 8, 4), (4, 3, 4, 4)),
    ({**WIDE, "n_tasks": 9}, "router", (3, 6), (9, 6)),
]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize(("sizes", "kind", "found", "wanted"), MISFITS)
def test_shapes_that_do_not_fit_are_named(tmp_path, sizes, kind, found, wanted, granularity, low_cpu_mem_usage):
    adapt(MLP(), poly("mlp", router_granularity=granularity, **WIDE)).save_pretrained(tmp_path)
    config = poly("mlp", router_granularity=granularity, **sizes)
    message = (
        rf"{kind} of adapter 'mine' in base_model\.model\.lin0: the checkpoint has \({', '.join(map(str, found))}\), "
        rf"its config asks for \({', '.join(map(str, wanted))}\)"
    )
    with pytest.raises(RuntimeError, match=message):
        peft.PeftModel.from_pretrained(
            MLP(), tmp_path, adapter_name="mine", config=config, low_cpu_mem_usage=low_cpu_mem_usage
        )


def test_a_checkpoint_for_another_base_model_is_named(tmp_path):
    adapt(MLP(), poly("mlp")).save_pretrained(tmp_path)
    other = MLP()
    other.lin1 = nn.Linear(32, 6)
    with pytest.raises(RuntimeError, match=r"poly_lora_B .*lin1: the checkpoint has \(1, 4, 8, 4\).*\(1, 4, 8, 6\)"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_mismatched_sizes_can_be_ignored_and_everything_else_is_loaded(tmp_path, granularity):
    base = MLP().eval()
    model = adapt(copy.deepcopy(base), poly("mlp", router_granularity=granularity))
    model.save_pretrained(tmp_path)
    config = poly("mlp", router_granularity=granularity, n_tasks=5)
    with pytest.warns(UserWarning, match=r"found shape torch\.Size\(\[3, 4\]\).* and torch\.Size\(\[5, 4\]\)"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=config, ignore_mismatched_sizes=True)
    for layer in ("lin0", "lin1"):
        mine, theirs = (m.get_base_model().get_submodule(layer) for m in (loaded, model))
        assert torch.equal(mine.poly_lora_A["default"], theirs.poly_lora_A["default"])
        assert torch.equal(mine.poly_lora_B["default"], theirs.poly_lora_B["default"])
        assert mine.poly_router["default"].module_logits.shape == (5, 4)
    assert loaded(**CASES["mlp"].inputs(), task_ids=[4, 3, 0]).isfinite().all()
