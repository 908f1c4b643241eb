"""The line that serves exported tasks with vLLM: quoted, with a rank that vLLM knows, and only for models it serves."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from tiny import CASES

from peft_poly import PolyConfig
from peft_poly.checkpoints.export import export_lora
from peft_poly.checkpoints.vllm import WITH_LORAS, vllm_command, vllm_section, vllm_serves

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def llama() -> tf.LlamaForCausalLM:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_is_told_a_rank_that_it_knows(rank, most):
    assert f"--max-lora-rank {most} " in vllm_command("some/model", rank, {"a": "b"})


def test_the_line_is_quoted_for_the_shell():
    assert vllm_command(None, 8, {"a": "my folder/a"}) == (
        "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules 'a=my folder/a'"
    )


def test_decoders_are_served():
    assert vllm_serves(llama(), 8, whole_tensors=False)


OLD = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}
NOT_SERVED = {  # decoders that vLLM does not know, or adds no LoRA to
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**OLD)),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**OLD)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**{**OLD, "n_head": 4}, rotary_dim=2)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=32)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SIZES)),
    "gpt-neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2, vocab_size=32)
    ),
    "bert as a decoder": lambda: tf.BertLMHeadModel(tf.BertConfig(**SIZES, is_decoder=True)),
}


@pytest.mark.parametrize("whose", NOT_SERVED)
def test_decoders_that_vllm_does_not_serve_have_no_line(whose):
    model = NOT_SERVED[whose]()
    assert model.can_generate()
    assert not vllm_serves(model, 8, whole_tensors=False)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3", "OPT", "GPTNeoX", "SmolLM3", "Olmo2"])
def test_classes_that_vllm_lists_are_known_by_their_names_in_transformers(name):
    assert f"{name}ForCausalLM" in WITH_LORAS
    assert hasattr(tf, f"{name}ForCausalLM")


def test_a_card_names_no_folder_of_the_machine_that_wrote_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    config = PolyConfig(task_type="CAUSAL_LM", task_names=["a", "b"], target_modules=["q_proj"])
    model = peft.get_peft_model(tf.LlamaForCausalLM.from_pretrained("base"), config)
    folders = export_lora(model, None, "loras")
    assert capsys.readouterr().out.startswith("vllm serve base --enable-lora")  # from where it was printed
    card = ModelCard.load(folders["a"] / "README.md").text
    assert "vllm serve BASE_MODEL --enable-lora" in card  # the card says: from the folder that this one lies in
    assert "`BASE_MODEL` is the folder of the base model" in card


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "~/llama", "a/b/c", None])
def test_a_card_takes_no_path_for_the_name_of_a_model(name):
    assert "vllm serve BASE_MODEL" in vllm_section(name, 8, {"a": "./a"})
    assert "vllm serve some/llama" in vllm_section("some/llama", 8, {"a": "./a"})


@pytest.mark.parametrize("whose", ["llama, no head", "bert", "encoder", "t5", "module", "rank", "tensors"])
def test_what_vllm_does_not_serve_has_no_line(whose):
    model, rank, whole = llama(), 8, False
    if whose == "llama, no head":
        model = model.model
    elif whose in ("bert", "encoder"):
        cls = tf.BertForSequenceClassification if whose == "bert" else tf.BertModel
        model = cls(tf.BertConfig(**SIZES))
    elif whose == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=32, **sizes))
    elif whose == "module":
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    elif whose == "rank":
        rank = 513
    else:
        whole = True
    assert not vllm_serves(model, rank, whole_tensors=whole)


@pytest.mark.parametrize("case", ["llama", "t5", "mlp"])
def test_the_line_is_printed_and_in_the_card_for_models_that_vllm_serves_and_for_no_others(case, tmp_path, capsys):
    own = CASES[case]
    config = PolyConfig(task_type=own.task_type, target_modules=own.target_modules, r=4, task_names=["a", "b"])
    folders = export_lora(peft.get_peft_model(own.make(), config), None, tmp_path / "loras")
    card = ModelCard.load(next(iter(folders.values())) / "README.md").text
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("vllm serve ") for line in lines] == ([True] if case == "llama" else [])
    assert ("vllm serve " in card) == ("How to serve it" in card) == (case == "llama")
    assert "How to load it" in card


def test_a_trained_head_comes_without_the_line(tmp_path, capsys):
    config = PolyConfig(
        task_type="CAUSAL_LM", task_names=["a", "b"], modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    with pytest.warns(UserWarning, match="refuse such an adapter"):
        export_lora(peft.get_peft_model(llama(), config), None, tmp_path / "loras")
    assert capsys.readouterr().out == ""
