"""vLLM, which serves exported LoRAs beside their base model: which models it serves so, and the line to type."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Optional

from torch import nn
from transformers import PreTrainedModel

__all__ = ["vllm_command", "vllm_section", "vllm_serves"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` accepts
# model types of decoders that vLLM (0.32) runs and adds no LoRA to
WITHOUT_LORAS = {
    "bloom",
    "dbrx",
    "falcon",
    "falcon_mamba",
    "gpt2",
    "gptj",
    "mamba",
    "mamba2",
    "orion",
    "stablelm",
    "zamba2",
}


def vllm_serves(model: nn.Module, rank: int, whole_tensors: bool) -> bool:
    """Whether vLLM is known to serve LoRAs of a model: those of decoders that generate, and nothing but low-rank pairs.

    Args:
        model: the base model.
        rank: the LoRAs' rank.
        whole_tensors: whether they hold tensors of `modules_to_save` or embeddings besides.
    """
    if not isinstance(model, PreTrainedModel) or whole_tensors or rank > RANKS[-1]:
        return False
    decoder = model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)
    return bool(decoder) and model.config.model_type not in WITHOUT_LORAS


def vllm_command(base_model: Optional[str], rank: int, folders: Mapping[str, str]) -> str:
    """The command line with which vLLM serves LoRAs beside their base model.

    Args:
        base_model: name of the base model, or None for a placeholder.
        rank: the LoRAs' rank, 512 at most; vLLM is told the next one it knows.
        folders: the folder of each LoRA by the name to serve it under.
    """
    most = next(known for known in RANKS if known >= rank)
    loras = " ".join(shlex.quote(f"{name}={folder}") for name, folder in folders.items())
    base = shlex.quote(base_model) if base_model else "BASE_MODEL"
    return f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {loras}"


def vllm_section(command: str) -> str:
    """What the card of a LoRA says of vLLM, in Markdown; `command` is that of `vllm_command`."""
    return f"""
## How to serve it

With vLLM, from the folder that this one lies in:

```sh
{command}
```

Requests name the task as their `model`. `--max-loras` says how many tasks a batch may mix.
"""
