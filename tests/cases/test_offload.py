"""Adapters that accelerate keeps on the CPU or on disk: as if they had never left."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from adapters import adapt, poly
from tiny import CASES, TASKS, first, llama, naive_merge
from torch import nn

from peft_poly import PolyConfig, PolyLayer, use_task
from peft_poly.insight.analysis import read_routing

CPU = torch.device("cpu")
MIXED = ["rte", "boolq", "rte"]


def blocks(model: nn.Module, places: tuple[str, str]) -> dict[str, str]:
    """A device map with the two blocks of a tiny Llama in `places`, and the rest on the CPU."""
    prefix = "base_model.model.model." if isinstance(model, peft.PeftModel) else "model."
    others = {f"{prefix}{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    head = prefix.removesuffix("model.") + "lm_head"
    return {f"{prefix}layers.0": places[0], f"{prefix}layers.1": places[1], head: "cpu", **others}


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "map of disk": lambda model, folder: dispatch_model(
        model, blocks(model, ("disk", "disk")), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "map of both": lambda model, folder: dispatch_model(
        model, blocks(model, ("cpu", "disk")), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "whole blocks": lambda model, folder: dispatch_model(
        model, blocks(model, ("disk", "disk")), main_device="cpu", offload_dir=folder, force_hooks=True,
        preload_module_classes=["LlamaDecoderLayer"],
    ),
}  # fmt: skip
each_offload = pytest.mark.parametrize("where", list(OFFLOADS))


def made(case: str = "llama", **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    return adapt(CASES[case].make(), poly(case, task_names=TASKS, n_tasks=None, **settings))


@pytest.fixture(autouse=True)
def _files_of_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes weights that it offloads again beside where it is called


def offloaded(model: nn.Module, where: str, folder) -> nn.Module:
    return OFFLOADS[where](model, str(folder / "offload"))


def same(where: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit-equal; where whole blocks are loaded at once, routers are not worked out together, and it is to rounding."""
    if where == "whole blocks":
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)


def is_away(model: nn.Module) -> bool:
    return any(layer.poly_lora_A["default"].is_meta for layer in model.modules() if isinstance(layer, PolyLayer))


@each_offload
@pytest.mark.parametrize("ids", [MIXED, "sst2"], ids=str)
def test_outputs_are_bit_equal_to_those_of_a_model_that_is_here(where, ids, tmp_path):
    inputs = CASES["llama"].inputs()
    with torch.no_grad():
        want = made()(**inputs, task_ids=ids).logits
        model = offloaded(made(), where, tmp_path)
        assert is_away(model)
        for _ in range(2):
            same(where, model(**inputs, task_ids=ids).logits, want)
    same(where, model(**inputs, task_ids=ids).logits, made()(**inputs, task_ids=ids).logits)  # with gradients on


@pytest.mark.parametrize(
    ("case", "granularity"), [("gpt2", "layer"), ("t5", "block"), ("bert", "model"), ("mlp", "layer")]
)
def test_other_models_and_shared_routers_are_right_too(case, granularity, tmp_path):
    inputs, settings = CASES[case].inputs(), {"router_granularity": granularity, "n_splits": 2}
    with torch.no_grad():
        want = first(made(case, **settings)(**inputs, task_ids=MIXED))
        for where in ("cpu", "disk"):
            model = offloaded(made(case, **settings), where, tmp_path / where)
            assert torch.equal(first(model(**inputs, task_ids=MIXED)), want)


@pytest.mark.parametrize("where", ["cpu", "map of both"])
def test_generation_is_the_same(where, tmp_path):
    inputs = {"input_ids": CASES["llama"].inputs()["input_ids"], "max_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        want = made().generate(**inputs, task_ids=MIXED, num_beams=beams)
        got = offloaded(made(), where, tmp_path).generate(**inputs, task_ids=MIXED, num_beams=beams)
        assert torch.equal(got, want)


def test_the_draws_of_training_mode_are_the_same(tmp_path):
    outputs = []
    for model in (made(lora_dropout=0.2), offloaded(made(lora_dropout=0.2), "cpu", tmp_path)):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model.train()(**CASES["llama"].inputs(), task_ids=MIXED).logits)
    assert torch.equal(*outputs)


def test_models_with_the_adapter_injected_are_right(tmp_path):
    config, x = PolyConfig(target_modules=["0", "2"], init_weights=False, n_tasks=2), torch.randn(3, 8)
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))).eval()
    with torch.no_grad(), use_task(model, [0, 1, 0]):
        want = model(x)
        assert torch.equal(cpu_offload(model, execution_device=CPU)(x), want)


# ------------------------------------------------------------------------------------------------------------- verbs
@pytest.mark.parametrize("where", ["cpu", "disk", "map of both"])
def test_a_merge_is_the_same_and_can_be_taken_back(where, tmp_path):
    inputs, here, away = CASES["llama"].inputs(), made(), offloaded(made(), where, tmp_path)
    with torch.no_grad():
        for model in (here, away):
            model.merge_adapter(task="sst2")
        assert torch.equal(away(**inputs).logits, here(**inputs).logits)
        for model in (here, away):
            model.unmerge_adapter()
        assert torch.equal(away(**inputs, task_ids=MIXED).logits, here(**inputs, task_ids=MIXED).logits)
        merged = [model.merge_and_unload(task="rte", safe_merge=True) for model in (here, away)]
        assert torch.equal(merged[1](**inputs).logits, merged[0](**inputs).logits)
        want = naive_merge(made(), 0)(**inputs).logits
        torch.testing.assert_close(merged[1](**inputs).logits, want)


@pytest.mark.parametrize("where", ["cpu", "disk", "whole blocks"])
def test_saving_and_exporting_write_the_same_tensors(where, tmp_path):
    from safetensors.torch import load_file

    here, away = made(), offloaded(made(), where, tmp_path)
    for name, model in (("here", here), ("away", away)):
        model.save_pretrained(tmp_path / name / "saved")
        model.export_lora("boolq", tmp_path / name / "lora")
    for kind in ("saved", "lora"):
        file = "adapter_model.safetensors"
        tensors = [load_file(tmp_path / name / kind / file) for name in ("here", "away")]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())
    assert is_away(away)


def test_modules_to_save_are_saved_with_it(tmp_path):
    inputs = CASES["bert"].inputs()
    away = offloaded(made("bert"), "cpu", tmp_path)
    away.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(CASES["bert"].make(), tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs, task_ids="rte").logits, away(**inputs, task_ids="rte").logits)


@pytest.mark.parametrize(
    ("where", "granularity"),
    [("cpu", "layer"), ("map of disk", "model"), ("map of both", "block"), ("whole blocks", "layer")],
)
def test_looking_growing_shrinking_and_averaging_are_the_same(where, granularity, tmp_path):
    inputs = CASES["llama"].inputs()
    here = made(router_granularity=granularity)
    away = offloaded(made(router_granularity=granularity), where, tmp_path)

    def agree(ids):
        with torch.no_grad():
            same(where, away(**inputs, task_ids=ids).logits, here(**inputs, task_ids=ids).logits)
        for key, weights in here.routing_weights().items():
            assert torch.equal(away.routing_weights()[key], weights)
        assert all(torch.equal(read_routing(away).weights[k], w) for k, w in read_routing(here).weights.items())

    agree(MIXED)
    for model in (here, away):
        model.add_tasks(["new", "newer"], init="rte")
    agree(["new", "sst2", "newer"])
    for model in (here, away):
        model.remove_tasks("sst2")
    agree(["new", "rte", "boolq"])
    for model in (here, away):
        model.average_skills()
    agree(["new", "rte", "boolq"])
    assert is_away(away)
    if where == "whole blocks":
        return
    layer = [next(m for m in model.modules() if isinstance(m, PolyLayer)) for model in (away, here)]
    assert torch.equal(layer[0].get_delta_weight("default", "rte"), layer[1].get_delta_weight("default", "rte"))


def test_an_adapter_that_joins_later_is_found(tmp_path):
    inputs = CASES["llama"].inputs()
    made(init_weights=False).save_pretrained(tmp_path / "saved")
    here, away = made(), offloaded(made(), "cpu", tmp_path)
    for model in (here, away):
        torch.manual_seed(5)
        model.add_adapter("later", poly("llama", task_names=["x", "y"], n_tasks=None))
        model.load_adapter(tmp_path / "saved", "loaded")
        model.load_adapter(tmp_path / "saved", "default")
    for name, ids in (("later", ["x", "y", "x"]), ("loaded", MIXED), ("default", MIXED)):
        for model in (here, away):
            model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(away(**inputs, task_ids=ids).logits, here(**inputs, task_ids=ids).logits)


@pytest.mark.parametrize(("where", "low_cpu_mem_usage"), [("cpu", False), ("disk", True), ("map of both", False)])
def test_an_adapter_is_opened_and_made_on_a_base_that_is_offloaded(where, low_cpu_mem_usage, tmp_path):
    made().save_pretrained(tmp_path / "saved")
    inputs, usage = CASES["llama"].inputs(), {"low_cpu_mem_usage": low_cpu_mem_usage}
    torch.manual_seed(0)
    base = offloaded(llama(), where, tmp_path)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "saved", **usage).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, task_ids=MIXED).logits, made()(**inputs, task_ids=MIXED).logits)
    torch.manual_seed(0)
    base = offloaded(llama(), where, tmp_path / "again")
    model = adapt(base, poly("llama", task_names=TASKS, n_tasks=None))
    assert not is_away(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, task_ids=MIXED).logits, made()(**inputs, task_ids=MIXED).logits)


# ------------------------------------------------------------------------------------------------- what cannot be done
def test_merging_what_lies_in_blocks_that_are_loaded_whole_is_an_error(tmp_path):
    """PEFT loads a layer for its merge, not the block around it."""
    model = offloaded(made(), "whole blocks", tmp_path)
    with pytest.raises(ValueError, match="are on the meta device"):
        model.merge_adapter(task="rte")


def test_tensors_that_are_nowhere_are_an_error_before_anything_is_computed():
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), poly("llama"), low_cpu_mem_usage=True).eval()
    inputs = CASES["llama"].inputs()
    for gradients in (False, True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(ValueError, match=r"an adapter in \['default'\] are on the meta device in .*q_proj"),
        ):
            model(**inputs, task_ids=1)
    with pytest.raises(ValueError, match=r"are on the meta device"):
        model.merge_adapter(task=1)
    with torch.no_grad():  # to learn shapes is no mistake
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), PolyConfig(target_modules=["0"], n_tasks=2))
        assert model.to("meta")(torch.empty(3, 8, device="meta"), task_ids=[0, 1, 0]).shape == (3, 4)


@pytest.mark.parametrize("regime", ["train_all", "train_router_only", "average_skills"])
def test_training_what_is_offloaded_is_an_error_where_gradients_would_be_lost(tmp_path, regime):
    inputs, model = CASES["llama"].inputs(), made()
    getattr(model, regime)()
    model = offloaded(model, "cpu", tmp_path)
    loss = model(**inputs, labels=inputs["input_ids"], task_ids=MIXED).loss
    with pytest.raises(RuntimeError, match="An adapter that accelerate offloads cannot be trained"):
        loss.backward()


def test_lora_is_the_measure(tmp_path):
    """What the tests above ask for is what a LoRA gives."""
    inputs = CASES["llama"].inputs()
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)

    def lora() -> peft.PeftModel:
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), config).eval()

    with torch.no_grad():
        for where in ("cpu", "map of both"):
            away = offloaded(lora(), where, tmp_path / where)
            assert torch.equal(away(**inputs).logits, lora()(**inputs).logits)
