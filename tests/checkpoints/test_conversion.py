"""Checkpoints go in and out with every bit of their tensors, and what POLY cannot say is refused.

References: PEFT's own Poly on the same checkpoint, safetensors read back bit by bit, and for the Lightning files of
the MHR paper a mix computed by loops from the file.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hub_server import HubServer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import CASES, MLP, TASKS, first
from torch import nn

from peft_poly import PolyConfig
from peft_poly.checkpoints.conversion import convert_checkpoint

SIZES = {"r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "init_weights": False}


def save(base, folder, cls=PolyConfig, case="mlp", dtype=None, **settings):
    """An adapter of PEFT's type or ours with random tensors, saved as users do."""
    settings = {**SIZES, "target_modules": CASES[case].target_modules, "task_type": CASES[case].task_type, **settings}
    if settings.get("task_names"):
        del settings["n_tasks"]
    model = peft.get_peft_model(copy.deepcopy(base), cls(**settings))
    for name, parameter in model.named_parameters():
        if "module_logits" in name:
            nn.init.normal_(parameter, std=2.0)
        if "poly_" in name and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def same_bits(one, other):
    def bits(tensor):
        return tensor.contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(bits(one[key]), bits(other[key])) for key in one
    )


@torch.no_grad()
def outputs(base, folder, case, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    inputs = CASES[case].inputs(rows=len(ids))
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    # In float64, where orders of summing are no difference. The tuner, for upstream's PeftModel hands no task_ids on.
    return first(model.double().base_model(**inputs, task_ids=torch.tensor(ids)))


# ------------------------------------------------------------------------------------------------- POLY <-> PEFT_POLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["t5", "llama", "bert", "mlp"])
def test_poly_to_ours_and_back_keeps_every_bit_and_every_output(case, dtype, tmp_path):
    base = CASES[case].make().eval()
    skip = {"exclude_modules": ["pooler.dense"]} if case == "bert" else {}  # its input has no length: PEFT's Poly fails
    source = save(base, tmp_path / "poly", peft.PolyConfig, case, dtype, **skip)
    ours = convert_checkpoint(source, tmp_path / "ours")
    back = convert_checkpoint(ours, tmp_path / "back", to="POLY")
    assert (config_of(ours)["peft_type"], config_of(back)["peft_type"]) == ("PEFT_POLY", "POLY")
    assert same_bits(tensors_of(source), tensors_of(ours))
    assert same_bits(tensors_of(source), tensors_of(back))
    wanted = outputs(base, source, case, [2, 0, 1])
    torch.testing.assert_close(outputs(base, ours, case, [2, 0, 1]), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(base, back, case, [2, 0, 1]), wanted, rtol=0, atol=0)


def test_the_settings_of_poly_survive_both_ways(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig, target_modules=r"lin\d", exclude_modules=["lin1"])
    ours = convert_checkpoint(source, tmp_path / "ours")
    back = convert_checkpoint(ours, tmp_path / "back", to="POLY")
    assert config_of(back) == config_of(source)
    assert config_of(ours).items() >= {**config_of(source), "peft_type": "PEFT_POLY"}.items()


def test_modules_to_save_go_along(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig, target_modules=["lin0"], modules_to_save=["lin1"])
    ours = convert_checkpoint(source, tmp_path / "ours")
    assert config_of(ours)["modules_to_save"] == ["lin1"]
    assert {"base_model.model.lin1.weight", "base_model.model.lin1.bias"} < tensors_of(ours).keys()


def test_an_old_bin_file_is_read(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    wanted = tensors_of(source)
    torch.save(wanted, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    assert same_bits(tensors_of(convert_checkpoint(source, tmp_path / "ours")), wanted)


def test_names_and_training_settings_can_be_given(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    ours = convert_checkpoint(source, tmp_path / "ours", task_names=TASKS, router_noise=False, lora_dropout=0.1)
    config = PolyConfig.from_pretrained(ours)
    assert (config.task_names, config.router_noise, config.lora_dropout) == (TASKS, False, 0.1)


@pytest.mark.parametrize("to", ["POLY", "PEFT_POLY"])
def test_the_same_type_is_a_copy(to, tmp_path):
    source = save(MLP(), tmp_path / "a", peft.PolyConfig if to == "POLY" else PolyConfig)
    target = convert_checkpoint(source, tmp_path / "b", to=to)
    assert config_of(target) == config_of(source)
    assert same_bits(tensors_of(target), tensors_of(source))


def test_task_names_are_dropped_with_a_warning(tmp_path):
    source = save(MLP(), tmp_path / "ours", task_names=TASKS)
    with pytest.warns(UserWarning, match=r"names are dropped: \{0: 'rte', 1: 'sst2', 2: 'boolq'\}"):
        target = convert_checkpoint(source, tmp_path / "poly", to="POLY")
    assert config_of(target)["n_tasks"] == 3
    assert "task_names" not in config_of(target)


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_shared_routers_are_copied_to_their_layers(granularity, tmp_path):
    base = CASES["llama"].make().eval()
    targets = [*CASES["llama"].target_modules, "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        source = save(
            base, tmp_path / "ours", case="llama", n_splits=1, router_granularity=granularity, target_modules=targets
        )
    with pytest.warns(UserWarning, match=f"POLY has a router per layer; the one of each {granularity} is copied"):
        target = convert_checkpoint(source, tmp_path / "poly", to="POLY")
    routers = [key for key in tensors_of(target) if key.endswith("module_logits")]
    assert len(routers) == 2 * 7 + 1
    assert len([key for key in tensors_of(source) if key.endswith("module_logits")]) < 4
    wanted = outputs(base, source, "llama", [2, 0, 1])
    torch.testing.assert_close(outputs(base, target, "llama", [2, 0, 1]), wanted, rtol=0, atol=1e-6)


def test_layers_to_transform_become_full_names(tmp_path):
    base = CASES["llama"].make().eval()
    source = save(base, tmp_path / "ours", case="llama", layers_to_transform=[1], layers_pattern="layers")
    target = convert_checkpoint(source, tmp_path / "poly", to="POLY")
    assert all(name.startswith("model.layers.1.") for name in config_of(target)["target_modules"])
    wanted = outputs(base, source, "llama", [2, 0, 1])
    torch.testing.assert_close(outputs(base, target, "llama", [2, 0, 1]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message", "given_up"),
    [
        ({"lora_dropout": 0.1}, r"has no lora_dropout.*lora_dropout=0\.1\. Pass `lora_dropout=0\.0`", 0.0),
        ({"router_temperature": 2.0}, r"has no router_temperature.*Pass `router_temperature=1\.0`", 1.0),
        ({"router_noise": False}, "has no router_noise.*Pass `router_noise=True`", True),
    ],
)
def test_a_setting_of_training_that_poly_lacks_must_be_given_up(settings, message, given_up, tmp_path):
    source = save(MLP(), tmp_path / "ours", **settings)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "poly", to="POLY")
    assert not (tmp_path / "poly").exists()
    convert_checkpoint(source, tmp_path / "poly", to="POLY", **dict.fromkeys(settings, given_up))
    assert same_bits(tensors_of(tmp_path / "poly"), tensors_of(source))


def test_another_lora_alpha_is_refused(tmp_path):
    source = save(MLP(), tmp_path / "ours", lora_alpha=16)
    with pytest.raises(ValueError, match=r"POLY scales by 1 / r, .* this adapter has lora_alpha=16"):
        convert_checkpoint(source, tmp_path / "poly", to="POLY")


def test_the_initialisation_of_the_paper_is_no_obstacle(tmp_path):
    source = save(MLP(), tmp_path / "ours", init_weights="mhr")
    assert config_of(convert_checkpoint(source, tmp_path / "poly", to="POLY"))["init_weights"] is True


# ------------------------------------------------------------------------------------------------- bad input
def test_an_adapter_of_another_type_is_refused(tmp_path):
    peft.get_peft_model(MLP(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds a LORA adapter, which has no router"):
        convert_checkpoint(tmp_path / "lora", tmp_path / "ours")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_a_saved_adapter_is_refused(name, tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    with pytest.raises(ValueError, match=rf"{name} is part of a saved adapter\. Pass its folder"):
        convert_checkpoint(source / name, tmp_path / "ours")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no adapter_config\.json in"):
        convert_checkpoint(tmp_path, tmp_path / "ours")


def test_an_unknown_type_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`to` must be 'PEFT_POLY' or 'POLY', got 'LORA'"):
        convert_checkpoint(tmp_path, tmp_path / "ours", to="LORA")


@pytest.mark.parametrize("setting", ["lora_alpha", "r", "target_modules", "n_skillz"])
def test_settings_that_follow_from_the_checkpoint_cannot_be_given(setting, tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    with pytest.raises(ValueError, match=rf"{setting} of a saved adapter cannot be given anew.*task_names"):
        convert_checkpoint(source, tmp_path / "ours", **{setting: 1})


def test_names_that_are_not_as_many_as_the_tasks_are_refused(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    with pytest.raises(ValueError, match="`n_tasks` is 3 but `task_names` has 2"):
        convert_checkpoint(source, tmp_path / "ours", task_names=["a", "b"])


@pytest.mark.parametrize("key", ["lin0.poly_lora_A", "lin0.poly_lora_B", "lin0.poly_router.module_logits"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_tensors_that_do_not_fit_the_config_are_refused(key, how, tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    tensors, key = tensors_of(source), f"base_model.model.{key}"
    tensor = tensors.pop(key)
    if how == "cut":
        tensors[key] = tensor[:1].contiguous()
    elif key.endswith("_A"):  # then the layer is just not there
        tensors = {name: t for name, t in tensors.items() if "lora_A" not in name}
    save_file(tensors, source / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"The tensors of lin0 do not fit n_splits=2|has no skills"):
        convert_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_existing_target_is_refused_or_replaced(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    target = save(MLP(), tmp_path / "ours", r=2)
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(source, target)
    assert config_of(target)["r"] == 2
    convert_checkpoint(source, target, overwrite=True)
    assert config_of(target)["r"] == 4


def test_a_checkpoint_can_replace_itself(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    wanted = tensors_of(source)
    convert_checkpoint(source, source, overwrite=True)
    assert config_of(source)["peft_type"] == "PEFT_POLY"
    assert same_bits(tensors_of(source), wanted)


# ------------------------------------------------------------------------------------------------- Lightning files
H, K, R, T = 4, 3, 2, 5


def lightning_tensors(prefix="model."):
    """The trained tensors of an MLP with an MHR adapter, as the paper's code names and shapes them."""
    sizes, tensors = {"lin0": (16, 32), "lin1": (32, 4)}, {}
    for name, (n_in, n_out) in sizes.items():
        tensors[f"{prefix}{name}.lora_a"] = torch.randn(H, K, n_in // H, R)
        tensors[f"{prefix}{name}.lora_b"] = torch.randn(H, K, R, n_out // H)
        tensors[f"{prefix}{name}.selector.module_logits"] = torch.randn(T, H * K)
    return tensors


def save_lightning(file, tensors, **more):
    checkpoint = {"state_dict": tensors, "epoch": 3, "global_step": 100, "hyper_parameters": {"n_skills": K}, **more}
    torch.save(checkpoint, file)
    return file


def naive_forward(base, tensors, x, task, alpha):
    """The MLP with one task's skills mixed by loops, as the paper's code computes it."""
    for name in ("lin0", "lin1"):
        layer = base.get_submodule(name)
        a, b = tensors[f"model.{name}.lora_a"].double(), tensors[f"model.{name}.lora_b"].double()
        logits = tensors[f"model.{name}.selector.module_logits"][task].double().view(H, K)
        A, B = torch.zeros(layer.in_features, R).double(), torch.zeros(R, layer.out_features).double()
        for split in range(H):
            p = [torch.sigmoid(logit) for logit in logits[split]]
            d_in, d_out = layer.in_features // H, layer.out_features // H
            for skill in range(K):
                weight = p[skill] / sum(p)
                A[split * d_in : (split + 1) * d_in] += weight * a[split, skill]
                B[:, split * d_out : (split + 1) * d_out] += weight * b[split, skill]
        y = x @ layer.weight.double().T + layer.bias.double() + (x @ A) @ B * alpha / R
        x = base.act(y) if name == "lin0" else y
    return x


@pytest.mark.parametrize("alpha", [1, 16])
def test_a_lightning_checkpoint_computes_what_the_papers_code_computes(alpha, tmp_path):
    base, tensors = MLP().eval(), lightning_tensors()
    file = save_lightning(tmp_path / "best.ckpt", tensors)
    target = convert_checkpoint(file, tmp_path / "ours", lora_alpha=alpha, base_model_name_or_path="some/mlp")
    config = PolyConfig.from_pretrained(target)
    assert (config.r, config.n_skills, config.n_splits, config.n_tasks) == (R, K, H, T)
    assert (config.lora_alpha, config.base_model_name_or_path) == (alpha, "some/mlp")
    model = PeftModel.from_pretrained(copy.deepcopy(base), target).eval()
    x = CASES["mlp"].inputs()["x"]
    for task in range(T):
        wanted = naive_forward(base, tensors, x.double(), task, alpha).float()
        torch.testing.assert_close(model(x, task_ids=task), wanted, rtol=1e-5, atol=1e-4 if alpha > 1 else 1e-5)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("wrapped", [True, False])
def test_prefix_and_wrapping_of_a_lightning_file_do_not_matter(prefix, wrapped, tmp_path):
    tensors = lightning_tensors(prefix)
    if wrapped:
        file = save_lightning(tmp_path / "best.ckpt", tensors)
    else:
        torch.save(tensors, tmp_path / "best.pt")
        file = tmp_path / "best.pt"
    found = tensors_of(convert_checkpoint(file, tmp_path / "ours", task_names=list("abcde"), task_type="SEQ_2_SEQ_LM"))
    endings = {".lora_a": ".poly_lora_A", ".lora_b": ".poly_lora_B", ".selector": ".poly_router"}
    wanted = {}
    for key, tensor in tensors.items():
        for theirs, ours in endings.items():
            key = key.replace(theirs, ours)
        wanted["base_model.model." + key.removeprefix("model.")] = tensor
    assert same_bits(found, wanted)
    assert PolyConfig.from_pretrained(tmp_path / "ours").task_names == list("abcde")


@pytest.mark.parametrize(("theirs", "prefix"), [("model.model.layers.0.q", "model."), ("model.layers.0.q", "")])
def test_the_names_of_a_model_that_begin_with_model_are_kept(theirs, prefix, tmp_path):
    tensors = {key.replace("model.lin0", theirs): t for key, t in lightning_tensors().items() if "lin0" in key}
    target = convert_checkpoint(save_lightning(tmp_path / "best.ckpt", tensors), tmp_path / "ours", prefix=prefix)
    assert config_of(target)["target_modules"] == ["model.layers.0.q"]


def test_a_lightning_checkpoint_can_become_poly_too(tmp_path):
    base = MLP().eval()
    file = save_lightning(tmp_path / "best.ckpt", lightning_tensors())
    ours = convert_checkpoint(file, tmp_path / "ours")
    poly = convert_checkpoint(file, tmp_path / "poly", to="POLY")
    wanted = outputs(base, ours, "mlp", [4, 0, 1])
    torch.testing.assert_close(outputs(base, poly, "mlp", [4, 0, 1]), wanted, rtol=0, atol=1e-5)


def test_one_selector_for_all_layers_is_written_for_each(tmp_path):
    tensors = lightning_tensors()
    tensors["model.lin1.selector.module_logits"] = tensors["model.lin0.selector.module_logits"]
    target = convert_checkpoint(save_lightning(tmp_path / "best.ckpt", tensors), tmp_path / "ours")
    assert len([key for key in tensors_of(target) if key.endswith("module_logits")]) == 2


def test_other_tensors_of_a_lightning_file_are_left_out_with_a_warning(tmp_path):
    file = save_lightning(tmp_path / "best.ckpt", {**lightning_tensors(), "model.lin0.weight": torch.zeros(32, 16)})
    with pytest.warns(UserWarning, match=r"1 tensors of .* are left out: model\.lin0\.weight"):
        target = convert_checkpoint(file, tmp_path / "ours")
    assert len(tensors_of(target)) == 6


def test_a_file_with_python_objects_is_not_unpickled(tmp_path):
    file = save_lightning(tmp_path / "best.ckpt", lightning_tensors(), config=argparse.Namespace(lr=1))
    with pytest.raises(ValueError, match=r"holds Python objects besides tensors.*weights_only=False"):
        convert_checkpoint(file, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "has no tensors named `<layer>.lora_a`"),
        (lambda t: [t.pop(key) for key in list(t) if key.endswith("lora_a")], "routers but no skills"),
        (lambda t: t.pop("model.lin0.selector.module_logits"), r"lin0: .*\(task, split \* skill\), found .* and None"),
        (lambda t: t.pop("model.lin1.lora_b"), "The tensors of lin1 do not fit n_splits=4"),
        (lambda t: t.update({"model.lin0.lora_a": torch.zeros(16, 2)}), r"lin0: `lora_a` must be .* found \(16, 2\)"),
        (
            lambda t: t.update({key: x.transpose(1, 2).contiguous() for key, x in t.items() if key.endswith("lora_b")}),
            r"The tensors of lin0 do not fit .*Later versions of mttl lay them out otherwise",
        ),
    ],
)
def test_a_lightning_file_of_another_layout_is_refused(change, message, tmp_path):
    tensors = lightning_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save_lightning(tmp_path / "best.ckpt", tensors), tmp_path / "ours")


def test_sizes_of_a_lightning_file_cannot_be_given(tmp_path):
    file = save_lightning(tmp_path / "best.ckpt", lightning_tensors())
    with pytest.raises(ValueError, match="r of a Lightning checkpoint cannot be given anew"):
        convert_checkpoint(file, tmp_path / "ours", r=R)


# ------------------------------------------------------------------------------------------------- Hub ids
FROM_HUB = """
import sys
import torch
from peft_poly.checkpoints.conversion import convert_checkpoint
from peft_poly.checkpoints.from_loras import from_loras
from tiny import MLP
convert_checkpoint("user/poly", sys.argv[1] + "/converted")
from_loras(MLP(), {"a": "user/lora", "b": "user/lora"}).save_pretrained(sys.argv[1] + "/joined")
"""


def test_hub_ids_are_taken_where_folders_are(tmp_path):
    source = save(MLP(), tmp_path / "poly", peft.PolyConfig)
    lora = tmp_path / "lora"
    peft.get_peft_model(MLP(), LoraConfig(target_modules=["lin0"], init_lora_weights=False)).save_pretrained(lora)
    with HubServer() as hub:
        for folder in (source, lora):
            hub.seed(f"user/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(lora)
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, str(tmp_path)],
            env={**env, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same_bits(tensors_of(tmp_path / "converted"), tensors_of(source))
    assert config_of(tmp_path / "joined")["task_names"] == ["a", "b"]
