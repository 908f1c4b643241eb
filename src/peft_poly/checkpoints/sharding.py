"""Adapters that are spread over processes (FSDP, DeepSpeed ZeRO-3): found before a part is taken for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from ..config import PolyConfig
from ..layer import PolyLayer

__all__ = ["check_given", "check_layer_whole", "check_whole"]

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # in names of modules, not in a state dict
GATHER = (
    "Gather it on every rank, with `state = accelerator.get_state_dict(model)` or, without accelerate, `state = "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))` of "
    "`torch.distributed.checkpoint.state_dict`; then save on rank 0, `model.save_pretrained(folder, state_dict=state)`."
)
TRAINER = (
    "`Trainer.save_model(folder)` does both, with FSDP's FULL_STATE_DICT or DeepSpeed's "
    "`stage3_gather_16bit_weights_on_model_save`."
)
LATER = "Save it, as the error of `save_pretrained` says, and load it in one process for that."


def check_whole(model: nn.Module, adapter_names: Iterable[str], to: str = "be saved") -> None:
    """Check that this process holds the whole of some adapters.

    Args:
        model: a model with task-routed layers.
        adapter_names: the adapters.
        to: what they are needed for.

    Raises:
        ValueError: it holds a part of one; the message says how to gather it.
    """
    for name, layer in model.named_modules():
        for adapter in adapter_names if isinstance(layer, PolyLayer) else ():
            how = _sharded_by(layer, adapter)
            if how:
                raise ValueError(
                    f"Adapter {adapter!r} must be whole to {to}, but it is sharded by {how}, and this process has a "
                    f"part of its tensors in {_clean(name)}. {f'{GATHER} {TRAINER}' if to == 'be saved' else LATER}"
                )


def check_layer_whole(name: str, layer: PolyLayer, adapter: str, config: PolyConfig) -> None:
    """Check that the tensors of a layer are here, in the shapes that the config says.

    Args:
        name: of the layer, for the message.
        layer: the layer.
        adapter: the adapter.
        config: its settings.

    Raises:
        ValueError: they are elsewhere, or a part of them.
    """
    A, B = layer.poly_lora_A[adapter], layer.poly_lora_B[adapter]
    h, k, r = config.n_splits, config.n_skills, config.r
    wanted = ((h, k, layer.in_features // h, r), (h, k, r, layer.out_features // h))
    found = (tuple(A.shape), tuple(B.shape))
    if found != wanted or A.is_meta or B.is_meta or hasattr(A, "full_tensor"):
        where = "meta" if A.is_meta or B.is_meta else A.device.type
        raise ValueError(
            f"The tensors of adapter {adapter!r} in {name} are not all here: the config says {wanted}, found {found} "
            f"on device {where}. A sharded or offloaded adapter must be gathered first: save it, and load it again."
        )


def check_given(model: nn.Module, adapter: str, state_dict: Mapping[str, Any]) -> None:
    """Check the gathered tensors that are to be saved.

    Args:
        model: a model with task-routed layers.
        adapter: the adapter.
        state_dict: tensors by the names they have in `model`.

    Raises:
        RuntimeError: tensors of the adapter are sharded, or missing. No `ValueError`, which the first process of a
            `Trainer` under DeepSpeed takes for another error, and then waits for the others for ever.
    """
    wanted = [name for name, _ in _tensors_of(model, adapter)]
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise RuntimeError(
            f"`state_dict` lacks {len(missing)} of the {len(wanted)} tensors of adapter {adapter!r}, such as "
            f"{missing[0]}. Names must be those of this model's `state_dict()`, and tensors that `train_router_only` "
            f"froze belong to it too. {GATHER}"
        )
    sharded = [name for name in wanted if hasattr(state_dict[name], "full_tensor")]
    if sharded:
        raise RuntimeError(f"`state_dict` has a part of {sharded[0]} only: it is sharded. {GATHER}")


def _tensors_of(model: nn.Module, adapter: str) -> Iterable[tuple[str, torch.Tensor]]:
    """Skills and routers; a router that layers share is there once, as in a saved adapter."""
    seen = set()
    for name, layer in model.named_modules():
        if isinstance(layer, PolyLayer) and adapter in layer.poly_router:
            router: Any = layer.poly_router[adapter]
            held = [(f"{kind}.{adapter}", _held(layer, kind, adapter)) for kind in ("poly_lora_A", "poly_lora_B")]
            if id(router) not in seen:
                held.append((f"poly_router.{adapter}.module_logits", router._parameters.get("module_logits")))
            seen.add(id(router))
            yield from ((f"{_clean(name)}.{key}", tensor) for key, tensor in held if tensor is not None)


def _sharded_by(layer: PolyLayer, adapter: str) -> Optional[str]:
    if adapter not in layer.poly_router:
        return None
    h, k, r = layer.n_splits[adapter], layer.n_skills[adapter], layer.r[adapter]
    shapes = {
        "poly_lora_A": (h, k, layer.in_features // h, r),
        "poly_lora_B": (h, k, r, layer.out_features // h),
    }
    for kind, shape in shapes.items():
        tensor = _held(layer, kind, adapter)
        if hasattr(tensor, "full_tensor"):
            return "FSDP (`fully_shard`)"
        if not isinstance(tensor, nn.Parameter) or tensor.shape != shape:  # FSDP1: a view of its flat parameter
            return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else "FSDP"
    return None


def _held(layer: PolyLayer, kind: str, adapter: str) -> Optional[torch.Tensor]:
    held = getattr(layer, kind)
    return held._parameters.get(adapter, vars(held).get(adapter))  # FSDP1 puts its views beside the parameters


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
