"""Low precision, autocast, and loading by way of the meta device, as a LoRA user knows them.

References: the naive dense model of `tiny.py` in float32, PEFT's LoRA in the same place, an ordinary load.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapters import GATES, adapt, poly, trainable
from peft.helpers import disable_input_dtype_casting
from tiny import CASES, MLP, first, llama, naive_merge
from torch import nn

from peft_poly import PolyLayer, use_task

GRANULARITIES = ["layer", "block", "model"]
IDS = [2, 0, 1]
KINDS = pytest.mark.parametrize("settings", [{}, GATES], ids=["poly", "gates"])


def adapter_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if ".poly_" in name}


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "settings"), [*((case, {}) for case in ("llama", "t5", "gpt2", "mlp")), ("llama", GATES), ("gpt2", GATES)],
    ids=str,
)  # fmt: skip
def test_the_adapter_is_float32_and_the_output_has_the_dtype_of_the_base(case, settings, dtype):
    base, inputs = CASES[case].make().to(dtype), CASES[case].inputs()
    if case == "mlp":
        inputs = {"x": inputs["x"].to(dtype)}
    wanted_dtype = first(base(**inputs)).dtype
    model = adapt(base, poly(case, **settings))
    assert adapter_dtypes(model) == {torch.float32}
    routed = first(model(**inputs, task_ids=1))
    assert routed.dtype == wanted_dtype == dtype
    exact = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    reference = first(naive_merge(model.get_base_model(), 1).float()(**exact))
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(routed.float(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(tmp_path, dtype, low_cpu_mem_usage, granularity):
    adapt(MLP(), poly("mlp", router_granularity=granularity)).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = peft.PeftModel.from_pretrained(
            MLP().to(dtype), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert adapter_dtypes(model) == {torch.float32}
        wanted = {name for name, _ in model.named_parameters() if ".poly_" in name} if is_trainable else set()
        assert trainable(model) == wanted
        model.load_adapter(tmp_path, "more", low_cpu_mem_usage=low_cpu_mem_usage)
        assert trainable(model) == wanted
        assert adapter_dtypes(model) == {torch.float32}


def test_without_autocast_adapter_dtype_the_adapter_keeps_the_dtype_of_the_base(tmp_path):
    model = adapt(MLP().bfloat16(), poly("mlp"), autocast_adapter_dtype=False)
    assert adapter_dtypes(model) == {torch.bfloat16}
    model.add_adapter("more", poly("mlp"), autocast_adapter_dtype=False)
    assert adapter_dtypes(model) == {torch.bfloat16}
    x = CASES["mlp"].inputs()["x"]
    routed = model(x.bfloat16(), task_ids=IDS)
    assert routed.dtype == torch.bfloat16
    rows = [naive_merge(model.get_base_model(), task).float()(x[[row]]) for row, task in enumerate(IDS)]
    torch.testing.assert_close(routed.float(), torch.cat(rows), atol=6e-2, rtol=6e-2)

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path, autocast_adapter_dtype=False)
    assert adapter_dtypes(loaded) == {torch.bfloat16}
    assert torch.equal(loaded(x.bfloat16(), task_ids=IDS), routed)


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(training, settings):
    base, x = MLP(), CASES["mlp"].inputs()["x"]
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["lin0", "lin1"]))
    model = adapt(base, poly("mlp", router_noise=False, **settings)).train(training)
    exact = model(x, task_ids=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        routed = model(x, task_ids=IDS)
        assert routed.dtype == lora(x).dtype == torch.bfloat16
    torch.testing.assert_close(routed.float(), exact, atol=5e-2, rtol=5e-2)
    routed.float().square().sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".poly_" in name]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@torch.no_grad()
@pytest.mark.parametrize("method", ["poly", "lora"])
def test_input_dtype_casting_can_be_turned_off(method):
    config = poly("mlp") if method == "poly" else peft.LoraConfig(target_modules=["lin0", "lin1"])
    model = peft.get_peft_model(MLP().bfloat16(), config).eval()  # the adapter is float32
    if method == "poly":
        model.set_task(1)
    x = CASES["mlp"].inputs()["x"].bfloat16()
    before = model(x)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert torch.equal(model(x), before)
    with disable_input_dtype_casting(model, active=False):
        assert torch.equal(model(x), before)


# ------------------------------------------------------------------------------------------- loading without memory
@torch.no_grad()
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("case", "settings"), [("llama", {"n_splits": 2}), ("bert", {"n_splits": 2}), ("llama", GATES)], ids=str
)
def test_loading_by_way_of_the_meta_device_equals_ordinary_loading(tmp_path, case, settings, granularity):
    base, inputs = CASES[case].make().eval(), CASES[case].inputs()
    targets = CASES[case].target_modules[:3]  # the heads of BERT are to be saved, not adapted
    config = poly(case, target_modules=targets, router_granularity=granularity, **settings)
    model = adapt(copy.deepcopy(base), config)
    wanted = first(model(**inputs, task_ids=IDS))
    model.save_pretrained(tmp_path)

    ordinary = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    frugal = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert not on_meta(frugal)
    for loaded in (ordinary, frugal):
        loaded.load_adapter(tmp_path, "more", low_cpu_mem_usage=loaded is frugal)
        assert not on_meta(loaded)
        for name in ("default", "more"):
            loaded.set_adapter(name)
            assert torch.equal(first(loaded.eval()(**inputs, task_ids=IDS)), wanted)
    assert ordinary.state_dict().keys() == frugal.state_dict().keys()
    assert all(torch.equal(value, frugal.state_dict()[key]) for key, value in ordinary.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("granularity", "routers"), [("layer", 14), ("block", 2), ("model", 1)])
def test_shared_routers_are_saved_once_and_load_back_shared(
    tmp_path, granularity, routers, low_cpu_mem_usage, dtype, settings
):
    model = adapt(llama(), poly("llama", router_granularity=granularity, **settings))
    model.save_pretrained(tmp_path)
    saved = peft.utils.save_and_load.load_peft_weights(str(tmp_path), device="cpu")
    assert len([key for key in saved if key.endswith("module_logits")]) == routers
    loaded = peft.PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    logits = [m.poly_router["default"].module_logits for m in loaded.modules() if isinstance(m, PolyLayer)]
    assert len(logits) == 14
    assert len({id(parameter) for parameter in logits}) == routers
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@torch.no_grad()
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_injecting_on_the_meta_device_and_filling_equals_an_ordinary_injection(granularity):
    base, inputs = MLP(), CASES["mlp"].inputs()
    config = poly("mlp", router_granularity=granularity)
    model = adapt(copy.deepcopy(base), config)
    injected = peft.inject_adapter_in_model(config, copy.deepcopy(base), low_cpu_mem_usage=True).eval()
    assert on_meta(injected)
    state_dict = peft.get_peft_model_state_dict(model)
    state_dict = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    peft.set_peft_model_state_dict(injected, state_dict, low_cpu_mem_usage=True)
    assert not on_meta(injected)
    with use_task(injected, IDS):
        assert torch.equal(injected(**inputs), model(**inputs, task_ids=IDS))
