"""Quantised base models: bitsandbytes 8-bit and NF4, torchao int8, and HQQ, on the CPU.

What a task gives is compared with PEFT's LoRA on the same quantised base, whose A and B are the task's skills, mixed
one by one. A merge rounds to the base's few bits anew, so it is compared with LoRA's merge of the same update.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapters import GATES
from peft import LoraConfig, PeftModel
from tiny import VOCAB, naive_pair
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_poly import PolyConfig, PolyLayer, create_poly_optimizer

TASKS = ["rte", "sst2", "boolq"]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
NO_TRAINER = pytest.mark.transformers_5(reason="has a Trainer that refuses torchao")
HQQ = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="needs hqq")
KINDS = [
    pytest.param("8bit", marks=BITSANDBYTES),
    pytest.param("nf4", marks=BITSANDBYTES),
    pytest.param("nf4 bf16", marks=BITSANDBYTES),
    pytest.param("torchao", marks=TORCHAO),
    pytest.param("hqq", marks=HQQ),
]
TRAINED = [
    pytest.param(*kind.values, marks=[*kind.marks, NO_TRAINER]) if kind.values == ("torchao",) else kind
    for kind in KINDS
]

CONFIG = PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, task_names=TASKS, init_weights=False)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantisation(kind: str):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **(double if kind == "nf4 bf16" else {}))


def load_base(folder: Path, kind: str, repacks: bool = False) -> nn.Module:
    if kind == "hqq":
        return with_hqq(AutoModelForCausalLM.from_pretrained(folder))
    dtype = torch.bfloat16 if kind == "nf4 bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation(kind), device_map="cpu", dtype=dtype
    )
    for layer in four_bit(base):
        layer.support_avx512bf16_for_cpu = repacks  # True as on CPUs with AVX512-BF16, whatever the CPU is
    return base


def with_hqq(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks in HQQ's 8 bits, by hand: transformers 5 has no loader for it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent = model.model.get_submodule(name.rpartition(".")[0])
            config = BaseQuantizeConfig(nbits=8, group_size=32)
            layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            setattr(parent, name.rpartition(".")[2], layer.requires_grad_(False))
    return model


def four_bit(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def adapted(folder: Path, kind: str, **settings) -> PeftModel:
    config = PolyConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, r=4, lora_alpha=2, task_names=TASKS, init_weights=False,
        **{"n_skills": 3, "n_splits": 2, **settings},
    )  # fmt: skip
    model = peft.get_peft_model(load_base(folder, kind), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("module_logits"):
            parameter.data.normal_(std=2.0, generator=generator)
    return model


def lora_of(model: PeftModel, task: int, folder: Path, kind: str) -> PeftModel:
    """PEFT's LoRA on the same base, with the skills mixed for one task."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, lora_alpha=2)
    lora = peft.get_peft_model(load_base(folder, kind), config).eval()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, PolyLayer):
            A, B = naive_pair(layer, "default", task)
            other = lora.get_base_model().get_submodule(name)
            other.lora_A["default"].weight.data = A.T.float().contiguous()
            other.lora_B["default"].weight.data = B.T.float().contiguous()
    return lora


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    return model(**inputs(), **kwargs).logits.float()


def layers(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def tolerance(kind: str) -> dict[str, float]:
    return {"rtol": 0.05, "atol": 0.05} if "bf16" in kind else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("settings", [{}, GATES], ids=["poly", "gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_gives_what_lora_gives_on_the_same_quantised_base(base_folder, kind, settings):
    model = adapted(base_folder, kind, **settings)
    assert all(layer.quantization_backend is not None for layer in layers(model))
    mixed = logits(model, task_ids=TASKS)
    for task in range(3):
        lora = logits(lora_of(model, task, base_folder, kind))
        torch.testing.assert_close(logits(model, task_ids=task), lora, **tolerance(kind))
        torch.testing.assert_close(mixed[task], lora[task], **tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_leave_the_quantised_base(base_folder, kind):
    model = adapted(base_folder, kind)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(base_folder, kind).eval()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_evaluating_changes_the_adapter_and_lowers_the_loss(base_folder, kind):
    model = adapted(base_folder, kind)
    logits(model, task_ids="rte")
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(4):
        loss = model.train()(**inputs(), labels=inputs()["input_ids"], task_ids=[0, 2, 0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    routers = [name for name in before if "module_logits" in name]
    assert all(torch.equal(before[name][1], after[name][1]) for name in routers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_preparation_for_training_work(base_folder, kind):
    model = peft.prepare_model_for_kbit_training(
        load_base(base_folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = PolyConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, init_weights=False, task_names=TASKS, router_noise=False
    )
    model = peft.get_peft_model(model, config).train()
    model(**inputs(), labels=inputs()["input_ids"], task_ids=[0, 2, 0]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_follows_the_task_of_each_row(base_folder, kind):
    model = adapted(base_folder, kind)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mixed = model.generate(**inputs(), task_ids=TASKS, **options)
    for task in range(3):
        lora = lora_of(model, task, base_folder, kind)
        assert torch.equal(mixed[task], lora.generate(**inputs(), **options)[task])
    assert model.generate(**inputs(), task_ids=TASKS, num_beams=2, **options).shape == (3, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_and_loaded(base_folder, tmp_path, kind):
    model = adapted(base_folder, kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(base_folder, kind), tmp_path).eval()
    assert torch.equal(logits(loaded, task_ids=TASKS), logits(model, task_ids=TASKS))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_as_good_as_that_of_lora(base_folder, kind, verb):
    model = adapted(base_folder, kind)
    routed, another = logits(model, task_ids="boolq"), logits(model, task_ids="rte")
    lora = lora_of(model, 2, base_folder, kind)
    merged = getattr(model, verb)(task="boolq", safe_merge=True) or model
    merged_lora = getattr(lora, verb)() or lora
    ours, theirs = logits(merged), logits(merged_lora)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 if "bf16" in kind else 1e-3)
    assert (ours - routed).abs().mean() < 0.5 * (another - routed).abs().mean()


@BITSANDBYTES
def test_weights_that_bitsandbytes_has_repacked_are_not_merged_into(base_folder):
    model = adapted(base_folder, "nf4")
    model.merge_adapter(task="sst2")
    merged = logits(model)
    last = layers(model)[-1]
    last.get_base_layer().weight.quant_state.packing_format_for_cpu = True  # as after a call in eval mode on some CPUs
    with pytest.raises(ValueError, match=r"The 4-bit weight of .*down_proj cannot be read any more"):
        last.unmerge()
    assert last.merged_adapters == ["default"]
    last.get_base_layer().weight.quant_state.packing_format_for_cpu = False
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    last.get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"Set `support_avx512bf16_for_cpu = False`"):
        model.merge_adapter(task="sst2")
    assert not any(layer.merged for layer in layers(model))


class TestRepacking:
    """The fast kernel of CPUs with AVX512-BF16, which cannot be differentiated, and whose layout nothing else reads."""

    pytestmark = BITSANDBYTES

    def test_an_adapter_to_be_trained_turns_it_off_in_all_layers_adapted_or_not(self, base_folder):
        model = load_base(base_folder, "nf4", repacks=True)
        assert len(four_bit(model)) == 14
        model = peft.get_peft_model(model, CONFIG)
        assert len(layers(model)) == 8
        assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit(model))

    def test_an_adapter_to_be_used_leaves_it_on(self, base_folder, tmp_path):
        adapted(base_folder, "nf4").save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load_base(base_folder, "nf4", repacks=True), tmp_path)
        assert all(layer.support_avx512bf16_for_cpu for layer in four_bit(loaded))
        assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit(loaded.train_all() or loaded.train()))

    @pytest.mark.parametrize(
        "door",
        [
            peft.get_peft_model,
            pytest.param(lambda model, config: model.add_adapter(config), marks=pytest.mark.transformers_door),
        ],
    )
    def test_a_base_model_that_was_called_before_is_not_trained_in_vain(self, base_folder, door):
        model = load_base(base_folder, "nf4", repacks=True)
        model.model.layers[1].mlp.gate_proj.weight.quant_state.packing_format_for_cpu = True  # as after such a call
        before = [(name, type(module)) for name, module in model.named_modules()]
        with pytest.raises(
            ValueError, match=r"The 4-bit weight of model\.layers\.1\.mlp\.gate_proj \(one of 1\) gives"
        ):
            door(model, CONFIG)
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert all(layer.support_avx512bf16_for_cpu for layer in four_bit(model))

    def test_an_adapter_that_is_thawed_after_use_is_not_trained_in_vain(self, base_folder, tmp_path):
        adapted(base_folder, "nf4").save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load_base(base_folder, "nf4", repacks=True), tmp_path)
        four_bit(loaded)[0].weight.quant_state.packing_format_for_cpu = True
        loaded.train()  # nothing to train yet
        loaded.train_all()
        with pytest.raises(ValueError, match=r"\(one of 1\) gives no gradients any more.* Load the base model again"):
            loaded.train()

    def test_on_a_cpu_that_does_it_an_adapter_learns_after_being_evaluated(self, base_folder):
        without_adapter = load_base(base_folder, "nf4", repacks=has_the_feature()).eval()
        logits(without_adapter)
        assert without_adapter.model.layers[
            0
        ].mlp.up_proj.weight.quant_state.packing_format_for_cpu  # the trap is there
        model = peft.get_peft_model(load_base(base_folder, "nf4", repacks=True), CONFIG).eval()
        fresh = [layer.get_base_weight() for layer in layers(model)]
        logits(model, task_ids="rte")
        assert all(torch.equal(old, layer.get_base_weight()) for old, layer in zip(fresh, layers(model), strict=True))
        model.train()(**inputs(), labels=inputs()["input_ids"], task_ids=[0, 2, 0]).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)

    def test_on_a_cpu_that_does_it_a_merge_after_use_is_refused(self, base_folder, tmp_path):
        adapted(base_folder, "nf4").save_pretrained(tmp_path)
        base = load_base(base_folder, "nf4", repacks=has_the_feature())
        model = PeftModel.from_pretrained(base, tmp_path).eval()
        routed = logits(model, task_ids="rte")
        with pytest.raises(ValueError, match="cannot be read any more"):
            model.merge_adapter(task="rte")
        assert torch.equal(logits(model, task_ids="rte"), routed)


def has_the_feature() -> bool:
    """True, or the test is skipped."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("needs a CPU with avx512_bf16")
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_comes_back_to_the_base_as_far_as_its_bits_allow(base_folder, kind):
    model = adapted(base_folder, kind)
    before, other = [layer.get_base_weight().clone() for layer in layers(model)], logits(model, task_ids="rte")
    model.merge_adapter(task="boolq")
    with pytest.raises(ValueError, match="is merged into the base weights"):
        logits(model, task_ids="rte")
    model.unmerge_adapter()
    for old, layer in zip(before, layers(model), strict=True):
        step = old.abs().max() / (127 if kind in ("8bit", "torchao", "hqq") else 3)
        assert (layer.get_base_weight() - old).abs().max() <= 1.5 * step
    torch.testing.assert_close(logits(model, task_ids="rte"), other, rtol=0.2, atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_safe_merge_leaves_the_quantised_weights_bit_equal(base_folder, kind):
    model = adapted(base_folder, kind)
    before = [layer.get_base_weight().clone() for layer in layers(model)]
    layers(model)[-1].poly_lora_A["default"].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite"):
        model.merge_adapter(task="rte", safe_merge=True)
    assert all(torch.equal(old, layer.get_base_weight()) for old, layer in zip(before, layers(model), strict=True))
    assert not any(layer.merged for layer in layers(model))


@TORCHAO
def test_a_base_that_rounds_its_inputs_is_not_trained_without_a_warning(base_folder, tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    def load() -> nn.Module:
        config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
        return AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=config, device_map="cpu")

    with pytest.warns(UserWarning, match=r"q_proj \(one of 14\) rounds its input to int8.* `Int8WeightOnlyConfig`"):
        model = peft.get_peft_model(load(), CONFIG)
    model(**inputs(), labels=inputs()["input_ids"], task_ids=[0, 2, 0]).loss.backward()
    grad = layers(model)[0].poly_lora_A["default"].grad
    assert grad is None or not grad.any()  # should it have some, torchao has learnt it, and the warning can go
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounds its input")
        loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert loaded.generate(**inputs(), task_ids=TASKS, max_new_tokens=2, min_new_tokens=2).shape == (3, 8)


# ---------------------------------------------------------------------------------------------- QLoRA from end to end
def trained_by_the_trainer(folder: Path, kind: str, config: peft.PeftConfig, output: Path) -> tuple[PeftModel, list]:
    """A quantised base, prepared, adapted and trained by the `Trainer` for four steps: the model and its losses."""
    base = peft.prepare_model_for_kbit_training(
        load_base(folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "_A.default" in name:  # the same for LoRA's (r, in) and the (1, n_skills, in, r) of the adapter
            start = torch.randn(4, parameter.numel() // 4, generator=generator) / 8
            parameter.data.copy_(start if parameter.dim() == 2 else start.T.reshape(parameter.shape))
    rows = [{"input_ids": ids, "labels": ids, "task_ids": i % 3} for i, ids in enumerate(inputs(rows=8)["input_ids"])]
    if not isinstance(config, PolyConfig):
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    args = TrainingArguments(
        str(output), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", TRAINED)
def test_one_skill_is_trained_on_a_quantised_base_as_lora_is(base_folder, tmp_path, kind):
    shared = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "r": 4, "lora_alpha": 8}
    config = PolyConfig(**shared, n_tasks=3, n_skills=1, n_splits=1)
    losses, wanted = [trained_by_the_trainer(base_folder, kind, c, tmp_path)[1] for c in (config, LoraConfig(**shared))]
    assert wanted[-1] < wanted[0]
    assert losses == pytest.approx(wanted, rel=0.01 if "bf16" in kind else 1e-4)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_was_trained_on_a_quantised_base_is_saved_loaded_generates_and_merges(base_folder, tmp_path, kind):
    model, losses = trained_by_the_trainer(base_folder, kind, CONFIG, tmp_path)
    assert len(losses) == 4
    model.eval().config.use_cache = True
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_base(base_folder, kind), tmp_path / "adapter").eval()
    assert torch.allclose(logits(loaded, task_ids=TASKS), logits(model, task_ids=TASKS), **tolerance(kind))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = loaded.generate(**inputs(), task_ids="sst2", **options)
    with loaded.use_task("sst2"):
        assert torch.equal(tokens, loaded.generate(**inputs(), **options))
    routed, base = logits(loaded, task_ids="sst2"), logits(load_base(base_folder, kind).eval())
    merged = logits(loaded.merge_and_unload(task="sst2"))
    assert (merged - routed).abs().mean() < 0.5 * (base - routed).abs().mean()
