"""Parameters that accelerate keeps elsewhere, on the CPU or on disk, brought here while they are needed.

accelerate's hooks load a module's parameters when the module is called, and a `ParameterDict` never is.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import named_module_tensors
from torch import nn

from .adapted import Adapted

__all__ = ["at_hand", "execution_device", "is_elsewhere", "is_offloaded", "onloaded", "refuse_gradient"]


def is_elsewhere(layer: Adapted, names: list[str]) -> bool:
    """Whether a layer cannot compute with these adapters as they are: some of their tensors hold no numbers."""
    if torch.compiler.is_compiling():
        return False
    modules: Any = layer._modules
    for name in names:
        router = modules["poly_router"]._modules[name]
        for holder, key in ((modules["poly_lora_A"], name), (modules["poly_lora_B"], name), (router, "module_logits")):
            tensor = holder._parameters.get(key)
            if tensor is not None and tensor.is_meta:
                return True
    return False


@contextmanager
def at_hand(layer: Adapted, names: list[str], x: torch.Tensor) -> Iterator[None]:
    """Have some adapters of a layer where they can be computed with.

    Args:
        layer: the layer.
        names: the adapters.
        x: what they are computed with; to learn shapes from meta tensors is no mistake.

    Raises:
        ValueError: their tensors are nowhere.
        RuntimeError: later, in the backward: their gradients would go with what was loaded for this call.
    """
    if not is_elsewhere(layer, names):
        yield
        return
    with onloaded(cast(nn.Module, layer)):
        if not x.is_meta and is_elsewhere(layer, names):
            raise ValueError(
                f"The tensors of an adapter in {names} are on the meta device in {layer.layer_name}, where there are "
                "no numbers. Load its weights first (`low_cpu_mem_usage=True` is for adapters that are loaded, not for "
                "new ones), or give the model a device map that covers them."
            )
        if torch.is_grad_enabled():
            for name in names:
                router: Any = layer.poly_router[name]
                for tensor in (layer.poly_lora_A[name], layer.poly_lora_B[name], router.module_logits):
                    if tensor.requires_grad and not tensor.is_meta:
                        tensor.register_hook(refuse_gradient)
        yield


def refuse_gradient(_: torch.Tensor) -> None:
    """Gradient hook of a tensor that was loaded for one use."""
    raise RuntimeError(
        "An adapter that accelerate offloads cannot be trained: its gradients would be lost. Leave the adapter on a "
        "device, with another device map, or freeze it."
    )


@contextmanager
def onloaded(root: nn.Module, changed: bool = False) -> Iterator[None]:
    """Have the offloaded adapters of a model, or of one layer, on their execution device.

    What is here already stays as it is, as inside PEFT's `onload_layer`.

    Args:
        root: a model with task-routed layers, such a layer, or one of its routers.
        changed: keep what is done to the parameters meanwhile, in memory; else they go back as they came.
    """
    hooked = [(module, hook) for module in _holders(root) if _is_away(module) for hook in _offload_hooks(module)]
    for module, hook in hooked:
        _take_in(module, hook)
        hook.pre_forward(module)
    try:
        yield
    finally:
        hooked = [(module, hook) for module, hook in hooked if hook in _offload_hooks(module)]  # else dispatched anew
        for module, hook in hooked if changed else ():
            tensors = named_module_tensors(module, recurse=hook.place_submodules)
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in tensors}
        for module, hook in hooked:
            hook.post_forward(module, None)


def _holders(root: nn.Module) -> list[nn.Module]:
    """The modules, each once, that hold parameters of adapters, and those around them that load all they contain."""
    found: dict[int, nn.Module] = {} if root._modules else {id(root): root}
    for layer in root.modules():
        if "poly_lora_A" in layer._modules:
            parts: Any = layer._modules
            for holder in (parts["poly_lora_A"], parts["poly_lora_B"], *parts["poly_router"].values()):
                found[id(holder)] = holder
        elif "modules_to_save" in layer._modules:
            found.update((id(module), module) for module in layer.modules_to_save.modules())  # type: ignore[union-attr]
    inside = set(found)
    for module in root.modules():
        whole = any(hook.place_submodules for hook in _offload_hooks(module))
        if whole and inside & {id(part) for part in module.modules()}:
            found[id(module)] = module
    return list(found.values())


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads a module's own parameters for each use of it."""
    return "_hf_hook" in vars(module) and bool(_offload_hooks(module))


def execution_device(module: nn.Module) -> Any:
    """Where an offloaded module is loaded to."""
    return _offload_hooks(module)[0].execution_device


def _offload_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    return [hook for hook in _flat(vars(module).get("_hf_hook")) if isinstance(hook, AlignDevicesHook) and hook.offload]


def _flat(hook: Any) -> list[Any]:
    """The hooks in a hook of several, as a router has that layers share."""
    return [inner for outer in hook.hooks for inner in _flat(outer)] if hasattr(hook, "hooks") else [hook]


def _take_in(module: nn.Module, hook: AlignDevicesHook) -> None:
    """Let the hook know of adapters that joined the module after it."""
    tensors = named_module_tensors(module, recurse=hook.place_submodules)
    new = {name: tensor.to("cpu") for name, tensor in tensors if not tensor.is_meta and name not in hook.weights_map}
    if new:
        hook.weights_map = ChainMap(new, hook.weights_map)


def _is_away(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())
