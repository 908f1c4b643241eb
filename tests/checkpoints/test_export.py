"""A task's exported LoRA needs nothing but PEFT, or numpy, and computes what the task computes.

References: a dense merge of a naive mix (tiny.py), a process that never imports this package, a numpy recomputation of
W + (alpha / r) B A from the files alone, and PEFT's LoRA serving a mixed batch.
"""

import contextlib
import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file
from tiny import CASES, MLP, TASKS, first, naive_merge
from torch import nn

import peft_poly
from peft_poly import PolyConfig, PolyLayer
from peft_poly.adapter.targets import exact_targets
from peft_poly.checkpoints.export import export_lora, folder_names

HERE = Path(__file__).parents[1]  # the upstream process makes its models with `tiny`


def adapt(case, base=None, adapter_name="default", **settings):
    """A task-routed model whose tasks differ, in eval mode."""
    base = CASES[case].make() if base is None else base
    settings = {"r": 4, "n_splits": 2, "n_skills": 3, "task_names": TASKS, "lora_alpha": 3, **settings}
    settings = {"target_modules": CASES[case].target_modules, "task_type": CASES[case].task_type, **settings}
    model = peft.get_peft_model(base, PolyConfig(init_weights=False, **settings), adapter_name=adapter_name).eval()
    for layer in poly_layers(model).values():
        nn.init.normal_(layer.poly_router[adapter_name].module_logits, std=2.0)
    return model


def poly_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PolyLayer)}


@contextlib.contextmanager
def quiet():
    """PEFT and our own export warn of the classification head; tests that are not about that do not care."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Beside its low-rank pairs|.*modules_to_save.*|.*fan_in_fan_out.*")
        yield


def export(model, task, folder, **kwargs):
    with quiet():
        return export_lora(model, task, folder, **kwargs)


@torch.no_grad()
def outputs(model, inputs, **kwargs):
    return first(model(**inputs, **kwargs))


def adapted(model):
    """Names, in the base model, of the layers that a PEFT LoRA adapts."""
    return {name for name, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}


def load(base, folder, **kwargs):
    with quiet():
        return PeftModel.from_pretrained(base, folder, **kwargs).eval()


# ------------------------------------------------------------------------------------------------- equal outputs
FRESH = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from tiny import CASES, first
root, differences = Path(sys.argv[1]), {}
for case in CASES:
    saved = torch.load(root / case / "saved.pt")
    for task, wanted in saved["outputs"].items():
        base = CASES[case].make()
        base.load_state_dict(saved["base"])
        model = PeftModel.from_pretrained(base, root / case / "loras" / task).eval()
        with torch.no_grad():
            differences[f"{case} {task}"] = (first(model(**CASES[case].inputs())) - wanted).abs().max().item()
print(json.dumps({"imported": "peft_poly" in sys.modules, "differences": differences}))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """What a process that has only PEFT makes of the exported tasks of every case."""
    root = tmp_path_factory.mktemp("exported")
    for case in CASES:
        torch.manual_seed(0)
        base = CASES[case].make()
        state = copy.deepcopy(base.state_dict())
        model = adapt(case, base)
        wanted = {task: outputs(naive_merge(model, i), CASES[case].inputs()) for i, task in enumerate(TASKS)}
        export(model, None, root / case / "loras")
        torch.save({"base": state, "outputs": wanted}, root / case / "saved.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(root)], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_upstream_peft_loads_every_task_without_this_package(fresh_process, case):
    assert not fresh_process["imported"]
    for task in TASKS:
        assert fresh_process["differences"][f"{case} {task}"] < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_numpy_and_the_files_alone_give_the_same_logits(case, tmp_path):
    base = CASES[case].make().eval()
    model = adapt(case, copy.deepcopy(base))
    wanted = outputs(model, CASES[case].inputs(), task_ids="sst2")
    export(model, "sst2", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    weights = dict(base.named_parameters())
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        delta = config["lora_alpha"] / config["r"] * (B.astype(np.float64) @ A)
        transposed = type(base.get_submodule(path)).__name__ == "Conv1D"
        weights[f"{path}.weight"].data += torch.tensor(delta.T if transposed else delta, dtype=torch.float32)
    for key in [key for key in tensors if "lora_" not in key]:
        weights[key.removeprefix("base_model.model.")].data = torch.tensor(tensors[key])
    torch.testing.assert_close(outputs(base, CASES[case].inputs()), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["t5", "llama", "gpt2", "bert"])
def test_a_mixed_batch_of_peft_loras_equals_ours(case, tmp_path):
    base = CASES[case].make()
    model = adapt(case, copy.deepcopy(base))
    rows = ["boolq", "rte", "sst2", "rte", "boolq"]
    inputs = CASES[case].inputs(rows=len(rows))
    wanted = outputs(model, inputs, task_ids=rows)
    folders = export(model, None, tmp_path / "loras")
    served = load(base, folders["rte"], adapter_name="rte")
    for task in ("sst2", "boolq"):
        served.load_adapter(folders[task], adapter_name=task)
    torch.testing.assert_close(outputs(served, inputs, adapter_names=rows), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_splits", [1, 2, 4])
def test_a_lora_is_exact_for_any_number_of_splits(n_splits, tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base), n_splits=n_splits, r=3, lora_alpha=5)
    export(model, 2, tmp_path / "lora")
    inputs = CASES["llama"].inputs()
    wanted = outputs(naive_merge(model, 2), inputs)
    torch.testing.assert_close(outputs(load(base, tmp_path / "lora"), inputs), wanted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what servers read
def test_the_config_says_what_servers_read(tmp_path):
    model = adapt("llama", r=4, lora_alpha=3)
    export(model, "rte", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert sorted(config["target_modules"]) == sorted(CASES["llama"].target_modules)
    assert (config["bias"], config["modules_to_save"], config["task_type"]) == ("none", None, "CAUSAL_LM")
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["inference_mode"]


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_laid_out_as_lora(case, tmp_path):
    model = adapt(case)
    export(model, "rte", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    layers = poly_layers(model)
    assert {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key} == set(layers)
    for name, layer in layers.items():
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert (A.shape, B.shape) == ((4, layer.in_features), (layer.out_features, 4))
        assert A.dtype == B.dtype == np.float32


@pytest.mark.parametrize(("case", "flag"), [("gpt2", True), ("llama", False)])
def test_fan_in_fan_out_is_set_for_conv1d(case, flag, tmp_path):
    export(adapt(case), 0, tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["fan_in_fan_out"] is flag


def test_linear_and_conv1d_targets_together_load_as_a_lora(tmp_path):
    base = CASES["gpt2"].make()
    model = adapt("gpt2", copy.deepcopy(base), target_modules=["c_attn", "lm_head"], n_splits=1)
    export(model, 1, tmp_path / "lora")
    wanted = outputs(model, CASES["gpt2"].inputs(), task_ids=1)
    torch.testing.assert_close(
        outputs(load(base, tmp_path / "lora"), CASES["gpt2"].inputs()), wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("case", "settings", "by_suffix"),
    [
        ("llama", {"target_modules": "all-linear"}, True),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}, True),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, False),
        ("llama", {"target_modules": r".*\.0\.self_attn\.[qk]_proj"}, False),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, False),
        ("t5", {"target_modules": ["q", "v"]}, True),
        ("t5", {"target_modules": r"decoder.*\.q"}, False),
        ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}, False),
    ],
)
def test_target_modules_match_the_adapted_layers_and_nothing_else(case, settings, by_suffix, tmp_path):
    base = CASES[case].make()
    model = adapt(case, copy.deepcopy(base), **settings)
    export(model, 0, tmp_path / "lora")
    targets = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert all("." not in target for target in targets) is by_suffix
    assert adapted(load(base, tmp_path / "lora")) == {
        name.removeprefix("base_model.model.") for name in poly_layers(model)
    }


def test_a_name_that_ends_another_layers_name_is_told_apart(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0, self.inner = nn.Linear(16, 16), MLP()

        def forward(self, x):
            return self.inner(self.lin0(x))

    base = Nested()
    model = adapt("mlp", copy.deepcopy(base), target_modules="lin0")
    assert exact_targets(model.base_model.model, ["lin0"]) == "lin0"
    export(model, 0, tmp_path / "lora")
    assert adapted(load(base, tmp_path / "lora")) == {"lin0"}


# ------------------------------------------------------------------------------------------------- states of a model
def check_exports_task_1(model, base, folder, exporter=None, **kwargs):
    wanted = outputs(naive_merge(model, 1), CASES["llama"].inputs())
    export(model if exporter is None else exporter, 1, folder, **kwargs)
    torch.testing.assert_close(outputs(load(base, folder), CASES["llama"].inputs()), wanted, rtol=0, atol=1e-5)


def test_training_mode_exports_the_eval_routing_and_stays_training(tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base)).train()
    check_exports_task_1(model, base, tmp_path / "lora")
    assert all(module.training for module in model.modules())


def test_the_temperature_of_training_is_not_part_of_the_lora(tmp_path):
    base = CASES["llama"].make()
    check_exports_task_1(adapt("llama", copy.deepcopy(base), router_temperature=0.3), base, tmp_path / "lora")


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_shared_routers_are_exported(granularity, tmp_path):
    base = CASES["llama"].make()
    check_exports_task_1(adapt("llama", copy.deepcopy(base), router_granularity=granularity), base, tmp_path / "lora")


def test_the_tuner_itself_can_be_exported(tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base))
    check_exports_task_1(model, base, tmp_path / "lora", exporter=model.base_model)


def test_the_verb_of_the_model_exports(tmp_path):
    model = adapt("llama")
    with quiet():
        assert model.export_lora("rte", tmp_path / "lora") == tmp_path / "lora"
    assert (tmp_path / "lora/adapter_config.json").exists()


def test_an_injected_model_is_exported(tmp_path):
    base = CASES["llama"].make().eval()
    config = PolyConfig(target_modules=["q_proj", "v_proj"], r=4, n_tasks=2, n_skills=2, init_weights=False)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    export(model, 1, tmp_path / "lora")
    with peft_poly.use_task(model, 1):
        wanted = outputs(model, CASES["llama"].inputs())
    torch.testing.assert_close(
        outputs(load(base, tmp_path / "lora"), CASES["llama"].inputs()), wanted, rtol=0, atol=1e-5
    )


def test_a_merged_model_is_exported_as_before(tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base))
    wanted = outputs(naive_merge(model, 1), CASES["llama"].inputs())
    model.merge_adapter(task=0)
    export(model, 1, tmp_path / "lora")
    torch.testing.assert_close(
        outputs(load(base, tmp_path / "lora"), CASES["llama"].inputs()), wanted, rtol=0, atol=1e-5
    )


def test_a_changed_scale_is_part_of_the_lora(tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base))
    for layer in poly_layers(model).values():
        layer.set_scale("default", 0.5)
    wanted = outputs(model, CASES["llama"].inputs(), task_ids=1)
    export(model, 1, tmp_path / "lora")
    torch.testing.assert_close(
        outputs(load(base, tmp_path / "lora"), CASES["llama"].inputs()), wanted, rtol=0, atol=1e-5
    )


def test_one_of_several_adapters_is_exported_by_name(tmp_path):
    base = CASES["llama"].make()
    model = adapt("llama", copy.deepcopy(base))
    model.add_adapter("other", PolyConfig(target_modules=["q_proj"], r=2, n_tasks=2, init_weights=False))
    export(model, 1, tmp_path / "lora", adapter_name="other")
    model.set_adapter("other")
    wanted = outputs(model, CASES["llama"].inputs(), task_ids=1)
    served = load(base, tmp_path / "lora")
    assert {name.rpartition(".")[2] for name in adapted(served)} == {"q_proj"}
    torch.testing.assert_close(outputs(served, CASES["llama"].inputs()), wanted, rtol=0, atol=1e-5)


def test_a_bf16_adapter_is_exported_in_bf16(tmp_path):
    base = CASES["llama"].make().to(torch.bfloat16)
    settings = {"target_modules": ["q_proj", "v_proj"], "n_tasks": 2, "init_weights": False, "n_splits": 2}
    model = peft.get_peft_model(copy.deepcopy(base), PolyConfig(**settings), autocast_adapter_dtype=False).eval()
    export(model, 1, tmp_path / "lora")
    served = load(base, tmp_path / "lora", autocast_adapter_dtype=False)
    layer = next(m for m in served.modules() if isinstance(m, LoraLayer))
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    wanted, found = outputs(model, CASES["llama"].inputs(), task_ids=1), outputs(served, CASES["llama"].inputs())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    bare = outputs(CASES["llama"].make().to(torch.bfloat16), CASES["llama"].inputs())
    assert (bare - wanted).abs().max() > 0.05  # the tolerance means something


def test_a_bf16_base_with_the_usual_float32_adapter_is_exported_in_float32(tmp_path):
    model = adapt("llama", CASES["llama"].make().to(torch.bfloat16))
    export(model, 1, tmp_path / "lora")
    assert all(t.dtype == np.float32 for t in load_file(tmp_path / "lora/adapter_model.safetensors").values())


def test_a_quantised_base_is_exported(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    base = CASES["mlp"].make().eval()
    quantised = copy.deepcopy(base)
    for name, layer in list(quantised.named_children()):
        if isinstance(layer, nn.Linear):
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            setattr(quantised, name, new)
    model = adapt("mlp", quantised)
    export(model, 1, tmp_path / "lora")
    twin = adapt("mlp", copy.deepcopy(base))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "poly_" in k}, strict=False)
    wanted = outputs(naive_merge(twin, 1), CASES["mlp"].inputs())
    torch.testing.assert_close(outputs(load(base, tmp_path / "lora"), CASES["mlp"].inputs()), wanted, rtol=0, atol=1e-5)


def test_an_adapter_loaded_with_low_cpu_mem_usage_is_exported(tmp_path):
    base = CASES["llama"].make()
    adapt("llama", copy.deepcopy(base)).save_pretrained(tmp_path / "poly")
    model = load(copy.deepcopy(base), tmp_path / "poly", low_cpu_mem_usage=True)
    check_exports_task_1(model, base, tmp_path / "lora")


def test_modules_to_save_go_along_with_a_warning(tmp_path):
    base = CASES["bert"].make()
    model = adapt("bert", copy.deepcopy(base))
    head = model.base_model.model.classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    with pytest.warns(UserWarning, match=r"classifier\.bias.*some servers, vLLM among them, refuse"):
        export_lora(model, "rte", tmp_path / "lora")
    assert "classifier" in json.loads((tmp_path / "lora/adapter_config.json").read_text())["modules_to_save"]
    wanted = outputs(model, CASES["bert"].inputs(), task_ids="rte")
    torch.testing.assert_close(
        outputs(load(base, tmp_path / "lora"), CASES["bert"].inputs()), wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("head", ["plain", "saved", "adapted", "another's"])
def test_embeddings_that_changed_in_place_go_along_when_asked_for(head, tmp_path):
    base = CASES["llama"].make()
    untouched = copy.deepcopy(base)
    settings = {
        "saved": {"modules_to_save": ["lm_head"]},
        "adapted": {"target_modules": ["q_proj", "lm_head"], "n_splits": 1},
    }
    model = adapt("llama", base, **settings.get(head, {}))
    if head == "another's":
        other = PolyConfig(n_tasks=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model.add_adapter("b", other)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.original_module.weight")):
                p[-2:].normal_()
    with pytest.warns(UserWarning, match="whole tensor"):
        model.export_lora("sst2", tmp_path / "lora", adapter_name="default", save_embedding_layers=True)
    whole = [key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors") if ".lora_" not in key]
    ends = ["lm_head.base_layer" if head == "adapted" else "lm_head", "model.embed_tokens"]
    assert sorted(whole) == [f"base_model.model.{end}.weight" for end in ends]
    inputs = {"input_ids": torch.arange(base.config.vocab_size - 4, base.config.vocab_size)[None]}
    wanted = model.eval()(**inputs, task_ids="sst2").logits
    served = PeftModel.from_pretrained(untouched, tmp_path / "lora").eval()
    torch.testing.assert_close(served(**inputs).logits, wanted, atol=1e-5, rtol=0)


def test_an_injected_models_embeddings_go_along_when_asked_for(tmp_path):
    base = CASES["llama"].make()
    untouched = copy.deepcopy(base)
    config = PolyConfig(r=4, task_names=TASKS, target_modules=["q_proj"], init_weights=False)
    model = peft.inject_adapter_in_model(config, base).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:].normal_()
    with pytest.warns(UserWarning, match="whole tensor"):
        export_lora(model, "sst2", tmp_path / "lora", save_embedding_layers=True)
    inputs = {"input_ids": torch.arange(base.config.vocab_size - 4, base.config.vocab_size)[None]}
    served = PeftModel.from_pretrained(untouched, tmp_path / "lora").eval()
    with peft_poly.use_task(model, "sst2"):
        wanted = model(**inputs).logits
    torch.testing.assert_close(served(**inputs).logits, wanted, atol=1e-5, rtol=0)


def test_an_adapter_without_modules_to_save_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_lora(adapt("llama"), "rte", tmp_path / "lora")


# ------------------------------------------------------------------------------------------------- all tasks
def test_all_tasks_get_a_folder_each_and_the_line_that_serves_them(tmp_path, capsys):
    base = CASES["llama"].make()
    base.name_or_path = "some/llama"
    model = adapt("llama", base)
    folders = export_lora(model, None, tmp_path / "loras")
    assert folders == {task: tmp_path / "loras" / task for task in TASKS}
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == sorted(TASKS)
    line = capsys.readouterr().out.strip()
    assert line.startswith("vllm serve some/llama --enable-lora --max-lora-rank 8 --lora-modules rte=")
    assert line.split("--lora-modules ")[1].split() == [f"{task}={folders[task]}" for task in TASKS]
    for folder in folders.values():
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.base_model) == ("peft", "some/llama")
        assert "--lora-modules rte=./rte sst2=./sst2 boolq=./boolq" in card.text
        assert str(tmp_path) not in card.content


def test_each_folder_of_all_is_the_folder_of_the_one(tmp_path):
    model = adapt("llama")
    folders = export(model, None, tmp_path / "loras")
    for task in TASKS:
        export(model, task, tmp_path / task)
        one, of_all = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / task, folders[task]))
        assert one.keys() == of_all.keys()
        assert all(np.array_equal(one[key], of_all[key]) for key in one)


def test_tasks_without_names_are_named_by_their_ids(tmp_path):
    folders = export(adapt("mlp", task_names=None, n_tasks=2), None, tmp_path / "loras")
    assert folders == {"0": tmp_path / "loras/0", "1": tmp_path / "loras/1"}


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/b", "a_b"], ["a_b-0", "a_b"]),
        (["rte", "RTE"], ["rte", "RTE-1"]),
        (["../up", "..", "/"], ["_up", "task", "_"]),
        (["..", "task"], ["task-0", "task"]),
        (["-rf", ".hidden"], ["rf", "hidden"]),
        (["übersetzen", "déjà vu"], ["übersetzen", "déjà_vu"]),
        (["a=b", "a b", "a\nb"], ["a_b", "a_b-1", "a_b-2"]),
        (["x" * 300], ["x" * 80]),
    ],
)
def test_names_that_are_no_folder_names_are_made_safe_without_collision(names, folders):
    assert folder_names(PolyConfig(task_names=names)) == folders


def test_unsafe_names_stay_inside_the_target(tmp_path):
    names = ["../up", "a/b"]
    folders = export(adapt("mlp", task_names=names), None, tmp_path / "in" / "loras")
    assert list(folders) == names
    assert all(folder.parent == tmp_path / "in" / "loras" and folder.is_dir() for folder in folders.values())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ------------------------------------------------------------------------------------------------- refusals
def test_a_misspelt_task_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown task 'boolqq'\. Did you mean 'boolq'\?"):
        export_lora(adapt("mlp"), "boolqq", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("task", [3, -1])
def test_an_id_out_of_range_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 2\], got {task}"):
        export_lora(adapt("mlp"), task, tmp_path / "lora")


@pytest.mark.parametrize("task", [["rte", "sst2"], True, 1.0, torch.tensor(1)])
def test_what_is_not_one_task_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="must be one id, one name, or None for all tasks"):
        export_lora(adapt("mlp"), task, tmp_path / "lora")


def test_two_active_adapters_are_refused_when_none_is_named(tmp_path):
    model = adapt("mlp")
    model.add_adapter("other", PolyConfig(target_modules=["lin0"], n_tasks=3))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"Several adapters are active \(\['default', 'other'\]\).*adapter_name="):
        export_lora(model, 0, tmp_path / "lora")
    export_lora(model, 0, tmp_path / "lora", adapter_name="other")


def test_an_unknown_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no task-routed adapter 'nope'"):
        export_lora(adapt("mlp"), 0, tmp_path / "lora", adapter_name="nope")


def test_a_model_without_tasks_is_refused(tmp_path):
    model = peft.get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="PeftModel has no task-routed layers"):
        export_lora(model, 0, tmp_path / "lora")


def test_tensors_on_the_meta_device_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not all here: .* on device meta"):
        export_lora(adapt("mlp").to("meta"), 0, tmp_path / "lora")


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        export_lora(adapt("mlp"), 0, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["notes.txt"]


def test_overwrite_replaces_an_earlier_export(tmp_path):
    model = adapt("mlp")
    export(model, None, tmp_path / "loras")
    export(model, "rte", tmp_path / "loras", overwrite=True)
    assert (tmp_path / "loras/adapter_config.json").exists()
    assert not (tmp_path / "loras/sst2").exists()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(LoraConfig, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_lora(adapt("mlp"), None, tmp_path / "loras")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- PEFT's own way
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_peft_converts_the_set_task_by_svd(case, tmp_path):
    base = CASES[case].make()
    model = adapt(case, copy.deepcopy(base), r=4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)
    model.set_task("boolq")
    with quiet():
        peft.save_as_lora(tmp_path / "lora", model, rank=4)
    wanted = outputs(naive_merge(model, 2), CASES[case].inputs())
    torch.testing.assert_close(outputs(load(base, tmp_path / "lora"), CASES[case].inputs()), wanted, rtol=0, atol=1e-4)
