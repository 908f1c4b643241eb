"""vLLM, which serves exported LoRAs beside their base model: which models it serves so, and the line to type."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

__all__ = ["vllm_command", "vllm_section", "vllm_serves"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` accepts
# classes of transformers, `LlamaForCausalLM` and so on, to which vLLM 0.32 adds LoRAs, by its registry of models
DECODERS = """
AXK1 Afmoe Apertus Arcee Cohere2 Cohere Cwm DeepseekV2 DeepseekV32 DeepseekV3 Ernie4_5 Ernie4_5_Moe Exaone4
ExaoneMoe FalconH1 FlexOlmo GPTBigCode GPTNeoX Gemma2 Gemma3 Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite Glm GlmMoeDsa
GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HYV3 HYV4 HunYuanDenseV1
HunYuanMoEV1 HyperCLOVAX Inkling Jais2 Jamba Laguna Lfm2 Lfm2Moe Llama4 Llama LongcatFlash Mellum MiniCPM3
MiniMaxM2 Ministral3 Mistral Mixtral Nemotron NemotronH OPT Olmo2 Olmo3 Olmo OlmoHybrid Olmoe Phi3 Phi Qwen2
Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe SeedOss SmolLM3 Starcoder2 VaultGemma
"""
WITH_LORAS = {f"{name}ForCausalLM" for name in DECODERS.split()}


def vllm_serves(model: nn.Module, rank: int, whole_tensors: bool) -> bool:
    """Whether vLLM is known to serve LoRAs of a model: those of some decoders of texts, and nothing but low-rank pairs.

    Args:
        model: the base model.
        rank: the LoRAs' rank.
        whole_tensors: whether they hold tensors of `modules_to_save` or embeddings besides.
    """
    if not isinstance(model, PreTrainedModel) or whole_tensors or rank > RANKS[-1]:
        return False
    return type(model).__name__ in WITH_LORAS


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


def vllm_section(base_model: Optional[str], rank: int, folders: Mapping[str, str]) -> str:
    """What the card of a LoRA says of vLLM, in Markdown; arguments of `vllm_command`.

    A base model in a folder has no name that means the same wherever the card is read, so a placeholder stands for it.
    """
    public = base_model is not None and _may_be_on_the_hub(base_model)
    command = vllm_command(base_model if public else None, rank, folders)
    where = "" if public else " `BASE_MODEL` is the folder of the base model."
    return f"""
## How to serve it

With vLLM, from the folder that this one lies in:

```sh
{command}
```

Requests name the task as their `model`. `--max-loras` says how many tasks a batch may mix.{where}
"""


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()
