"""Adds `PeftType.PEFT_POLY` and checks, before anything else is imported, that PEFT is one we can stand on."""

from __future__ import annotations

import importlib

import peft
from aenum import extend_enum

__all__ = ["PEFT_VERSIONS", "add_peft_type", "check_peft"]

PEFT_VERSIONS = "peft>=0.21.0,<0.22"

# Every PEFT name, public or not, that this package imports, overrides or wraps.
FOOTING = {
    "peft.config": ("PeftConfig",),
    "peft": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "LoraConfig",
        "PolyConfig",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ),
    "peft.mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"),
    "peft.optimizers.lorafa": ("LoraFAOptimizer",),
    "peft.peft_model": (
        "PeftModel.forward",
        "PeftModel.generate",
        "PeftModel.save_pretrained",
        "PeftModel.push_to_hub",
        "PeftModel.create_or_update_model_card",
        "PeftModel.get_base_model",
    ),
    "peft.tuners.tuners_utils": (
        "BaseTuner.inject_adapter",
        "BaseTuner._pre_injection_hook",
        "BaseTuner._post_injection_hook",
        "BaseTuner._check_target_module_compatiblity",
        "BaseTuner._cast_adapter_dtype",
        "BaseTuner._get_adapter_state_dict",
        "BaseTuner._remap_adapter_state_dict_for_load",
        "BaseTuner._remove_adapter_name_from_key",
        "BaseTuner._replace_module",
        "BaseTuner._unload_and_optionally_merge",
        "BaseTunerLayer._cast_input_dtype",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer",
        "BaseTunerLayer.get_base_weight",
        "BaseTunerLayer.set_base_weight",
        "_get_in_out_features",
        "check_adapters_to_merge",
        "check_target_module_exists",
        "onload_layer",
    ),
    "peft.tuners.lora": ("LoraLayer",),
    "peft.utils.other": ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"),
    "peft.utils": (
        "PeftType",
        "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "WEIGHTS_NAME",
        "get_quantization_kwargs",
        "quantization_extra_repr",
        "register_peft_method",
        "resolve_quantization_backend",
    ),
}


def add_peft_type() -> None:
    """Add the member `PEFT_POLY` to PEFT's enum of methods; does nothing the second time."""
    from peft.utils import PeftType

    if "PEFT_POLY" not in PeftType.__members__:
        extend_enum(PeftType, "PEFT_POLY", "PEFT_POLY")


def check_peft() -> None:
    """Raise `ImportError`, naming the versions that work, if PEFT lacks a name that this package stands on."""
    missing = [f"{module}.{name}" for module, names in FOOTING.items() for name in names if not _has(module, name)]
    if missing:
        raise ImportError(
            f"peft_poly works with {PEFT_VERSIONS}, but found peft {peft.__version__}, which has no "
            f"{', '.join(missing)}. Run: pip install '{PEFT_VERSIONS}'"
        )


def _has(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True
