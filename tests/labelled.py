"""Classifiers with a head per task, batches for them, and their loss one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers as tf
from adapters import spread
from tiny import VOCAB
from torch import nn

from peft_poly import PolyConfig

LABELS = {
    "sentiment": ["bad", "good"],
    "topic": 4,
    "stars": 1,
    "genres": {"labels": ["drama", "war", "love"], "kind": "multi_label"},
}
NAMES = list(LABELS)
N_LABELS = [2, 4, 1, 3]
TARGETS = [1, 3, 2.5, [0, 1, 1]]  # a label for each of these tasks
TAGS = {"entity": ["O", "PER", "LOC", "ORG"], "part": ["N", "V"], "chunk": 3}

ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
SOUND = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "conv_dim": [8, 8],
    "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12, "mask_time_prob": 0.0, "hidden_dropout": 0.0,
    "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip


def bert(cls: Any = tf.BertForSequenceClassification, **settings: Any) -> Any:
    return cls(tf.BertConfig(**ENCODER, **settings))


def deberta(cls: Any = tf.DebertaV2ForSequenceClassification) -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return cls(tf.DebertaV2Config(**ENCODER, **relative, type_vocab_size=0, pooler_dropout=0.0))


def deberta_v1() -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    return tf.DebertaForSequenceClassification(tf.DebertaConfig(**ENCODER, **relative, pooler_dropout=0.0))


def modernbert(cls: Any = tf.ModernBertForSequenceClassification) -> Any:
    sizes = {key: value for key, value in ENCODER.items() if "dropout" not in key}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 1}
    return cls(tf.ModernBertConfig(**sizes, **tokens, attn_implementation="eager"))


def t5(cls: Any = tf.T5ForSequenceClassification) -> Any:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return cls(tf.T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0))


def vit() -> Any:
    sizes = {key: value for key, value in ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=8, patch_size=4))


def swin() -> Any:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    return tf.SwinForImageClassification(tf.SwinConfig(**sizes, window_size=2, drop_path_rate=0.0))


def whisper() -> Any:
    sizes = {
        "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 1,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
        "max_source_positions": 10, "classifier_proj_size": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "decoder_start_token_id": 2, "dropout": 0.0,
    }  # fmt: skip
    return tf.WhisperForAudioClassification(tf.WhisperConfig(**sizes))


def text(rows: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1  # T5 wants an end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(name: str, *shape: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))}


@dataclass
class Classifier:
    """A model, its inputs for four rows, the layers to adapt, and what its base makes anew before the last one."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    targets: Any
    anew: tuple[str, ...] = ()


ATTENTION = ["query", "value"]
MODELS = {
    "bert": Classifier(bert, text, ATTENTION),
    "roberta": Classifier(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER, pad_token_id=0)),
        text,
        ATTENTION,
        ("classifier.dense",),
    ),
    "deberta": Classifier(deberta, text, ["query_proj", "value_proj"], ("pooler.dense",)),
    "deberta_v1": Classifier(deberta_v1, text, ["in_proj", "pos_q_proj", "pos_proj"], ("pooler.dense",)),
    "modernbert": Classifier(modernbert, text, "all-linear", ("head.dense", "head.norm")),
    "t5": Classifier(t5, text, "all-linear", ("classification_head.dense",)),
    "llama": Classifier(lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER)), text, "all-linear"),
    "qwen": Classifier(lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**DECODER)), text, None),
    "vit": Classifier(vit, noise("pixel_values", 3, 8, 8), "all-linear"),
    "swin": Classifier(swin, noise("pixel_values", 3, 16, 16), "all-linear"),
    "whisper": Classifier(whisper, noise("input_features", 8, 20), ["q_proj", "v_proj"], ("projector",)),
    "wav2vec2": Classifier(
        lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SOUND)),
        noise("input_values", 100),
        ["q_proj", "v_proj"],
        ("projector",),
    ),
}


def config(**settings: Any) -> PolyConfig:
    """Four tasks of three kinds, unless said otherwise, whose adapter does something from the start."""
    given = {"task_type": "SEQ_CLS", "task_labels": LABELS, "target_modules": ATTENTION, "init_weights": False}
    return PolyConfig(**{**given, "r": 4, "router_noise": False, **settings})


def adapted(base: Any = None, **settings: Any) -> peft.PeftModel:
    """A classifier with heads, in eval mode; BERT unless said otherwise."""
    torch.manual_seed(0)
    return spread(peft.get_peft_model(bert() if base is None else base, config(**settings))).eval()


def targets(device: Any = "cpu") -> torch.Tensor:
    """`TARGETS` as one tensor."""
    rows = [[*(t if isinstance(t, list) else [t]), -100, -100, -100][:4] for t in TARGETS]
    return torch.tensor(rows, dtype=torch.float, device=device)


def naive_losses(logits: torch.Tensor, found: list[Any], tasks: list[str], labels: dict = LABELS) -> list[torch.Tensor]:
    """What each row loses, by torch's own losses on its own logits."""
    from peft_poly.labels import read_labels

    losses = []
    for row, target, task in zip(logits, found, tasks, strict=True):
        read = read_labels(task, labels[task])
        own = row[: len(read)]
        weights = torch.tensor(read.weights or [1.0] * len(read))
        if read.kind == "regression":
            losses.append(weights[0] * nn.MSELoss()(own[0], torch.tensor(float(target))))
        elif read.kind == "multi_label":
            losses.append(nn.BCEWithLogitsLoss(pos_weight=weights)(own, torch.tensor(target, dtype=own.dtype)))
        else:
            losses.append(nn.CrossEntropyLoss(weight=weights, reduction="sum")(own, torch.tensor(int(target))))
    return losses
