"""Checkpoints in and out: PEFT's own `POLY`, this package's `PEFT_POLY`, and the MHR paper's Lightning files (in).

All three lay the skills out in the same way, so the tensors are copied bit by bit; what differs is the config, and
what it can say.
"""

from __future__ import annotations

import os
import pickle
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Optional, Union, cast

import peft
import torch
from peft import PeftConfig, load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..adapter.sharing import router_group
from ..compute.kinds import KINDS
from ..config import PolyConfig
from .reading import read_config
from .staging import staged

__all__ = ["convert_checkpoint"]

Tensors = dict[str, torch.Tensor]

PREFIX = "base_model.model."
A_KEY, B_KEY, ROUTER_KEY = ".poly_lora_A", ".poly_lora_B", ".poly_router.module_logits"
LIGHTNING = {".lora_a": A_KEY, ".lora_b": B_KEY, ".selector.module_logits": ROUTER_KEY}

TORN = ("invalid load key", "Unsupported operand")  # what torch says of bytes that are no pickle

# Settings that change neither the tensors nor what the adapter computes at eval, and so may be given anew.
FREE = {
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "init_weights",
    "lora_dropout", "router_temperature", "router_noise", "router_lr", "task_names", "unknown_task",
}  # fmt: skip
GIVEN_UP = ("lora_dropout", "router_temperature", "router_noise", "router_lr", "unknown_task")  # POLY has its default


def convert_checkpoint(
    source: Union[str, Path],
    target: Union[str, Path],
    to: Literal["PEFT_POLY", "POLY"] = "PEFT_POLY",
    *,
    overwrite: bool = False,
    revision: Optional[str] = None,
    prefix: str = "model.",
    **config: Any,
) -> Path:
    """Write a checkpoint as one of another type; the skills' and routers' tensors stay bit-equal.

    Args:
        source: folder or Hub id of a saved `POLY` or `PEFT_POLY` adapter, or a Lightning checkpoint (a file) of the
            MHR paper's code. Of a file nothing but tensors and plain values is unpickled.
        target: folder to write.
        to: the type to write: PEFT's own `"POLY"`, or `"PEFT_POLY"`.
        overwrite: replace an existing folder.
        revision: revision of the Hub repository.
        prefix: what stands before the layers' names in a Lightning file; taken off if it stands before all of them.
            Pass `""` for a bare state dict of a model whose own names begin with `model.`.
        config: settings to write instead of the source's, where they change nothing about its outputs (`task_names`,
            `router_noise`, ...). For a Lightning file, which has no config, also `lora_alpha` (1 if not given),
            `target_modules` and `modules_to_save`; `task_type` and `base_model_name_or_path` should be given.

    Returns:
        `target`.

    Raises:
        FileExistsError: `target` is not empty, and `overwrite` is False.
        ValueError: the source is no such checkpoint; its tensors do not fit its config; or it says what `POLY` cannot
            say. The message says what, and what can be done.
    """
    if to not in ("PEFT_POLY", "POLY"):
        raise ValueError(f"`to` must be 'PEFT_POLY' or 'POLY', got {to!r}.")
    if os.path.isfile(source):
        poly_config, tensors = _read_lightning(Path(source), prefix, config)
    else:
        poly_config, tensors = _read_folder(str(source), revision, config)
    _check_shapes(poly_config, tensors)
    written: PeftConfig = poly_config
    if to == "POLY":
        written, tensors = _as_poly(poly_config, tensors)
    with staged(target, overwrite) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        written.save_pretrained(str(folder))
    return Path(target)


# ------------------------------------------------------------------------------------------------------------ reading
def _read_folder(source: str, revision: Optional[str], settings: dict[str, Any]) -> tuple[PolyConfig, Tensors]:
    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    found = read_config(source, **hub)
    _check_settings(settings, FREE, "of a saved adapter")
    tensors = load_peft_weights(source, device="cpu", **hub)
    config = PolyConfig(**{**_values(found, PolyConfig), **settings})
    return config, {key: tensor.contiguous() for key, tensor in tensors.items()}


def _read_lightning(file: Path, prefix: str, settings: dict[str, Any]) -> tuple[PolyConfig, Tensors]:
    _check_settings(settings, FREE | {"lora_alpha", "target_modules", "modules_to_save"}, "of a Lightning checkpoint")
    if file.suffix in (".json", ".safetensors"):
        raise ValueError(f"{file} is part of a saved adapter. Pass its folder, {file.parent}.")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn pickle fails in as many ways as there are bytes
        if not isinstance(error, pickle.UnpicklingError) or any(torn in str(error) for torn in TORN):
            raise ValueError(f"{file} is no checkpoint that torch can read.") from error
        raise ValueError(
            f"{file} holds Python objects besides tensors, and those are not unpickled, for a file can run code that "
            "way. If you trust it, load it with `torch.load(file, weights_only=False)`, save its state dict with "
            f"`torch.save({{'state_dict': ...}}, other)`, and convert that. ({str(error).splitlines()[0]})"
        ) from error
    state_dict = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors, left_out = _renamed(state_dict, prefix)
    if not tensors:
        raise ValueError(
            f"{file} has no tensors named `<layer>.lora_a`, `<layer>.lora_b` and `<layer>.selector.module_logits`, as "
            "the checkpoints of the MHR paper have them."
        )
    if left_out:
        warnings.warn(
            f"{len(left_out)} tensors of {file} are no skill and no router and are left out: {left_out[0]}..."
        )
    return _lightning_config(tensors, settings), tensors


def _renamed(state_dict: dict[str, Any], prefix: str) -> tuple[Tensors, list[str]]:
    """The skills and routers of a Lightning state dict under PEFT's keys, and the names of its other tensors."""
    endings = {key: next((end for end in LIGHTNING if key.endswith(end)), None) for key in state_dict}
    found = {key: end for key, end in endings.items() if end and isinstance(state_dict[key], torch.Tensor)}
    cut = len(prefix) if all(key.startswith(prefix) for key in found) else 0
    tensors = {
        f"{PREFIX}{key[cut:].removesuffix(end)}{LIGHTNING[end]}": state_dict[key].contiguous().clone()
        for key, end in found.items()  # a clone, for a shared router is one tensor
    }
    return tensors, [key for key in state_dict if key not in found]


def _lightning_config(tensors: Tensors, settings: dict[str, Any]) -> PolyConfig:
    layers = _layers(tensors)
    if not layers:
        raise ValueError("The checkpoint has routers but no skills (`<layer>.lora_a`).")
    A, router = tensors[f"{PREFIX}{layers[0]}{A_KEY}"], _router(tensors, layers[0], "layer")
    if A.dim() != 4 or router is None or router.dim() != 2:
        raise ValueError(
            f"{layers[0]}: `lora_a` must be (split, skill, in / split, rank) and `selector.module_logits` (task, split "
            f"* skill), found {tuple(A.shape)} and {None if router is None else tuple(router.shape)}. Only checkpoints "
            "with a Poly or MHR selector in each layer are converted."
        )
    h, k, _, r = A.shape
    return PolyConfig(
        **{"target_modules": layers, **settings}, r=r, n_skills=k, n_splits=h, n_tasks=router.shape[0], poly_type="poly"
    )


def _check_settings(settings: dict[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(settings) - allowed)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} {where} cannot be given anew: it follows from the tensors, or changes what they "
            f"compute. What can be given: {', '.join(sorted(allowed))}."
        )


# ------------------------------------------------------------------------------------------------------------ tensors
def _layers(tensors: Tensors) -> list[str]:
    """Names of the adapted layers in the base model."""
    return [key.removesuffix(A_KEY).removeprefix(PREFIX) for key in tensors if key.endswith(A_KEY)]


def _router(tensors: Tensors, layer: str, granularity: str) -> Optional[torch.Tensor]:
    """A layer's own router, or the one that it shares; a shared one is saved under the first of its layers."""
    own = tensors.get(f"{PREFIX}{layer}{ROUTER_KEY}")
    group = router_group(granularity, layer)
    if own is not None or group is None:
        return own
    routers = (key for key in tensors if key.endswith(ROUTER_KEY))
    sharing = (key for key in routers if router_group(granularity, key.removeprefix(PREFIX)) == group)
    return next((tensors[key] for key in sharing), None)


def _check_shapes(config: PolyConfig, tensors: Tensors) -> None:
    layers = _layers(tensors)
    if not layers:
        raise ValueError("The checkpoint has no skills (`poly_lora_A`).")
    h, k, r, columns = config.n_splits, config.n_skills, config.r, KINDS[config.poly_type].columns(config)
    for layer in layers:
        A, B = tensors[f"{PREFIX}{layer}{A_KEY}"], tensors.get(f"{PREFIX}{layer}{B_KEY}")
        router = _router(tensors, layer, config.router_granularity)
        found = [None if tensor is None else tuple(tensor.shape) for tensor in (A, B, router)]
        a, b, logits = (shape or () for shape in found)
        if (a[:2], a[3:], b[:3], len(b), logits) != ((h, k), (r,), (h, k, r), 4, (config.n_tasks, columns)):
            raise ValueError(
                f"The tensors of {layer} do not fit n_splits={h}, n_skills={k}, r={r}, n_tasks={config.n_tasks}: A "
                f"must be ({h}, {k}, in / {h}, {r}), B ({h}, {k}, {r}, out / {h}) and the router ({config.n_tasks}, "
                f"{columns}), found {found[0]}, {found[1]} and {found[2]}. (Later versions of mttl lay them out "
                "otherwise; only the layout of the MHR paper's code and of PEFT is converted.)"
            )


# --------------------------------------------------------------------------------------------------- what POLY can say
def _as_poly(config: PolyConfig, tensors: Tensors) -> tuple[peft.PolyConfig, Tensors]:
    _check_expressible(config)
    if config.task_names:
        warnings.warn(
            f"POLY has no task names; the ids stay, the names are dropped: {dict(enumerate(config.task_names))}."
        )
    if config.router_granularity != "layer":
        warnings.warn(
            f"POLY has a router per layer; the one of each {config.router_granularity} is copied to its layers. The "
            "outputs are the same; in further training the copies go their own ways."
        )
        for layer in _layers(tensors):
            router = cast(torch.Tensor, _router(tensors, layer, config.router_granularity))
            tensors[f"{PREFIX}{layer}{ROUTER_KEY}"] = router.clone()
    values = {**_values(config, peft.PolyConfig), "init_weights": bool(config.init_weights)}
    if config.layers_to_transform is not None:
        values["target_modules"] = _layers(tensors)
    return peft.PolyConfig(**values), tensors


def _check_expressible(config: PolyConfig) -> None:
    reason = KINDS[config.poly_type].why_not_poly(config)
    if reason is not None:
        raise ValueError(f"{reason} Export its tasks with `export_lora` instead.")
    if config.lora_alpha != 1:
        raise ValueError(
            f"POLY scales by 1 / r, that is lora_alpha=1, and this adapter has lora_alpha={config.lora_alpha}. Its "
            "tensors would have to change. Export its tasks with `export_lora` instead."
        )
    handled = {"lora_alpha", "task_names", "router_granularity", "layers_to_transform", "layers_pattern"}
    known = {field.name for field in fields(peft.PolyConfig)} | handled
    for field in (field for field in fields(config) if field.name not in known):
        value, default = getattr(config, field.name), field.default
        if value != default:
            advice = f" Pass `{field.name}={default!r}` to give it up." if field.name in GIVEN_UP else ""
            raise ValueError(f"POLY has no {field.name}, and this adapter has {field.name}={value!r}.{advice}")


def _values(config: PeftConfig, cls: type) -> dict[str, Any]:
    names = {field.name for field in fields(cls)} - {"peft_type"}
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
