"""Models with random weights, in the shapes of known ones, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 4096


class Stack(nn.Module):
    """Four square linear layers and nothing else: the adapted layer by itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def llama(size: int, depth: int) -> nn.Module:
    heads = max(size // 64, 2)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=size, intermediate_size=size * 11 // 4, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, pad_token_id=0,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=VOCAB, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model, the layers to adapt in it, and PEFT's task type; `size` is the features of a bare stack of layers."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    task_type: str | None
    size: int = 0


def _stack(size: int) -> Shape:
    return Shape(lambda: Stack(size), tuple(f"layers.{i}" for i in range(4)), None, size)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # the seven linear layers of a block
SHAPES = {
    "t5-small": Shape(t5, ("q", "k", "v", "o", "wi", "wo"), "SEQ_2_SEQ_LM"),
    "llama-1024x4": Shape(lambda: llama(1024, 4), ATTENTION, "CAUSAL_LM"),
    "bert-384x6": Shape(bert, ("query", "key", "value", "output.dense", "intermediate.dense"), "SEQ_CLS"),
    "llama-64x4": Shape(lambda: llama(64, 4), LINEARS, "CAUSAL_LM"),  # bound by launches
    "llama-64x24": Shape(lambda: llama(64, 24), LINEARS, "CAUSAL_LM"),
    "linear-256": _stack(256),
    "linear-768": _stack(768),
    "linear-2048": _stack(2048),
}


def make_inputs(name: str, rows: int, length: int) -> dict[str, Any]:
    """Inputs of a forward: `(rows, length)` tokens, or `(rows, length, size)` numbers for a bare stack."""
    generator, shape = torch.Generator().manual_seed(3), SHAPES[name]
    if shape.size:
        return {"x": torch.randn(rows, length, shape.size, generator=generator)}
    tokens = torch.randint(3, VOCAB, (rows, length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if shape.task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = tokens
    return inputs


def make_task_ids(rows: int, distinct: int, n_tasks: int) -> torch.Tensor:
    """Task ids `(rows,)` of so many distinct tasks, taken from all over the adapter, in turn: no two alike adjacent."""
    return torch.arange(rows) % distinct * (n_tasks // distinct)
