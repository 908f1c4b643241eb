"""One adapter as the start of another: what TRL's trainers mean by the config of one that is there."""

from __future__ import annotations

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..compute.onloading import onloaded
from ..compute.states import lasting
from ..layer import PolyLayer

__all__ = ["copy_adapter"]


@lasting()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Copy the skills, routers, scales and `modules_to_save` of one adapter to another of the same settings.

    Args:
        model: the model that has both.
        source: the adapter to copy.
        target: the adapter that becomes its copy.
    """
    with onloaded(model, changed=True):
        for module in model.modules():
            if isinstance(module, PolyLayer) and source in module.poly_lora_A:
                module.scaling[target] = module.scaling[source]
                for held in (module.poly_lora_A, module.poly_lora_B):
                    held[target].copy_(held[source])
                module.poly_router[target].load_state_dict(module.poly_router[source].state_dict())
            elif isinstance(module, AuxiliaryTrainingWrapper) and "modules_to_save" in module._modules:
                saved: Any = module.modules_to_save
                if source in saved and target in saved:
                    saved[target].load_state_dict(saved[source].state_dict())
