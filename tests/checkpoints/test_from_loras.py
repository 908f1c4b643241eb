"""Plain LoRAs become skills: exactly with a one-hot router, and within a bound with the sigmoid router as it starts.

References: PEFT's LoRA with the same files, and a mix computed by loops from them.
"""

import copy
import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import CASES, MLP, TASKS, first, llama

from peft_poly import PolyConfig, PolyLayer
from peft_poly.checkpoints.from_loras import from_loras
from peft_poly.compute.kinds.mixture import own_skill_logit


def save_lora(base, folder, seed, case="llama", head=None, **settings):
    """A LoRA with random tensors, saved as users do."""
    settings = {"r": 4, "target_modules": CASES[case].target_modules, "task_type": CASES[case].task_type, **settings}
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **settings))
    if head is not None:
        torch.nn.init.constant_(model.base_model.model.classifier.modules_to_save["default"].weight, head)
    model.save_pretrained(folder)
    return str(folder)


def save_loras(base, root, case="llama", names=TASKS, per_lora=None, **settings):
    per_lora = per_lora or [{}] * len(names)
    return {
        name: save_lora(base, root / str(seed), seed, case, **settings, **own)
        for seed, (name, own) in enumerate(zip(names, per_lora, strict=True))
    }


def poly_layers(model):
    return [m for m in model.modules() if isinstance(m, PolyLayer)]


def make_one_hot(model):
    """Logits of +-40: in float32 the own skill has all of the weight."""
    for layer in poly_layers(model):
        logits = layer.poly_router["default"].module_logits
        logits.data = logits.data.sign() * 40
    return model.eval()


@torch.no_grad()
def outputs(model, inputs, **kwargs):
    return first(model(**inputs, **kwargs))


def check_equal_to_loras(model, base, loras, inputs):
    for name, folder in loras.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            lora = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        wanted = outputs(lora, inputs)
        torch.testing.assert_close(outputs(model, inputs, task_ids=name), wanted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize(("case", "n_splits"), [("t5", 2), ("llama", 1), ("llama", 4), ("mlp", 1), ("mlp", 2)])
def test_one_hot_routing_gives_the_loras_outputs(case, n_splits, tmp_path):
    base = CASES[case].make().eval()
    loras = save_loras(base, tmp_path, case, lora_alpha=7)
    model = make_one_hot(from_loras(copy.deepcopy(base), loras, n_splits=n_splits))
    check_equal_to_loras(model, base, loras, CASES[case].inputs())


def test_conv1d_layers_give_the_loras_outputs(tmp_path):
    base = CASES["gpt2"].make().eval()
    loras = save_loras(base, tmp_path, "gpt2", fan_in_fan_out=True)
    check_equal_to_loras(make_one_hot(from_loras(copy.deepcopy(base), loras)), base, loras, CASES["gpt2"].inputs())


def test_the_new_adapter_has_a_task_and_a_skill_per_lora(tmp_path):
    loras = save_loras(llama(), tmp_path, lora_alpha=16)
    model = from_loras(llama(), loras, n_splits=2, adapter_name="mine", router_noise=False)
    config = model.peft_config["mine"]
    assert (config.n_skills, config.n_tasks, config.r, config.n_splits) == (3, 3, 4, 2)
    assert (config.task_names, config.task_type) == (TASKS, "CAUSAL_LM")
    assert config.router_noise is False
    assert set(config.target_modules) == set(CASES["llama"].target_modules)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert all(parameter.requires_grad == ("poly_" in name) for name, parameter in model.named_parameters())


def test_with_one_scale_for_all_the_tensors_are_the_loras_own(tmp_path):
    loras = save_loras(llama(), tmp_path, lora_alpha=16)
    model = from_loras(llama(), loras)
    assert model.peft_config["default"].lora_alpha == 16
    for skill, folder in enumerate(loras.values()):
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        for name, layer in model.named_modules():
            if isinstance(layer, PolyLayer):
                assert torch.equal(layer.poly_lora_A["default"][0, skill].T, tensors[f"{name}.lora_A.weight"])
                assert torch.equal(layer.poly_lora_B["default"][0, skill].T, tensors[f"{name}.lora_B.weight"])


@pytest.mark.parametrize(
    "per_lora",
    [
        [{"lora_alpha": 1}, {"lora_alpha": 32}, {"lora_alpha": 8}],
        [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 3, "use_rslora": True}],
        [{"lora_alpha": 8}, {"lora_alpha": 8, "alpha_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 64}}, {}],
        [{"use_rslora": True}] * 3,
    ],
)
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 5}])
def test_each_lora_keeps_its_scale(per_lora, settings, tmp_path):
    base = llama().eval()
    loras = save_loras(base, tmp_path, per_lora=per_lora)
    model = make_one_hot(from_loras(copy.deepcopy(base), loras, **settings))
    check_equal_to_loras(model, base, loras, CASES["llama"].inputs())


def test_a_rank_pattern_that_makes_no_difference_is_taken(tmp_path):
    base = llama().eval()
    loras = save_loras(base, tmp_path, per_lora=[{"r": 2, "rank_pattern": {".*": 4}, "lora_alpha": 6}, {}, {}])
    check_equal_to_loras(make_one_hot(from_loras(copy.deepcopy(base), loras)), base, loras, CASES["llama"].inputs())


@pytest.mark.parametrize("targets", [r".*layers\.1\.self_attn\.[qv]_proj", ["layers.0.mlp.up_proj", "k_proj"]])
def test_the_layers_of_the_loras_are_adapted_and_no_others(targets, tmp_path):
    loras = save_loras(llama(), tmp_path, target_modules=targets)
    model = from_loras(llama(), loras)
    found = {name for name, m in model.named_modules() if isinstance(m, PolyLayer)}
    tensors = load_file(f"{loras['rte']}/adapter_model.safetensors")
    assert found == {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}


def test_loras_in_bf16_of_a_bf16_base_are_read(tmp_path):
    base = llama().to(torch.bfloat16).eval()
    loras = save_loras(base, tmp_path)
    model = make_one_hot(from_loras(copy.deepcopy(base), loras))
    lora = PeftModel.from_pretrained(copy.deepcopy(base), loras["sst2"]).eval()
    wanted = outputs(lora, CASES["llama"].inputs())
    torch.testing.assert_close(outputs(model, CASES["llama"].inputs(), task_ids="sst2"), wanted, rtol=0, atol=0.02)


def test_equal_heads_are_kept(tmp_path):
    base = CASES["bert"].make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loras = save_loras(base, tmp_path, "bert", per_lora=[{"head": 0.25}] * 3)
        for folder in loras.values():  # the biases were drawn with the base, and so are equal
            assert load_file(f"{folder}/adapter_model.safetensors")["base_model.model.classifier.weight"].eq(0.25).all()
        model = make_one_hot(from_loras(copy.deepcopy(base), loras))
    check_equal_to_loras(model, base, loras, CASES["bert"].inputs())
    with model.disable_adapter():  # the heads came to the adapter, and not to the base model
        torch.testing.assert_close(outputs(model, CASES["bert"].inputs()), outputs(base, CASES["bert"].inputs()))
    saved = peft.get_peft_model_state_dict(model)
    assert saved["base_model.model.classifier.weight"].eq(0.25).all()
    assert torch.equal(saved["base_model.model.classifier.bias"], base.classifier.bias)


def test_it_can_be_saved_loaded_and_trained(tmp_path):
    base = llama().eval()
    model = from_loras(copy.deepcopy(base), save_loras(base, tmp_path), n_splits=2)
    inputs = CASES["llama"].inputs()
    model.train()(**inputs, labels=inputs["input_ids"], task_ids=TASKS).loss.backward()
    assert all(layer.poly_router["default"].module_logits.grad.abs().sum() > 0 for layer in poly_layers(model))
    model.eval().save_pretrained(tmp_path / "poly")
    again = PeftModel.from_pretrained(base, tmp_path / "poly").eval()
    wanted = outputs(model, inputs, task_ids=TASKS)
    torch.testing.assert_close(outputs(again, inputs, task_ids=TASKS), wanted, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- how tasks start
@pytest.mark.parametrize("n_loras", [1, 2, 3, 9])
@pytest.mark.parametrize("own_weight", [0.5, 0.99, 0.9999])
def test_each_task_starts_with_the_chosen_weight_on_its_own_skill(n_loras, own_weight, tmp_path):
    base, names = MLP(), [f"task {i}" for i in range(n_loras)]
    loras = save_loras(base, tmp_path, "mlp", names=names)
    model = from_loras(base, loras, n_splits=2, own_weight=own_weight)
    for weights in model.routing_weights().values():
        own = weights.diagonal(dim1=0, dim2=2)  # (split, task)
        assert own.min() >= own_weight
        assert own.max() <= own_weight + 1e-5 or n_loras == 1
        others = weights.sum(dim=2) - own.T
        torch.testing.assert_close(others, 1 - own.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_skills", [2, 8, 100, 1000])
def test_the_default_puts_at_least_99_percent_on_the_own_skill(n_skills):
    p = torch.sigmoid(torch.tensor(own_skill_logit(0.99, n_skills)))
    assert p / (p + (n_skills - 1) * torch.sigmoid(-torch.tensor(own_skill_logit(0.99, n_skills)))) >= 0.99


@pytest.mark.parametrize("own_weight", [0.9, 0.99, 0.9999])
def test_the_deviation_from_the_lora_is_bounded_by_what_the_others_weigh(own_weight, tmp_path):
    """A_t is own A plus (1 - w) of (mean of the others - own A), B_t too; norms of products bound the rest."""
    base = MLP().eval()
    loras = save_loras(base, tmp_path, "mlp")
    model = from_loras(copy.deepcopy(base), loras, own_weight=own_weight)
    files = [load_file(f"{folder}/adapter_model.safetensors") for folder in loras.values()]
    rest = 1 - own_weight
    for task, own in enumerate(files):
        for key in [key for key in own if "lora_A" in key]:
            A, B = own[key], own[key.replace("lora_A", "lora_B")]
            dA, dB = (
                sum(file[k] for i, file in enumerate(files) if i != task) / (len(files) - 1) - own[k]
                for k in (key, key.replace("lora_A", "lora_B"))
            )
            layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
            deviation = layer.get_delta_weight("default", task) - B @ A * 2  # lora_alpha / r = 8 / 4
            norm = torch.linalg.matrix_norm
            bound = 2 * (rest * (norm(B) * norm(dA) + norm(dB) * norm(A)) + rest**2 * norm(dB) * norm(dA))
            assert 0 < norm(deviation) <= bound * 1.01


# ------------------------------------------------------------------------------------------------- refusals
def state_of(base):
    return [(name, p.requires_grad, type(p), p.sum().item()) for name, p in base.named_parameters()]


def check_refused(base, loras, message, **kwargs):
    before, modules = state_of(base), [type(m) for m in base.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=message):
            from_loras(base, loras, **kwargs)
    assert state_of(base) == before
    assert [type(m) for m in base.modules()] == modules
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"r": 8}, r"must have one rank in all layers, but these have: 4 \(boolq\), 4 \(rte\), 8 \(sst2\)"),
        ({"rank_pattern": {"q_proj": 2}}, r"one rank in all layers.*2 \(sst2\).*4 \(sst2\)"),
        ({"target_modules": ["q_proj"]}, r"those for \['sst2'\] do not adapt model.layers.0"),
        ({"use_dora": True}, "LoRA for task 'sst2' has use_dora=True. A skill is a low-rank pair"),
        ({"lora_bias": True}, "'sst2' has lora_bias=True"),
        ({"bias": "lora_only"}, "'sst2' has bias='lora_only'"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "'sst2' has layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "'sst2' has trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "'sst2' has alora_invocation_tokens"),
        ({"modules_to_save": ["lm_head"]}, "tasks 'rte' and 'sst2' differ in what they saved .*lm_head.weight.*share"),
    ],
)
def test_what_is_more_than_equal_low_rank_pairs_is_refused(own, message, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loras = save_loras(llama(), tmp_path, per_lora=[{}, own, {}])
    check_refused(llama(), loras, message)


@pytest.mark.parametrize("poly_type", ["poly", "gates"])
def test_what_all_loras_saved_whole_is_taken_over(poly_type, tmp_path):
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loras = save_loras(base, tmp_path, modules_to_save=["lm_head"], names=["rte", "sst2"])
    for folder in loras.values():  # as if both had trained it, to the same
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        key = next(key for key in tensors if "lm_head" in key)
        torch.manual_seed(5)
        save_file({**tensors, key: torch.randn_like(tensors[key])}, f"{folder}/adapter_model.safetensors")
    model = from_loras(copy.deepcopy(base), loras, poly_type=poly_type)
    assert model.peft_config["default"].modules_to_save == ["lm_head"]
    if poly_type == "poly":
        make_one_hot(model)
    check_equal_to_loras(model.eval(), base, loras, CASES["llama"].inputs())
    model.save_pretrained(tmp_path / "poly")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "poly").eval()
    check_equal_to_loras(again, base, loras, CASES["llama"].inputs())


def test_an_initialisation_that_changes_the_base_is_refused(tmp_path):
    loras = save_loras(llama(), tmp_path)
    path = tmp_path / "1/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    check_refused(llama(), loras, "'sst2' has init_lora_weights='pissa', which changes the base weights")


def test_different_heads_are_refused(tmp_path):
    base = CASES["bert"].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loras = save_loras(base, tmp_path, "bert", per_lora=[{"head": 0.0}, {"head": 1.0}, {"head": 0.0}])
    check_refused(base, loras, r"differ in what they saved .*classifier\.weight.*one copy")


def test_an_embedding_lora_is_refused(tmp_path):
    loras = save_loras(llama(), tmp_path, target_modules=["embed_tokens", "q_proj"])
    check_refused(llama(), loras, "same linear layers, but model.embed_tokens is none")


def test_loras_of_another_base_are_refused(tmp_path):
    loras = save_loras(llama(), tmp_path)
    check_refused(CASES["t5"].make(), loras, "Target modules .* not found in the base model")
    wide = llama()
    wide.config.hidden_size, wide.config.intermediate_size = 32, 64
    check_refused(type(wide)(wide.config), loras, "'rte' does not fit the base model: .*size mismatch")


def test_an_adapter_of_another_type_is_refused(tmp_path):
    config = PolyConfig(target_modules=["lin0"])
    peft.get_peft_model(MLP(), config).save_pretrained(tmp_path / "poly")
    check_refused(MLP(), {"a": tmp_path / "poly"}, "for task 'a' is of type .*PEFT_POLY; only LORA")


def test_a_base_that_has_adapters_is_refused(tmp_path):
    loras = save_loras(MLP(), tmp_path, "mlp")
    adapted = peft.get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="has adapters already"):
        from_loras(adapted, loras)


def test_different_task_types_need_a_choice(tmp_path):
    loras = save_loras(llama(), tmp_path, per_lora=[{}, {"task_type": None}, {}])
    check_refused(llama(), loras, r"task types \['CAUSAL_LM', 'None'\]. Pass `task_type=`")
    model = from_loras(llama(), loras, task_type="CAUSAL_LM")
    assert type(model).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"own_weight": 1.0}, "`own_weight` must lie between 0 and 1"),
        ({"own_weight": 0}, "`own_weight` must lie between 0 and 1"),
        ({"r": 4, "n_skills": 3}, "n_skills, r of the new adapter follow from the LoRAs"),
        ({"n_splits": 3}, "n_splits=3 does not divide the 16 in-features"),
        ({"router_noise": "no"}, "`router_noise` must be True or False"),
    ],
)
def test_impossible_arguments_are_refused(kwargs, message, tmp_path):
    base = MLP()
    check_refused(base, save_loras(base, tmp_path, "mlp"), message, **kwargs)


def test_no_loras_are_refused():
    with pytest.raises(ValueError, match="non-empty list of names"):
        from_loras(MLP(), {})
