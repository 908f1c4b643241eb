"""Where a classifier of transformers has its last layer, which becomes a head per task, and what comes before it anew.

    backbone ─▶ layers that the base makes anew: pooler, dense, projector ─▶ last layer ─▶ logits
    (adapted)   trained whole, shared by the tasks, saved                    a head for each task

PEFT's `modules_to_save` trains, saves and switches both: an adapter has a copy of each layer, and in its copy the last
one is a `TaskHeads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ...config import PolyConfig
from ...labels import TaskLabels
from ...tasks.context import TaskContext
from .heads import TaskHeads

__all__ = [
    "active_heads",
    "check_has_head",
    "describe_labels",
    "freeze_shared_layers",
    "give_back_layers",
    "heads_of",
    "install_heads",
    "labelled",
    "named_heads",
    "replace_heads",
    "reserve_layers",
    "tell_heads",
    "train_heads",
]


@dataclass(frozen=True)
class Place:
    """Where the last layer is: inside the child `child` of the model, under `path`, which is empty if it is the child.

    `layers` are the children that the base model makes anew, this one among them.
    """

    child: str
    path: str
    layers: tuple[str, ...]


def reserve_layers(model: nn.Module, config: PolyConfig) -> None:
    """Before an adapter is injected: its heads and the layers before them become `modules_to_save`.

    Raises:
        ValueError: the model has no last layer of labels, or an adapter of another kind sits in it.
    """
    if config.labels is None:
        return
    place = _place(model)
    named = list(dict.fromkeys(config.modules_to_save or []))
    config.modules_to_save = [*named, *(name for name in place.layers if name not in named)]


def install_heads(model: nn.Module, config: PolyConfig, adapter_name: str) -> bool:
    """After an adapter was injected: in its copy of the last layers, the last one becomes the heads; if it has any."""
    if config.labels is None:
        return False
    place = _place(model)
    copies = _wrapper(model, place).modules_to_save
    last = _within(copies[adapter_name], place.path)
    hook, dtype = getattr(last, "_hf_hook", None), last.weight.dtype
    device = last.weight.device if hook is None else torch.device(hook.execution_device)
    heads = TaskHeads(last.in_features, config.labels, last.bias is not None, adapter_name)
    heads = heads.to_empty(device=device) if next(heads.parameters()).is_meta else heads.to(device)
    heads.to(dtype if dtype.is_floating_point else torch.float32)
    heads.train(last.training).requires_grad_(last.weight.requires_grad)
    if place.path:
        parent, _, name = place.path.rpartition(".")
        setattr(_within(copies[adapter_name], parent), name, heads)
    else:
        copies[adapter_name] = heads
    return True


def tell_heads(model: nn.Module, context: Optional[TaskContext]) -> None:
    """Have all heads in a model, of its config and of one's own, know the tasks of its calls."""
    for module in model.modules():
        if _is_heads(module):
            module.task_context = context  # type: ignore[assignment]


def active_heads(model: nn.Module) -> Optional[TaskHeads]:
    """The heads that a base model computes its logits with; None where these are those of its own last layer."""
    for child in model.children():
        if isinstance(child, ModulesToSaveWrapper) and not child.disable_adapters and child.active_adapters:
            adapter = child.active_adapters[0]
            for module in child.modules_to_save[adapter].modules() if adapter in child.modules_to_save else ():
                if isinstance(module, TaskHeads) and module.adapter_name == adapter:
                    return module
    return None


def named_heads(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TaskHeads]]:
    """All heads that an adapter trains and saves, of its config and in modules of one's own.

    Each comes with the name that its layer has in the base model.
    """
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for path, module in wrapper.modules_to_save[adapter_name].named_modules():
                if _is_heads(module):
                    yield f"{name}.{path}" if path else name, cast(TaskHeads, module)


def heads_of(model: nn.Module, adapter_name: str) -> list[TaskHeads]:
    """As `named_heads`, without the names."""
    return [heads for _, heads in named_heads(model, adapter_name)]


def check_has_head(model: nn.Module, adapter_name: str, task: str) -> bool:
    """Whether an adapter has heads at all.

    Raises:
        ValueError: a module of one's own has none for this task.
    """
    found = list(named_heads(model, adapter_name))
    for name, heads in found:
        if task not in heads.labels:
            raise ValueError(f"{name} has no head for the task {task!r}. It has: {', '.join(heads.labels)}.")
    return bool(found)


def train_heads(model: nn.Module, config: PolyConfig, adapter_name: str, shared: bool) -> None:
    """Thaw the heads of an adapter where it is switched on: one that was loaded for inference has them frozen.

    Args:
        model: the base model.
        config: of the adapter.
        adapter_name: its name.
        shared: the layers before the heads too, which its tasks share.
    """
    layers = _place(model).layers if shared and config.labels is not None else ()
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        if adapter_name in wrapper.active_adapters and not wrapper.disable_adapters:
            for module in wrapper.modules_to_save[adapter_name].modules():
                for parameter in module.parameters(recurse=False) if name in layers or _is_heads(module) else ():
                    parameter.requires_grad_(True)


def freeze_shared_layers(model: nn.Module, config: PolyConfig, adapter_name: str) -> None:
    """Freeze what comes before the heads of an adapter: the layers that its tasks share."""
    for name in () if config.labels is None else _place(model).layers:
        for module in model.get_submodule(name).modules_to_save[adapter_name].modules():  # type: ignore[index, union-attr]
            for parameter in () if _is_heads(module) else module.parameters(recurse=False):
                parameter.requires_grad_(False)


def give_back_layers(model: nn.Module, config: PolyConfig) -> None:
    """Before an adapter is unloaded without a merge: the base model gets the layers back that it came with."""
    if config.labels is not None:
        for name in _place(model).layers:
            model.get_submodule(name)._active_adapter = []  # type: ignore[assignment]


def replace_heads(model: nn.Module, task: str) -> Optional[TaskLabels]:
    """After a merge: in place of heads, the layer of one task.

    Returns:
        What the labels of the model are now, where the heads were those of a config.
    """
    labels: Optional[TaskLabels] = None
    for name, module in list(model.named_modules()):
        if _is_heads(module):
            labels = module.labels[task] if module.adapter_name else labels
            parent, _, child = name.rpartition(".")
            layer = module.linear(list(module.labels).index(task))
            setattr(model.get_submodule(parent), child, layer.to(getattr(model, "dtype", layer.weight.dtype)))
    return labels


def describe_labels(model: nn.Module, labels: TaskLabels) -> None:
    """Have a model and its config say which labels its logits are of."""
    labelled(model.config, labels)
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)  # type: ignore[assignment]


def labelled(config: Any, labels: TaskLabels) -> Any:
    """A config of transformers, told which labels the logits are of."""
    for name, value in labels.config.items():  # the number first: it resets the names
        setattr(config, name, value)
    return config


def _place(model: nn.Module) -> Place:
    layers = _new_layers(model)
    n_labels = getattr(getattr(model, "config", None), "num_labels", None)
    last: list[tuple[str, str, int]] = []
    for child, layer in layers.items():
        for path, module in layer.named_modules():
            if isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"{child}{'.' if path else ''}{path} has an adapter, and is to be trained whole with the heads of "
                    "`task_labels`. Leave it out of the other adapter with `exclude_modules`."
                )
            if isinstance(module, nn.Linear) and module.out_features == n_labels:
                last.append((child, path, module.in_features))
    if not last:
        raise ValueError(
            f"{type(model).__name__} has no last layer of labels that a head per task could take the place of. Load "
            "the base model with the Auto class of the task, such as `AutoModelForSequenceClassification`, "
            "`AutoModelForTokenClassification` or `AutoModelForImageClassification`. In a model of your own use "
            "`peft_poly.TaskHeads`."
        )
    child, path, _ = last[-1]
    others = [name for name, inner, size in last[:-1] if name != child and (inner, size) == last[-1][1:]]
    if others:
        raise ValueError(
            f"{type(model).__name__} has several last layers of labels, {', '.join([*others, child])}, and a head per "
            "task can take the place of one only."
        )
    return Place(child, path, tuple(layers))


def _new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What a classifier has beside its pretrained backbone, as it came; empty for any other model."""
    children = dict(model.named_children())
    backbone = {name for name, child in children.items() if isinstance(child, PreTrainedModel)}
    backbone |= {getattr(model, "base_model_prefix", "")} & children.keys()
    if not isinstance(model, PreTrainedModel) or not backbone:
        return {}
    layers = {
        name: child.original_module if isinstance(child, AuxiliaryTrainingWrapper) else child
        for name, child in children.items()
        if name not in backbone
    }
    return {name: layer for name, layer in layers.items() if next(layer.parameters(), None) is not None}


def _wrapper(model: nn.Module, place: Place) -> Any:
    return model.get_submodule(place.child)


def _within(module: nn.Module, path: str) -> Any:
    return module.get_submodule(path) if path else module


def _is_heads(module: Any) -> bool:
    return isinstance(module, TaskHeads)
