"""Which names an adapter can have: PEFT makes modules of them, and takes them out of the names of saved tensors."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import PolyConfig

__all__ = ["check_adapter_name"]

HOLDERS = (nn.ModuleDict(), nn.ParameterDict())  # what layers keep their adapters in, by name


def check_adapter_name(adapter_name: str, model: nn.Module, config: PolyConfig, tensors: tuple[str, ...]) -> None:
    """Refuse, before anything is trained, the name of an adapter that could not be made or could not be saved.

    Args:
        adapter_name: the name.
        model: the base model, with or without other adapters.
        config: settings of the adapter; its `modules_to_save` are looked into.
        tensors: names that the layers give to the tensors of their adapters.

    Raises:
        ValueError: the name is empty, has a dot, is an attribute of a module, or is a part of the names of tensors
            that are saved with the adapter.
    """
    if not adapter_name or "." in adapter_name:
        why = "is empty" if not adapter_name else "has a dot"
    elif any(hasattr(holder, adapter_name) for holder in HOLDERS):
        why = "is an attribute of every torch module"
    elif adapter_name in tensors or adapter_name in set(_parts_saved(model, config)):
        why = "is a part of the names of tensors that are saved with it"
    else:
        return
    raise ValueError(
        f"An adapter cannot be called {adapter_name!r}: the name {why}, and PEFT makes modules of these names. Choose "
        f"another one, such as {_another(adapter_name)!r}. Tasks may have any name."
    )


def _parts_saved(model: nn.Module, config: PolyConfig) -> Iterator[str]:
    """Names of modules and parameters in `modules_to_save`, part by part, such as `score` and `weight`."""
    wanted = set(config.modules_to_save or ())
    if not wanted:
        return
    yield from ("modules_to_save", *wanted)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wanted and not isinstance(module, BaseTunerLayer):
            kept = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            for key, _ in kept.named_parameters():
                yield from key.split(".")


def _another(adapter_name: str) -> str:
    return f"adapter_{adapter_name.replace('.', '_')}".rstrip("_")
