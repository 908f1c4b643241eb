"""Which layers share a router (`PolyConfig.router_granularity`), and how a shared one is saved once."""

from __future__ import annotations

import re
from typing import Optional

from torch import nn

from ..layer import PolyLayer

__all__ = ["router_group", "shared_router_keys"]

BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


def router_group(granularity: str, layer_name: str) -> Optional[str]:
    """Name of the group of layers that share a router; None if the layer has one of its own.

    ```py
    >>> router_group("block", "encoder.block.3.layer.0.SelfAttention.q")
    'encoder.block.3'
    >>> router_group("block", "lm_head") is None
    True
    >>> router_group("model", "lm_head")
    ''

    ```
    """
    if granularity == "model":
        return ""
    if granularity == "block" and (match := BLOCK.match(layer_name)):
        return match[0]
    return None


def shared_router_keys(model: nn.Module, adapter_name: str) -> list[list[str]]:
    """For each router of an adapter, its key in the model's state dict under every layer that has it."""
    keys: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PolyLayer) and adapter_name in layer.poly_router:
            name = f"{name}." if name else ""
            key = f"{name.removeprefix('_fsdp_wrapped_module.')}poly_router.{adapter_name}.module_logits"
            keys.setdefault(id(layer.poly_router[adapter_name]), []).append(key)
    return list(keys.values())
