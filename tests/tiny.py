"""Tiny models, built from configs, and the naive reference that tests compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 61
TASKS = ["rte", "sst2", "boolq"]


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def bert_config() -> tf.BertConfig:
    return tf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(bert_config())


class MLP(nn.Module):
    """A custom module without a config: `(b, ..., 16) -> (b, ..., 4)`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(16, 32)
        self.act = nn.GELU()
        self.lin1 = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.act(self.lin0(x)))


@dataclass
class Case:
    """A model, the layers to adapt, PEFT's task type, and inputs for a batch."""

    make: Any
    target_modules: list[str]
    task_type: str | None

    def inputs(self, rows: int = 3, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.make is MLP:
            return {"x": torch.randn(rows, length, 16, generator=generator)}
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.make is t5:
            inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length), generator=generator)
        return inputs


CASES = {
    "t5": Case(t5, ["q", "k", "v", "o", "wi", "wo"], "SEQ_2_SEQ_LM"),
    "llama": Case(llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "CAUSAL_LM"),
    "gpt2": Case(gpt2, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM"),
    "bert": Case(bert, ["query", "key", "value", "dense"], "SEQ_CLS"),
    "mlp": Case(MLP, ["lin0", "lin1"], None),
}


def first(output: Any) -> torch.Tensor:
    """The logits of a model's output, or the output itself."""
    return getattr(output, "logits", output)


def naive_pair(layer: nn.Module, adapter: str, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one task is at eval as a LoRA, `(in, r), (r, out)` in float64, one number of the router at a time."""
    A, B = layer.poly_lora_A[adapter].double(), layer.poly_lora_B[adapter].double()
    n_splits, n_skills = A.shape[:2]
    logits = layer.poly_router[adapter].module_logits[task].double()
    if layer.poly_type[adapter] == "gates":
        return A[0, 0], torch.stack([(1 + logits[rank]) * B[0, 0, rank] for rank in range(B.shape[2])])
    rows, columns = [], []
    for split in range(n_splits):
        p = [1 / (1 + torch.exp(-logits[split * n_skills + skill])) for skill in range(n_skills)]
        w = [value / (sum(p) + 1e-12) for value in p]
        rows.append(sum(w[skill] * A[split, skill] for skill in range(n_skills)))
        columns.append(sum(w[skill] * B[split, skill] for skill in range(n_skills)))
    return torch.cat(rows, dim=0), torch.cat(columns, dim=1)


def naive_merge(model: nn.Module, task: int, adapters: tuple[str, ...] = ("default",)) -> nn.Module:
    """A dense copy of the base model with one task's update added to every adapted weight, adapters gone."""
    import copy

    from peft_poly import PolyLayer

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PolyLayer):
            base = layer.base_layer
            for adapter in adapters:
                if adapter in layer.poly_lora_A:
                    A, B = naive_pair(layer, adapter, task)
                    delta = A @ B * (layer.lora_alpha[adapter] / layer.r[adapter])
                    is_conv1d = type(base).__name__ == "Conv1D"
                    base.weight.data = (base.weight.double() + (delta if is_conv1d else delta.T)).to(base.weight.dtype)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], base)
    return model
