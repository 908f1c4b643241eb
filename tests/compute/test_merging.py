"""Merging: one task goes into the base weights and out again, alone or with others', and never half of it.

Outputs are compared with dense models into which `tiny.naive_merge` has put the task, one skill and split at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import adapters
import peft
import pytest
import torch
from adapters import GATES, adapt, spread
from peft import LoraConfig, inject_adapter_in_model
from tiny import CASES, MLP, TASKS, first, gpt2, llama, naive_merge, naive_pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peft_poly import Linear, PolyConfig, PolyLayer, use_task
from peft_poly.compute.kinds import mixture

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = pytest.mark.parametrize(
    ("case", "settings"), [*((case, {}) for case in CASES), ("llama", GATES), ("gpt2", GATES)], ids=str
)


def poly(case: str = "llama", **settings) -> PolyConfig:
    if "n_tasks" not in settings:
        settings = {"n_tasks": None, "task_names": TASKS, **settings}
    return adapters.poly(case, **{"r": 3, "n_skills": 3, "n_splits": 2, "lora_alpha": 2, **settings})


def adapted(case: str = "llama", **settings) -> peft.PeftModel:
    return adapt(CASES[case].make(), poly(case, **settings))


def two_adapters() -> peft.PeftModel:
    """`one` and `two`, which agree in nothing, both active."""
    other = {"r": 5, "n_skills": 2, "n_splits": 4, "task_names": ["x", "y"], "target_modules": ["q_proj", "up_proj"]}
    model = peft.get_peft_model(llama(), poly(), adapter_name="one")
    model.add_adapter("two", poly(**other))
    model.base_model.set_adapter(["one", "two"])
    return spread(model).eval()


def logits(model: nn.Module, case: str = "llama", **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**CASES[case].inputs(), **kwargs))


def layers(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def ops(model: nn.Module, case: str = "llama", **kwargs) -> Counter:
    """How often each tensor operation ran in a forward."""
    counts: Counter = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        logits(model, case, **kwargs)
    return counts


# --------------------------------------------------------------------------------------------------- in and out again
@pytest.mark.parametrize("task", [0, 2])
@KINDS
def test_a_merged_model_is_the_dense_one_and_unmerging_gives_the_adapter_back(case, settings, task):
    model = adapted(case, **settings)
    before, routed = weights(model), logits(model, case, task_ids="sst2")
    expected = logits(naive_merge(model.get_base_model(), task), case)
    assert not torch.allclose(expected, logits(naive_merge(model.get_base_model(), 1), case), **CLOSE)

    model.merge_adapter(task=TASKS[task])
    torch.testing.assert_close(logits(model, case), expected, **CLOSE)
    torch.testing.assert_close(logits(model, case, task_ids=[task] * 3), expected, **CLOSE)
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))

    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, case, task_ids="sst2"), routed, **CLOSE)


@KINDS
def test_merge_and_unload_leaves_the_plain_base_model(case, settings):
    model = adapted(case, **settings)
    expected = naive_merge(model.get_base_model(), 1)
    merged = model.merge_and_unload(task="sst2")
    torch.testing.assert_close(logits(merged, case), logits(expected, case), **CLOSE)
    assert_plain(merged, CASES[case].make())


@pytest.mark.parametrize("case", CASES)
def test_unload_gives_the_base_model_back_untouched(case):
    base = CASES[case].make()
    before = weights(base)
    model = spread(peft.get_peft_model(base, poly(case)))
    unloaded = model.unload()
    assert unloaded is base
    assert_plain(unloaded, CASES[case].make())
    if case != "bert":  # PEFT saves its head as a module of its own
        assert_same(unloaded, before)


def assert_plain(model: nn.Module, fresh: nn.Module) -> None:
    assert not model._forward_hooks
    assert [(name, type(m)) for name, m in model.named_modules()] == [
        (name, type(m)) for name, m in fresh.named_modules()
    ]
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in fresh.named_parameters()
    }


def test_a_merged_forward_runs_the_operations_of_the_bare_model_and_no_others():
    model = adapted()
    routed = ops(model, task_ids="rte")
    bare = ops(llama().eval())
    model.merge_adapter(task="rte")
    assert ops(model) == bare
    assert routed != bare


def test_a_merged_layer_calls_its_base_layer_and_nothing_else(monkeypatch):
    model = adapted("mlp")
    calls: Counter = Counter()
    mixed = mixture.mixed
    monkeypatch.setattr(mixture, "mixed", lambda *args, **kwargs: (calls.update(["mixed"]), mixed(*args, **kwargs))[1])
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name.rpartition(".")[2]]))
    logits(model, "mlp", task_ids=0)
    assert calls["mixed"] == 2  # one pair per layer
    model.merge_adapter(task=0)
    calls.clear()
    logits(model, "mlp", task_ids=0)
    assert calls["base_layer"] == 2
    assert calls["mixed"] == 0


def test_merged_weights_generate_as_the_routed_adapter_does():
    model = adapted()
    inputs = CASES["llama"].inputs(rows=2)
    routed = model.generate(**inputs, task_ids="boolq", max_new_tokens=5, do_sample=False)
    model.merge_adapter(task="boolq")
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), routed)
    assert torch.equal(model.generate(**inputs, task_ids="boolq", max_new_tokens=5, do_sample=False), routed)


def test_merging_in_training_mode_takes_no_sample():
    model = adapted(lora_dropout=0.5).train()
    expected = logits(naive_merge(model.get_base_model(), 0).eval())
    model.merge_adapter(task=0)
    assert all(layer.training and layer.poly_router["default"].training for layer in layers(model))
    torch.testing.assert_close(logits(model.eval()), expected, **CLOSE)


def test_a_merged_adapter_is_saved_as_it_was(tmp_path):
    model = adapted()
    adapter = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    model.merge_adapter(task="rte")
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    reloaded = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, tmp_path))
    assert reloaded.keys() == adapter.keys()
    assert all(torch.equal(reloaded[name], adapter[name]) for name in adapter)


# ------------------------------------------------------------------------------------------------------ which task
@pytest.mark.parametrize("task", ["boolq", 2, {"default": "boolq"}, {"default": 2}], ids=str)
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_task_is_given_by_name_by_id_or_per_adapter(verb, task):
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 2))
    merged = getattr(model, verb)(task=task) or model
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_the_set_task_is_the_default_and_an_argument_goes_before_it():
    model = adapted()
    dense = [logits(naive_merge(model.get_base_model(), task)) for task in range(3)]
    model.set_task("sst2")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), dense[1], **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload(task="boolq")), dense[2], **CLOSE)


def test_the_only_task_needs_no_saying():
    model = adapted(n_tasks=1)
    expected = logits(naive_merge(model.get_base_model(), 0))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, r"Adapter 'default' has 3 tasks, and this needs one of them\. Pass `task=`"),
        ({}, "has 3 tasks, and this needs one of them"),
        ("bolq", "boolq"),
        (3, r"must lie in \[0, 2\], got 3"),
        (-1, r"must lie in \[0, 2\], got -1"),
        (0.5, "integer"),
        ({"defualt": "rte"}, "no adapter 'defualt'"),
    ],
)
def test_a_task_that_is_missing_or_unknown_is_refused_and_nothing_is_merged(verb, task, message):
    model = adapted()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        getattr(model, verb)(task=task)
    assert_same(model, before)
    assert not any(layer.merged for layer in layers(model))
    logits(model, task_ids="rte")


def test_an_adapter_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        adapted().merge_adapter(adapter_names=["other"], task=0)


# ------------------------------------------------------------------------------------------ what a merged model refuses
def test_merging_another_task_over_a_merged_one_is_refused():
    model = adapted()
    model.merge_adapter(task="rte")
    before = weights(model)
    with pytest.raises(ValueError, match=r"'default' is merged already, with task 'rte'\. Call `unmerge_adapter\(\)`"):
        model.merge_adapter(task="boolq")
    assert_same(model, before)


@pytest.mark.parametrize("task", ["rte", None])
def test_merging_the_same_task_again_warns_and_changes_nothing(task):
    model = adapted()
    model.merge_adapter(task="rte")
    before = weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(task=task)
    assert_same(model, before)


def test_another_task_cannot_be_computed_while_one_is_merged():
    model = adapted()
    model.merge_adapter(task="rte")
    message = "Task 'rte' of adapter 'default' is merged into the base weights"
    with pytest.raises(ValueError, match=message):
        logits(model, task_ids="sst2")
    with pytest.raises(ValueError, match=message):
        logits(model, task_ids=["rte", "rte", "sst2"])
    with pytest.raises(ValueError, match=message):
        logits(model, task_ids=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=message):
        model.generate(**CASES["llama"].inputs(), task_ids=2, max_new_tokens=2)
    with pytest.raises(ValueError, match=message), model.use_task("sst2"):
        logits(model)
    with pytest.raises(ValueError, match=message), use_task(model.get_base_model(), [0, 1, 2]):
        logits(model.get_base_model())
    with pytest.raises(ValueError, match=message):
        model.set_task("boolq")
    model.set_task("rte")
    logits(model)
    model.unmerge_adapter()
    logits(model, task_ids="sst2")


def test_a_task_that_was_chosen_before_the_merge_of_another_one_is_refused_too():
    model = adapted()
    message = "Task 'rte' of adapter 'default' is merged into the base weights"
    model.set_task("sst2")
    model.merge_adapter(task="rte")
    with pytest.raises(ValueError, match=message):
        logits(model)
    logits(model, task_ids="rte")
    model.unmerge_adapter()
    with model.use_task("sst2"):
        model.merge_adapter(task="rte")
        with pytest.raises(ValueError, match=message):
            logits(model)


def test_a_merged_layer_that_is_called_by_itself_refuses_another_task_too():
    model = adapted("mlp")
    layer = model.get_base_model().lin0
    x = CASES["mlp"].inputs()["x"]
    expected = layer(x, task_ids=0)
    model.merge_adapter(task=0)
    torch.testing.assert_close(layer(x, task_ids=0), expected)
    with pytest.raises(ValueError, match="Task 'rte' of adapter 'default' is merged"):
        layer(x, task_ids=1)


def test_a_merged_adapter_is_not_deleted():
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 0))
    model.merge_adapter(task=0)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_disabling_a_merged_adapter_takes_it_out_of_the_weights():
    model = adapted()
    with model.disable_adapter():
        base = logits(model)
    sst2 = logits(model, task_ids="sst2")
    model.merge_adapter(task="rte")
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, **CLOSE)
    assert not any(layer.merged for layer in layers(model))
    torch.testing.assert_close(logits(model, task_ids="sst2"), sst2, **CLOSE)


def test_disabling_takes_the_task_out_of_layers_that_were_not_called_too():
    model = adapted("t5")
    sst2 = logits(model, "t5", task_ids="sst2")
    model.merge_adapter(task="rte")
    with model.disable_adapter():  # the encoder alone
        model.get_base_model().get_encoder()(input_ids=CASES["t5"].inputs()["input_ids"])
    torch.testing.assert_close(logits(model, "t5", task_ids="sst2"), sst2, **CLOSE)


def test_choosing_another_adapter_unmerges_with_a_warning():
    model = two_adapters()
    x = logits(model, task_ids=0)
    model.merge_adapter(task=0)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(model, task_ids=0), x, **CLOSE)
    logits(model, task_ids=1)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged, nothing to do"):
        adapted("mlp").unmerge_adapter()


# ---------------------------------------------------------------------------------------------------------- safe merge
def poisons() -> dict:
    """What makes a merged weight not finite, at one place of one late layer."""

    def skill(model):
        layers(model)[-1].poly_lora_A["default"].data[0, 1, 2, 0] = torch.nan

    def infinity(model):
        layers(model)[-2].poly_lora_B["default"].data[0, 1, 0, 0] = torch.inf

    def router(model):
        layers(model)[-1].poly_router["default"].module_logits.data[0, 1] = torch.nan

    def base(model):
        layers(model)[-1].base_layer.weight.data[0, 0] = torch.nan

    return {"skill": skill, "infinity": infinity, "router": router, "base": base}


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("poison", poisons())
def test_a_safe_merge_that_would_not_be_finite_leaves_every_weight_bit_equal(poison, verb):
    model = adapted()
    poisons()[poison](model)
    before = weights(model)
    with pytest.raises(ValueError, match=r"The merged weight of .*layers\.1\..* is not finite"):
        getattr(model, verb)(task="rte", safe_merge=True)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7))] == []
    assert len(layers(model)) == 14
    assert not any(layer.merged for layer in layers(model))
    assert logits(model, task_ids="sst2").shape == (3, 5, 61)


def test_a_router_row_that_is_not_finite_stops_the_merge_of_its_own_task_only():
    model = adapted()
    poisons()["router"](model)
    expected = logits(naive_merge(model.get_base_model(), 1))
    with pytest.raises(ValueError, match="is not finite"):
        model.merge_adapter(task=0, safe_merge=True)
    model.merge_adapter(task=1, safe_merge=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_a_failed_safe_merge_of_a_second_adapter_leaves_the_first_one_merged():
    model = two_adapters()
    model.merge_adapter(adapter_names=["one"], task="rte")
    last = [layer for layer in layers(model) if "two" in layer.poly_lora_A][-1]
    last.poly_lora_A["two"].data.fill_(torch.nan)
    before = weights(model)
    with pytest.raises(ValueError, match="adapter 'two'"):
        model.merge_adapter(adapter_names=["two"], task="x", safe_merge=True)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7))] == []
    assert all(layer.merged_adapters == ["one"] for layer in layers(model))


def test_a_safe_merge_of_finite_weights_is_the_merge():
    safe, plain = adapted(), adapted()
    plain.load_state_dict(safe.state_dict())
    safe.merge_adapter(task=1, safe_merge=True)
    plain.merge_adapter(task=1)
    assert_same(safe, weights(plain))


# ----------------------------------------------------------------------------------------------------- several adapters
def dense_of_two(model: peft.PeftModel, one: int, two: int) -> torch.Tensor:
    """Both updates, each of its own task, in a dense copy."""
    base = model.get_base_model()
    dense = copy.deepcopy(base)
    for adapter, task in (("one", one), ("two", two)):
        for name, layer in base.named_modules():
            if isinstance(layer, PolyLayer) and adapter in layer.poly_lora_A:
                A, B = naive_pair(layer, adapter, task)
                weight = dense.get_submodule(name).base_layer.weight
                weight.data += (A @ B * layer.lora_alpha[adapter] / layer.r[adapter]).T.float()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, PolyLayer):
            setattr(dense.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base_layer)
    return logits(dense)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_several_adapters_are_merged_each_with_its_task(verb):
    model = two_adapters()
    expected = dense_of_two(model, 2, 1)
    merged = getattr(model, verb)(task={"one": "boolq", "two": "y"}) or model
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_adapters_can_be_merged_one_after_the_other_and_come_out_together():
    model = two_adapters()
    before, expected = weights(model), dense_of_two(model, 0, 1)
    model.merge_adapter(adapter_names=["one"], task="rte")
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(adapter_names=["two"], task="y")
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.unmerge_adapter()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=1e-6)


def test_one_of_several_adapters_can_be_merged_into_the_base_model_alone():
    model = two_adapters()
    expected = logits(naive_merge(model.get_base_model(), 1, ("one",)))
    merged = model.merge_and_unload(adapter_names=["one"], task=1)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_an_adapter_without_a_task_in_the_dict_is_refused():
    model = two_adapters()
    before = weights(model)
    with pytest.raises(ValueError, match="Adapter 'two' has 2 tasks, and this needs one of them"):
        model.merge_adapter(task={"one": "rte"})
    assert_same(model, before)


# ------------------------------------------------------------------------------------------- merged, then taken out
def test_merge_and_unload_of_a_merged_model_adds_nothing():
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 1))
    model.merge_adapter(task="sst2")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert_plain(merged, llama())


def test_merge_and_unload_of_a_merged_model_refuses_another_task():
    model = adapted()
    model.merge_adapter(task="sst2")
    with pytest.raises(ValueError, match="merged already, with task 'sst2'"):
        model.merge_and_unload(task="rte")
    assert_plain(model.merge_and_unload(task="sst2"), llama())


def test_unload_of_a_merged_model_keeps_what_is_merged():
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 1))
    model.merge_adapter(task="sst2")
    torch.testing.assert_close(logits(model.unload()), expected, **CLOSE)  # as PEFT's LoRA does


def test_an_unloaded_model_takes_a_new_adapter():
    merged = adapted().merge_and_unload(task=0)
    expected = logits(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = peft.get_peft_model(merged, poly(init_weights=True)).eval()
    torch.testing.assert_close(logits(again, task_ids=[0, 1, 2]), expected)


def test_progress_bar_and_positions_of_the_arguments_are_those_of_peft(capsys):
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 0))
    torch.testing.assert_close(logits(model.merge_and_unload(True, True, ["default"], 0)), expected, **CLOSE)
    assert "Unloading and merging model" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- kinds of layer
def test_a_bf16_weight_is_merged_in_float32_and_rounded_once():
    model = spread(peft.get_peft_model(llama().to(torch.bfloat16), poly())).eval()
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, PolyLayer):
            A, B = naive_pair(layer, "default", 1)
            assert layer.poly_lora_A["default"].dtype == torch.float32
            expected[name] = layer.base_layer.weight.float() + (A @ B * (2 / 3)).T.float()
    model.merge_adapter(task="sst2", safe_merge=True)
    for name, wanted in expected.items():
        weight = model.get_base_model().get_submodule(name).base_layer.weight
        assert weight.dtype == torch.bfloat16
        half_a_unit_in_the_last_place = torch.exp2(wanted.abs().log2().floor() - 8)
        assert ((weight.float() - wanted).abs() <= half_a_unit_in_the_last_place * 1.001).all()


def test_a_bf16_model_runs_merged_and_comes_close_to_its_routed_self():
    model = spread(peft.get_peft_model(llama().to(torch.bfloat16), poly())).eval()
    routed = logits(model, task_ids="sst2")
    model.merge_adapter(task="sst2")
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), routed, rtol=0.05, atol=0.03)


def test_tied_embeddings_stay_tied_and_untouched():
    base = gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    before = base.lm_head.weight.clone()
    model = spread(peft.get_peft_model(base, poly("gpt2"))).eval()
    expected = logits(naive_merge(model.get_base_model(), 0), "gpt2")
    merged = model.merge_and_unload(task=0)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.equal(merged.lm_head.weight, before)
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged, "gpt2"), expected, **CLOSE)


def test_merging_into_a_tied_layer_warns_as_peft_does_for_lora():
    model = adapted("gpt2", target_modules=["lm_head"], n_splits=1)
    with pytest.warns(UserWarning, match=r"tied_target_modules=\['lm_head'\] are part of the adapter"):
        model.merge_adapter(task=0)


def test_a_layer_of_an_injected_adapter_merges_and_unmerges_by_itself():
    model = inject_adapter_in_model(poly("mlp"), MLP())
    spread(model).eval()
    expected = logits(naive_merge(model, 2), "mlp")
    for layer in layers(model):
        layer.merge(task="boolq")
    torch.testing.assert_close(logits(model, "mlp"), expected, **CLOSE)
    with pytest.raises(ValueError, match="is merged into the base weights"), use_task(model, "rte"):
        logits(model, "mlp")
    for layer in layers(model):
        layer.unmerge()
    with use_task(model, "rte"):
        logits(model, "mlp")


# ----------------------------------------------------------------------------------------------- delta weights and LoRA
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_delta_weight_is_the_update_in_the_layout_of_the_base_weight(case):
    model = adapted(case)
    for layer in layers(model):
        A, B = naive_pair(layer, "default", 1)
        delta = A @ B * (2 / 3)
        wanted = delta if isinstance(layer.get_base_layer(), Conv1D) else delta.T
        found = layer.get_delta_weight("default", "sst2")
        assert found.shape == layer.get_base_layer().weight.shape
        torch.testing.assert_close(found.double(), wanted, **CLOSE)


def test_the_delta_weight_needs_a_task():
    layer = layers(adapted("mlp"))[0]
    with pytest.raises(ValueError, match="has 3 tasks, and this needs one of them"):
        layer.get_delta_weight("default")
    layer.task_context.default = "rte"
    assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("default", 0))


def test_lora_conversion_is_supported_once_the_task_is_known():
    model = adapted("mlp")
    assert not model.supports_lora_conversion()
    model.set_task("rte")
    assert model.supports_lora_conversion()
    assert adapted("mlp", n_tasks=1).supports_lora_conversion()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_lora_that_peft_converts_a_task_to_is_the_task(case):
    model = adapted(case)
    expected = logits(naive_merge(model.get_base_model(), 2), case)
    model.set_task("boolq")
    config, state_dict = peft.convert_to_lora(model, rank=3)
    assert isinstance(config, LoraConfig)
    model.set_task(None)
    lora = peft.get_peft_model(model.unload(), config).eval()
    peft.set_peft_model_state_dict(lora, state_dict)
    torch.testing.assert_close(logits(lora, case), expected, **CLOSE)


def test_the_lora_that_peft_saves_of_a_task_loads(tmp_path):
    model = adapted()
    expected = logits(naive_merge(model.get_base_model(), 1))
    model.set_task("sst2")
    peft.save_as_lora(tmp_path, model, rank=3)
    lora = peft.PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(lora), expected, **CLOSE)


def test_without_a_task_peft_refuses_the_conversion():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapted("mlp"), rank=3)
