"""The routing of an adapter as plain tensors: read from a model, or from a saved adapter without its base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union, cast

import torch
from peft import __version__ as version
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from safetensors import safe_open
from torch import nn

from ..adapter.sharing import router_group
from ..compute.kinds import KINDS, Kind
from ..compute.onloading import onloaded
from ..config import PolyConfig
from ..layer import PolyLayer
from ..router import Router
from ..tasks.ids import resolve_task
from .finding import find_file

__all__ = ["Routing", "read_config", "read_routing", "read_tensors"]

CONFIG = "adapter_config.json"
HEADS = "task_heads.json"  # of modules of one's own; see `adapter/labelled/described.py`
ROUTER_KEY = "poly_router.module_logits"
ALL_LAYERS = "all layers"
TYPES = ("PEFT_POLY", "POLY")


@dataclass(frozen=True)
class Routing:
    """What the routers of one adapter say of each task.

    Attributes:
        task_names: by task id; the ids themselves, as text, where the tasks have no names.
        weights: mixing weights, `{layer: (t, h, k)}`, float32; each row of skills sums to 1. With gates: the gates,
            `{layer: (t, 1, r)}`.
        probabilities: how much a task wants each skill, before normalising, `{layer: (t, h, k)}`, float32 in (0, 1).
            Empty with gates.
        config: the adapter's config, if known.

    Layers that share a router appear once, under the name of what shares it (a block, or "all layers").
    """

    task_names: tuple[str, ...]
    weights: dict[str, torch.Tensor]
    probabilities: dict[str, torch.Tensor]
    config: Optional[PeftConfig] = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the model (or of the file)."""
        return list(self.weights)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of tasks, splits and skills; with gates of tasks, 1, and ranks."""
        return cast(tuple[int, int, int], tuple(next(iter(self.weights.values())).shape))

    @property
    def kind(self) -> Kind:
        """The kind of the adapter."""
        return kind_of(self.config)

    def task_id(self, task: Union[int, str]) -> int:
        """Id of a task given by name, by id, or by id as text.

        Raises:
            ValueError: there is no such task; the message names the nearest.
        """
        if isinstance(task, str) and task not in self.task_names and task.isdecimal():
            task = int(task)
        return resolve_task(task, PolyConfig(task_names=list(self.task_names)))


def read_routing(source: Union[nn.Module, str, Path], adapter_name: Optional[str] = None, **hub_kwargs: Any) -> Routing:
    """The routing of a model's adapter, or of a saved one, which needs no base model.

    Args:
        source: a model with task-routed layers, a folder, or the id of a repository on the Hub. A saved adapter may be
            one of this package or of PEFT's own Poly.
        adapter_name: which adapter of the model. Default: its first active one.
        hub_kwargs: `revision`, `token`, `cache_dir` and the like of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: it is no task-routed adapter, or its weights do not fit its config.

    Example:

    ```py
    >>> import peft, peft_poly, torch
    >>> from peft_poly.insight.analysis import read_routing
    >>> config = peft_poly.PolyConfig(target_modules=["0"], n_skills=4, task_names=["cat", "dog"])
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 2)), config)
    >>> read_routing(model).shape
    (2, 1, 4)

    ```
    """
    if isinstance(source, nn.Module):
        return _routing_of_model(source, adapter_name)
    config = read_config(source, **hub_kwargs)
    logits = _saved_logits(source, **hub_kwargs)
    kind = kind_of(config)
    wanted = (int(config.n_tasks), kind.columns(config))  # type: ignore[attr-defined, arg-type]
    for key, tensor in logits.items():
        if tensor.isnan().any():
            raise ValueError(f"The router of {key} in {source} holds NaN, so no routing can be read from it.")
        if tensor.shape != wanted:
            sizes = ", ".join(f"{name}={getattr(config, name)}" for name in ("n_tasks", "n_splits", "n_skills", "r"))
            raise ValueError(
                f"The router of {key} in {source} has the shape {tuple(tensor.shape)}, but its adapter_config.json "
                f"asks for {wanted}: {sizes}."
            )
    granularity = getattr(config, "router_granularity", "layer")
    return _routing(config, {_label(granularity, key): tensor for key, tensor in logits.items()})


def read_config(source: Union[str, Path], **hub_kwargs: Any) -> PeftConfig:
    """The config of a saved adapter, of this package or of PEFT's own Poly; arguments and errors of `read_routing`."""
    path = find_file(source, (CONFIG,), **hub_kwargs)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or "peft_type" not in saved:
            raise ValueError("it is no JSON object with a `peft_type`.")
        if saved["peft_type"] not in PeftType.__members__:
            raise ValueError(f"PEFT {version} has no type of adapter {saved['peft_type']!r}.")
        if saved["peft_type"] in TYPES:
            return PeftConfig.from_pretrained(str(source), **hub_kwargs)
    except (OSError, TypeError, ValueError) as error:
        said = f"it is no JSON ({error})" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"The {CONFIG} of {source} cannot be read: {said}") from error
    raise ValueError(
        f"{source} holds a {saved['peft_type']} adapter, which has no router. Wanted is one of {', '.join(TYPES)}."
    )


def _routing_of_model(model: nn.Module, adapter_name: Optional[str]) -> Routing:
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, PolyLayer)}
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer.poly_lora_A))
    if not names:
        raise ValueError(f"{type(model).__name__} has no task-routed layer. Add an adapter with a PolyConfig first.")
    active = [name for layer in layers.values() for name in layer.active_adapters if name in names]
    name = (active or names)[0] if adapter_name is None else adapter_name
    if name not in names:
        raise ValueError(f"There is no task-routed adapter {name!r}. There are: {names}.")
    found, seen, config = {}, set(), None
    for key, layer in layers.items():
        if name in layer.poly_router and id(layer.poly_router[name]) not in seen:
            router = cast(Router, layer.poly_router[name])
            seen.add(id(router))
            config = layer.task_context.configs[name]
            label = _label(config.router_granularity, key.removeprefix("base_model.model."))
            with onloaded(model):
                found[label] = router.module_logits.detach().float().cpu()
    return _routing(cast(PeftConfig, config), found)


def kind_of(config: Optional[PeftConfig]) -> Kind:
    """The kind of an adapter of this package, or of PEFT's own Poly; where no config is known, one that mixes."""
    return KINDS[getattr(config, "poly_type", "poly")]


def _routing(config: PeftConfig, logits: dict[str, torch.Tensor]) -> Routing:
    names = getattr(config, "task_names", None) or map(str, range(getattr(config, "n_tasks", 0)))
    shown = {key: kind_of(config).shown(config, tensor) for key, tensor in logits.items()}
    return Routing(
        tuple(names),
        {key: weights for key, (weights, _) in shown.items()},
        {key: p for key, (_, p) in shown.items() if p is not None},
        copy.copy(config),
    )


def _label(granularity: str, key: str) -> str:
    group = router_group(granularity, key)
    return key if group is None else group or ALL_LAYERS


def _saved_logits(source: Union[str, Path], **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """The router logits `(t, h * k)` in a checkpoint, float32, by layer; of safetensors nothing else is read."""
    path = find_file(source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), **hub_kwargs)
    try:
        tensors = read_tensors(path, lambda key: key.endswith(ROUTER_KEY))
    except Exception as error:  # a torn pickle fails in as many ways as there are bytes
        raise ValueError(f"{path.name} of {source} cannot be read: {error}") from error
    if not tensors:
        raise ValueError(f"{path.name} of {source} has no tensor named ...{ROUTER_KEY}: it holds no router.")
    names = {key: key.removesuffix(f".{ROUTER_KEY}").removeprefix("base_model.model.") for key in tensors}
    return {names[key]: tensors[key].float() for key in sorted(tensors, key=_natural)}


def read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors of a weights file whose names are wanted, on the CPU; of safetensors nothing else is read."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor for key, tensor in saved.items() if wanted(key)}


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]
