"""A consumer that is not PEFT: llama.cpp converts the exported LoRAs and generates the same tokens with them.

Needs `pip install llama-cpp-python gguf sentencepiece`, and in the variable LLAMA_CPP the folder of llama.cpp's sources
with `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py` (they are in llama-cpp-python's sdist, in vendor/llama.cpp).
"""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch import nn

from peft_poly import PolyConfig, PolyLayer
from peft_poly.checkpoints.export import export_lora

pytestmark = pytest.mark.slow

NEW_TOKENS = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = ["rte", "sst2"]
PROMPTS = [[5, 99, 321, 7], [17, 4, 400], [250, 251, 252, 253, 8]]


def save_base(folder):
    """A tiny Llama with the SentencePiece tokenizer that llama.cpp's converter reads."""
    spm = pytest.importorskip("sentencepiece")
    letters = random.Random(0)
    text = [" ".join("".join(letters.choices("abcdefghijklmnop", k=5)) for _ in range(20)) for _ in range(2000)]
    folder.mkdir()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=512, minloglevel=2
    )
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def convert(script, *arguments):
    command = [sys.executable, str(Path(os.environ["LLAMA_CPP"]) / script), "--outtype", "f32", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A task-routed model, and a folder with its base and its tasks as GGUF files."""
    pytest.importorskip("llama_cpp")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not say where llama.cpp's conversion scripts are")
    root = tmp_path_factory.mktemp("llamacpp")
    base = save_base(root / "base")
    config = PolyConfig(
        task_type="CAUSAL_LM", r=8, n_splits=4, n_skills=3, lora_alpha=32, task_names=TASKS, target_modules=TARGETS,
        init_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    for layer in model.modules():
        if isinstance(layer, PolyLayer):
            nn.init.normal_(layer.poly_router["default"].module_logits, std=2.0)
    convert("convert_hf_to_gguf.py", root / "base", "--outfile", root / "base.gguf")
    for task, folder in export_lora(model, None, root / "loras").items():
        convert("convert_lora_to_gguf.py", folder, "--base", root / "base", "--outfile", root / f"{task}.gguf")
    return model, root


def load(root, task):
    """llama.cpp on one thread, with its cache in float32, so that what is left is rounding."""
    import llama_cpp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llama_cpp.Llama(
            model_path=str(root / "base.gguf"),
            lora_path=None if task is None else str(root / f"{task}.gguf"),
            n_ctx=64, n_threads=1, logits_all=True, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
        )  # fmt: skip


def greedy(llm, prompt):
    """Tokens and the logits that each was chosen by, computing the whole sequence anew at every step."""
    tokens, logits = list(prompt), []
    for _ in range(NEW_TOKENS):
        llm.reset()
        llm.eval(tokens)
        logits.append(np.array(llm.scores[len(tokens) - 1]))
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@torch.no_grad()
def greedy_of_ours(model, prompt, task):
    tokens, logits = list(prompt), []
    for _ in range(NEW_TOKENS):
        logits.append(model(input_ids=torch.tensor([tokens]), task_ids=task).logits[0, -1].numpy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@pytest.mark.parametrize("task", TASKS)
def test_llamacpp_generates_the_tokens_of_the_task(exported, task, record_property, capsys):
    model, root = exported
    llm, bare = load(root, task), load(root, None)
    agreed, differences, without = 0, [], 0
    for prompt in PROMPTS:
        wanted, wanted_logits = greedy_of_ours(model, prompt, task)
        found, logits = greedy(llm, prompt)
        agreed += sum(a == b for a, b in zip(wanted, found, strict=True)) - len(prompt)
        without += sum(a == b for a, b in zip(wanted, greedy(bare, prompt)[0], strict=True)) - len(prompt)
        differences.append(np.abs(logits - wanted_logits).max())
    total = NEW_TOKENS * len(PROMPTS)
    record_property("agreement", f"{agreed}/{total}")
    with capsys.disabled():
        print(
            f"\n{task}: {agreed}/{total} greedy tokens agree ({without} without it); logits to {max(differences):.1e}"
        )
    assert agreed == total
    assert max(differences) < 1e-3
    assert without < total  # the LoRA matters
