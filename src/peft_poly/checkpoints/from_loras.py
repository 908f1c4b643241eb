"""Plain LoRAs become the skills, and the tasks, of one task-routed adapter; with gates they are stacked into one LoRA.

    LoRA i of task i ─▶ skill i:  A.T (in, r)  cut into h splits ─▶ poly_lora_A[:, i]  (h, in / h, r)
                                  B.T (r, out) cut into h splits ─▶ poly_lora_B[:, i]  (h, r, out / h)
    router row i: +z for skill i, -z for the others, so that task i starts on its own skill

PEFT loads the LoRAs, so what they compute (scales, patterns, names of layers) is PEFT's reading of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from os import PathLike, fspath
from typing import Any, Optional, Union, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ..adapter.targets import exact_targets
from ..compute.kinds import KINDS
from ..config import PolyConfig, check_task_names
from ..layer import PolyLayer
from .finding import find_file

__all__ = ["from_loras"]

Tensors = dict[str, torch.Tensor]
Pairs = dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]]  # for each layer, A, B and scale of every LoRA

# Settings of a LoRA that its tensors and scales show, or that change nothing about `y = W x + scale * B A x`.
FREE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config",
    "eva_config", "modules_to_save", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # the other initialisations change the base weights
GIVEN = {
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "n_skills",
    "n_tasks", "task_names",
}  # fmt: skip


def from_loras(
    base_model: nn.Module,
    loras: Mapping[str, Union[str, PathLike[str]]],
    *,
    n_splits: int = 1,
    adapter_name: str = "default",
    own_weight: Optional[float] = None,
    **config: Any,
) -> PeftModel:
    """Make a task-routed adapter whose skills are existing LoRAs; each is a task too, which starts on its own skill.

    With a one-hot router the outputs of the tasks are those of the LoRAs. A router of sigmoids cannot be one-hot: a
    task starts with `own_weight` of its mix on its own skill, and the rest evenly on the others. With
    `poly_type="gates"` the outputs are those of the LoRAs: they lie side by side in one LoRA of the sum of their ranks,
    and a task's gates are one on its own ranks and zero on the others.

    Args:
        base_model: the model that the LoRAs were trained on; it is adapted in place.
        loras: folder or Hub id of each LoRA by the name of its task. All adapt the same layers, and have one
            rank; with gates each may have another.
        n_splits: number of splits of the new adapter; must divide the features of every layer.
        adapter_name: its name.
        own_weight: weight of a task's own skill, in (0, 1). Default: 0.99. Not with gates, which need none.
        config: further settings of `PolyConfig`.

    Returns:
        A `PeftModel` with `n_tasks = len(loras)` and as many skills (with gates: of the sum of the ranks); the keys of
        `loras` are the names of its tasks.

    Raises:
        ValueError: the LoRAs differ in rank or layers, or one is more than low-rank pairs (DoRA, biases, a head of
            its own, ...), or does not fit the base model. The base model is left as it was.
    """
    names = list(loras)
    check_task_names(names)
    _check_arguments(base_model, own_weight, config)
    configs = {name: _lora_config(name, fspath(loras[name])) for name in names}
    weights = {name: load_peft_weights(fspath(loras[name]), device="cpu") for name in names}
    saved = _saved_modules(configs, weights)
    with _loaded(base_model, configs, weights) as lora_model:
        pairs = _pairs(lora_model, names)
    poly_config = _poly_config(base_model, configs, pairs, n_splits, own_weight, config)
    model = get_peft_model(base_model, poly_config, adapter_name=adapter_name)
    assert isinstance(model, PeftModel)
    _fill(model, adapter_name, pairs, own_weight)
    if saved:
        set_peft_model_state_dict(model, saved, adapter_name=adapter_name)
    return model


# ----------------------------------------------------------------------------------------------------- what is refused
def _check_arguments(base_model: nn.Module, own_weight: Optional[float], config: dict[str, Any]) -> None:
    if own_weight is not None and not 0 < own_weight < 1:
        raise ValueError(f"`own_weight` must lie between 0 and 1, both excluded, got {own_weight!r}.")
    poly_type = config.get("poly_type", "poly")
    if poly_type not in KINDS:
        raise ValueError(f"`poly_type` must be one of {sorted(KINDS)}, got {poly_type!r}.")
    clash = sorted(GIVEN & set(config))
    if clash:
        raise ValueError(f"{', '.join(clash)} of the new adapter follow from the LoRAs. Leave them out.")
    if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
        raise ValueError("`base_model` has adapters already. Pass the plain model that the LoRAs were trained on.")


def _lora_config(name: str, source: str) -> LoraConfig:
    find_file(source, ("adapter_config.json",))
    config = PeftConfig.from_pretrained(source)
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"The adapter for task {name!r} is of type {config.peft_type.value}; only LORA can become a skill."
        )
    assert isinstance(config, LoraConfig)
    for field in fields(config):
        default = field.default if field.default is not MISSING else cast(Any, field.default_factory)()
        value = getattr(config, field.name)
        if field.name not in FREE and value != default:
            raise ValueError(
                f"The LoRA for task {name!r} has {field.name}={value!r}. A skill is a low-rank pair per layer and "
                f"nothing else, so this LoRA cannot become one; only {field.name}={default!r} can."
            )
    if config.init_lora_weights not in KEEPS_BASE:
        raise ValueError(
            f"The LoRA for task {name!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights. Convert it to a plain LoRA first, with PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    config.init_lora_weights = True  # a layer that the file does not have then adds nothing
    config.inference_mode = False
    return config


def _saved_modules(configs: dict[str, LoraConfig], weights: dict[str, Tensors]) -> Tensors:
    """The tensors of `modules_to_save`, if all LoRAs have the same ones."""
    found = {name: {key: t for key, t in tensors.items() if "lora_" not in key} for name, tensors in weights.items()}
    first, *others = found
    for name in others:
        same = set(configs[name].modules_to_save or ()) == set(configs[first].modules_to_save or ())
        same = same and found[name].keys() == found[first].keys()
        if not same or not all(torch.equal(t, found[first][key]) for key, t in found[name].items()):
            raise ValueError(
                f"The LoRAs for tasks {first!r} and {name!r} differ in what they saved beside the low-rank pairs "
                f"({', '.join(sorted(found[name].keys() | found[first].keys()))}). An adapter has one copy of its "
                "`modules_to_save`, which all tasks share, so such LoRAs cannot become skills of one adapter."
            )
    return found[first]


# ------------------------------------------------------------------------------------------------- reading the LoRAs
@contextmanager
def _loaded(base_model: nn.Module, configs: dict[str, LoraConfig], weights: dict[str, Tensors]) -> Iterator[PeftModel]:
    """The base model with the pairs of all LoRAs on it, under the names that `_adapter` gives; taken off afterwards.

    Without their `modules_to_save`, which PEFT would leave in the place of the base model's own.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    model = None
    try:
        for index, (name, of_lora) in enumerate(configs.items()):
            config = copy.copy(of_lora)
            config.modules_to_save = None
            if model is None:
                model = PeftModel(base_model, config, adapter_name=_adapter(index))
            else:
                model.add_adapter(_adapter(index), config)
            _load(model, name, _adapter(index), {key: t for key, t in weights[name].items() if "lora_" in key})
        assert model is not None
        yield model
    finally:
        if model is not None:
            cast(Any, model.base_model).unload()
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _adapter(index: int) -> str:
    return f"lora{index}"  # a task's name may have dots, and an adapter's may not


def _load(model: PeftModel, name: str, adapter: str, weights: Tensors) -> None:
    try:
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=adapter)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ValueError(f"The LoRA for task {name!r} does not fit the base model: {detail}") from error
    if result.unexpected_keys:
        raise ValueError(
            f"The LoRA for task {name!r} has tensors that the base model has no layer for: "
            f"{', '.join(result.unexpected_keys[:3])}. It was trained on another model."
        )


def _pairs(model: PeftModel, names: list[str]) -> Pairs:
    pairs: Pairs = {}
    for path, layer in cast(nn.Module, model.base_model.model).named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        lacking = [name for index, name in enumerate(names) if _adapter(index) not in layer.lora_A]
        if lacking:
            adapts = f"{path} is none" if len(lacking) == len(names) else f"those for {lacking} do not adapt {path}"
            raise ValueError(f"All LoRAs must adapt the same linear layers, but {adapts}.")
        pairs[path] = [_pair(layer, _adapter(index)) for index in range(len(names))]
    return pairs


def _pair(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    A, B = cast(nn.Linear, layer.lora_A[adapter]), cast(nn.Linear, layer.lora_B[adapter])
    return A.weight.detach(), B.weight.detach(), layer.scaling[adapter]


def _ranks(pairs: Pairs, names: list[str]) -> dict[str, set[int]]:
    """The ranks that each LoRA has in its layers."""
    return {name: {of_layer[index][0].shape[0] for of_layer in pairs.values()} for index, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------ making the adapter
def _poly_config(
    base_model: nn.Module,
    configs: dict[str, LoraConfig],
    pairs: Pairs,
    n_splits: int,
    own_weight: Optional[float],
    settings: dict[str, Any],
) -> PolyConfig:
    first = next(iter(configs.values()))
    saved = sorted(first.modules_to_save or ()) or None
    kind = KINDS[settings.get("poly_type", "poly")]
    sizes = kind.settings_of_loras(_ranks(pairs, list(configs)), own_weight)
    scales = {scale for of_layer in pairs.values() for _, _, scale in of_layer}
    alpha = scales.pop() * sizes["r"] if len(scales) == 1 else sizes["r"]  # with one scale for all, B stays as it is
    task_types = {config.task_type for config in configs.values()}
    if len(task_types) > 1 and "task_type" not in settings:
        raise ValueError(f"The LoRAs have the task types {sorted(map(str, task_types))}. Pass `task_type=`.")
    return PolyConfig(
        **sizes,
        target_modules=exact_targets(base_model, pairs, saved),
        modules_to_save=saved,
        n_splits=n_splits,
        task_names=list(configs),
        **{"task_type": first.task_type, "lora_alpha": alpha, **settings},
    )


@torch.no_grad()
def _fill(model: PeftModel, adapter: str, pairs: Pairs, own_weight: Optional[float]) -> None:
    for path, of_layer in pairs.items():
        layer = cast(nn.Module, model.base_model.model).get_submodule(path)
        assert isinstance(layer, PolyLayer)
        KINDS[layer.poly_type[adapter]].take_loras(layer, adapter, of_layer, own_weight)
