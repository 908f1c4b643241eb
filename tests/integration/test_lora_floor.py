"""Several adapters, one or two active; disabling; gradients; status: as a LoRA user knows them.

Outputs are compared with dense models into which the naive reference of `tiny.py` has put the updates of one task.
"""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from adapters import poly, spread, trainable
from tiny import CASES, MLP, TASKS, first, llama, naive_merge

from peft_poly import PolyConfig, PolyLayer

SIZES = {  # adapters that agree in nothing but the number of tasks
    "one": {"r": 2, "n_skills": 3, "n_splits": 2, "task_names": TASKS},
    "two": {"r": 5, "n_skills": 2, "n_splits": 4, "n_tasks": 3, "lora_alpha": 4},
}


def two_adapters(case: str = "llama") -> peft.PeftModel:
    model = peft.get_peft_model(CASES[case].make(), poly(case, **SIZES["one"]), adapter_name="one")
    model.add_adapter("two", poly(case, **SIZES["two"]))
    return spread(model).eval()


def naive_rows(model: peft.PeftModel, inputs: dict, tasks: list[int], adapters: tuple[str, ...]) -> torch.Tensor:
    """What each row should give: a dense model of its own, with the updates of its task merged."""
    rows = []
    for row, task in enumerate(tasks):
        dense = naive_merge(model.get_base_model(), task, adapters)
        rows.append(first(dense(**{key: value[row : row + 1] for key, value in inputs.items()})))
    return torch.cat(rows)


# --------------------------------------------------------------------------------------------------- several adapters
@pytest.mark.parametrize("case", ["llama", "gpt2", "mlp"])
@pytest.mark.parametrize("active", [("one",), ("two",), ("one", "two")], ids="+".join)
def test_each_row_gets_the_updates_of_all_active_adapters(case, active):
    model, inputs, tasks = two_adapters(case), CASES[case].inputs(), [2, 0, 1]
    model.base_model.set_adapter(list(active))
    assert model.active_adapters == list(active)
    with torch.no_grad():
        torch.testing.assert_close(
            first(model(**inputs, task_ids=tasks)), naive_rows(model, inputs, tasks, active), atol=1e-5, rtol=1e-4
        )


def test_adapters_on_different_layers_work_together():
    model = peft.get_peft_model(MLP(), poly("mlp", target_modules=["lin0"], **SIZES["one"]), adapter_name="one")
    model.add_adapter("two", poly("mlp", target_modules=["lin1"], **SIZES["two"]))
    spread(model).eval().base_model.set_adapter(["one", "two"])
    inputs, tasks = CASES["mlp"].inputs(), [1, 1, 2]
    wanted = naive_rows(model, inputs, tasks, ("one", "two"))
    torch.testing.assert_close(model(**inputs, task_ids=tasks), wanted, atol=1e-5, rtol=1e-4)


def test_an_id_that_one_of_two_active_adapters_lacks_is_refused_by_its_name():
    model = peft.get_peft_model(MLP(), poly("mlp", n_tasks=5), adapter_name="large")
    model.add_adapter("small", poly("mlp", n_tasks=2))
    model.base_model.set_adapter(["large", "small"])
    with pytest.raises(ValueError, match=r"adapter 'small' must lie in \[0, 1\], got 4"):
        model(**CASES["mlp"].inputs(), task_ids=[0, 1, 4])


def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was():
    model, inputs = two_adapters("mlp"), CASES["mlp"].inputs()
    model.base_model.set_adapter(["one", "two"])
    before, flags, keys = model(**inputs, task_ids=[0, 1, 2]), trainable(model), model.state_dict().keys()
    with pytest.raises(ValueError, match="n_splits=16 does not divide the 4 out-features of lin1"):
        model.add_adapter("three", poly("mlp", n_splits=16))
    assert (list(model.peft_config), model.active_adapters) == (["one", "two"], ["one", "two"])
    assert (trainable(model), model.state_dict().keys()) == (flags, keys)
    assert torch.equal(model(**inputs, task_ids=[0, 1, 2]), before)
    model.add_adapter("three", poly("mlp", n_splits=4))


def test_deleting_an_inactive_adapter_changes_no_output_and_leaves_nothing_of_it():
    model, inputs = two_adapters(), CASES["llama"].inputs()
    before = first(model(**inputs, task_ids=[0, 1, 2]))
    model.delete_adapter("two")
    assert torch.equal(first(model(**inputs, task_ids=[0, 1, 2])), before)
    assert list(model.peft_config) == ["one"]
    assert not [key for key in model.state_dict() if ".two" in key]
    layer = next(m for m in model.modules() if isinstance(m, PolyLayer))
    settings = [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
    assert not any("two" in setting for setting in settings)
    model.add_adapter("two", poly("llama", n_tasks=9))  # the name is free again, for any size
    assert layer.n_tasks == {"one": 3, "two": 9}


def test_deleting_the_active_adapter_makes_the_other_one_active():
    model, inputs = two_adapters(), CASES["llama"].inputs()
    wanted = naive_rows(model, inputs, [2, 1, 0], ("two",))
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    torch.testing.assert_close(first(model(**inputs, task_ids=[2, 1, 0])), wanted, atol=1e-5, rtol=1e-4)


def test_deleting_the_last_adapter_leaves_the_base_model():
    base, inputs = MLP().eval(), CASES["mlp"].inputs()
    wanted = base(**inputs)
    model = peft.get_peft_model(base, poly("mlp", n_tasks=3)).eval()
    model.delete_adapter("default")  # a PeftModel without any adapter has no forward, LoRA's neither; its tuner has
    assert torch.equal(model.base_model(**inputs), wanted)
    assert torch.equal(model.base_model(**inputs, task_ids=[0, 1, 2]), wanted)
    assert not trainable(model)


# ----------------------------------------------------------------------------------------------------------- disabling
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_disabled_adapter_is_the_base_model_and_needs_no_task(case):
    base, inputs = CASES[case].make().eval(), CASES[case].inputs()
    wanted = first(base(**inputs))
    model = spread(peft.get_peft_model(base, poly(case, n_tasks=3))).eval()
    routed = first(model(**inputs, task_ids=[0, 1, 2]))
    assert (routed - wanted).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(first(model(**inputs)), wanted)
        assert torch.equal(first(model(**inputs, task_ids=[0, 1, 2])), wanted)
        with model.disable_adapter():
            assert torch.equal(first(model(**inputs)), wanted)
    assert torch.equal(first(model(**inputs, task_ids=[0, 1, 2])), routed)


def test_a_disabled_adapter_comes_back_after_an_error():
    model, inputs = two_adapters("mlp"), CASES["mlp"].inputs()
    before, flags = model(**inputs, task_ids=1), trainable(model)
    with pytest.raises(RuntimeError), model.disable_adapter():
        model(torch.randn(2, 7))
    assert torch.equal(model(**inputs, task_ids=1), before)
    assert trainable(model) == flags


# ----------------------------------------------------------------------------------------------------------- gradients
def test_only_the_adapter_and_its_router_are_trainable():
    model = peft.get_peft_model(llama(), poly("llama", n_tasks=3))
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".poly_" in name}
    assert trainable(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_added_adapter_is_frozen_and_does_not_disturb_an_eval_model(dtype):
    model = peft.get_peft_model(MLP().to(dtype), poly("mlp", target_modules=["lin0"])).eval()
    inputs = {"x": CASES["mlp"].inputs()["x"].to(dtype)}
    before, flags = model(**inputs, task_ids=[0, 1, 2]), trainable(model)
    model.add_adapter("late", poly("mlp", target_modules=["lin0", "lin1"], n_tasks=3, lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
    assert trainable(model) == flags
    assert torch.equal(model(**inputs, task_ids=[0, 1, 2]), before)
    model.set_adapter("late")
    assert torch.equal(model(**inputs, task_ids=[0, 1, 2]), model(**inputs, task_ids=[0, 1, 2]))


def test_set_adapter_moves_the_gradients_with_it():
    model = two_adapters("mlp")
    for name, other in (("two", "one"), ("one", "two")):
        model.set_adapter(name)
        assert trainable(model) == {key for key, _ in model.named_parameters() if f".{name}" in key}
        model.zero_grad()
        model(**CASES["mlp"].inputs(), task_ids=[0, 1, 2]).sum().backward()
        got = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert got == trainable(model)
        assert not any(f".{other}" in key for key in got)


def test_set_adapter_for_inference_leaves_everything_frozen():
    model = two_adapters("mlp")
    model.set_adapter("two", inference_mode=True)
    assert not trainable(model)


def test_set_requires_grad_thaws_and_freezes_the_named_adapters():
    model = two_adapters("mlp")
    model.set_requires_grad(["one", "two"])
    assert trainable(model) == {key for key, _ in model.named_parameters() if ".poly_" in key}
    model.set_requires_grad("one", requires_grad=False)
    assert trainable(model) == {key for key, _ in model.named_parameters() if ".poly_" in key and ".two" in key}


def test_inference_mode_makes_a_frozen_adapter():
    model = peft.get_peft_model(MLP(), poly("mlp", n_tasks=3, inference_mode=True))
    assert not trainable(model)


# -------------------------------------------------------------------------------------------------------------- status
def test_the_status_reports_know_the_layers():
    model = two_adapters("mlp")
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == ["model.lin0", "model.lin1"]
    for layer in layers:
        assert layer.module_type == "poly.Linear"
        assert layer.enabled
        assert layer.active_adapters == ["one"]
        assert sorted(layer.available_adapters) == ["one", "two"]
        assert layer.requires_grad == {"one": True, "two": False}
        assert layer.devices == {"one": ["cpu"], "two": ["cpu"]}


def test_the_status_of_the_model_follows_its_state():
    model = two_adapters("mlp")
    status = model.get_model_status()
    assert status.adapter_model_type == "PolyModel"
    assert status.peft_types == {"one": "PEFT_POLY", "two": "PEFT_POLY"}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (2, True, ["one"])
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    model.set_task(1)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["one"]


def test_adapters_of_other_methods_cannot_be_added_beside_it():
    model = peft.get_peft_model(MLP(), poly("mlp"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["lin0"]))


def test_nothing_is_warned_about_in_ordinary_use(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.get_peft_model(MLP(), poly("mlp", n_tasks=3, lora_alpha=8))
        model(**CASES["mlp"].inputs(), task_ids=[0, 1, 2])
        model.save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(MLP(), tmp_path)
    assert PolyConfig.from_pretrained(tmp_path).n_tasks == 3
