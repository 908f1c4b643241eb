"""`PolyModel`: puts task-routed layers into a model, saves and loads them."""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import ExitStack
from typing import Any, Optional, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from .adapter.adaptation import is_router_only
from .adapter.copies import copy_adapter
from .adapter.labelled.calls import LabelledCalls
from .adapter.labelled.classifiers import (
    check_has_head,
    describe_labels,
    freeze_shared_layers,
    give_back_layers,
    heads_of,
    install_heads,
    replace_heads,
    reserve_layers,
    tell_heads,
)
from .adapter.names import check_adapter_name
from .adapter.routed_calls import RoutedCalls
from .adapter.sharing import router_group, shared_router_keys
from .adapter.targets import check_architecture, check_target, warn_of_fused_experts
from .compute.gradients import let_gradients_pass, warn_of_rounding
from .compute.keeping.serving import check_not_serving
from .compute.onloading import is_offloaded
from .compute.states import keep_requires_grad
from .config import PolyConfig
from .layer import Linear, PolyLayer
from .recommended import plain_defaults_message
from .router import Router, get_router
from .tasks.choosing import task_contexts
from .tasks.context import TaskContext
from .tasks.rows.by_task import let_attention_compute_by_task
from .tasks.rows.calls import follow_calls, stop_following
from .verbs.merge_and_export import MergeAndExport
from .verbs.on_tasks import TaskVerbs

__all__ = ["PolyModel", "tuner_of"]


class PolyModel(RoutedCalls, TaskVerbs, MergeAndExport, BaseTuner):
    """Task-routed adapters (Polytropon, arXiv 2202.13914; MHR, arXiv 2211.03831) in a model.

    Made by `peft.get_peft_model(model, PolyConfig(...))`; its verbs are reached through the `PeftModel`.

    Args:
        model (`torch.nn.Module`): the model to adapt.
        peft_config (`PolyConfig | dict[str, PolyConfig]`): settings, of one adapter or by adapter name.
        adapter_name (`str`): name of the adapter.
        low_cpu_mem_usage (`bool`): create the parameters on the meta device, to be filled from a checkpoint.

    Raises:
        TypeError: a target is no linear layer.
        ValueError: `n_splits` does not divide a target's features; no target was found. The model is left as it was.

    Example:

    ```py
    >>> import peft, peft_poly, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> config = peft_poly.PolyConfig(target_modules=["0"], n_splits=2, task_names=["cat", "dog"])
    >>> model = peft.get_peft_model(base, config)
    >>> model(torch.randn(3, 8), task_ids=["cat", "dog", "cat"]).shape
    torch.Size([3, 2])

    ```
    """

    prefix: str = PolyLayer.prefix
    tuner_layer_cls = PolyLayer
    target_module_mapping: dict = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ------------------------------------------------------------------------------------------------- injection
    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not config.inference_mode:
            let_gradients_pass(model)
            warn_of_rounding(model)
        found = task_contexts(model)  # adapters that were injected before share their context with new ones
        self.task_context = found[0] if found else TaskContext(self.peft_config)
        names = list(inspect.signature(type(model).forward).parameters)
        # Where the base model's own `forward` takes `task_ids`; None if it does not.
        self.ids_position = names.index("task_ids") - 1 if "task_ids" in names else None

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        follow_calls(model, self.task_context)
        let_attention_compute_by_task(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection of an adapter's layers; one that fails leaves the model as it was.

        Given the very config object of an adapter that is there, as TRL's trainers do for their reference, the new
        adapter starts as a copy of that one.

        Args:
            model: the base model.
            adapter_name: name of the adapter, whose settings are in `peft_config`.
            args: further arguments of PEFT's `BaseTuner.inject_adapter`.
            kwargs: the same.

        Raises:
            TypeError: a target is no linear layer.
            ValueError: `n_splits` does not divide a target's features; no target was found; a target is one whose
                `forward` its model never calls; the adapter cannot have this name.
        """
        check_not_serving(self.task_context, "Adding an adapter")
        source = self._source_of_copy(adapter_name)
        self._adapted: Optional[list[PolyLayer]] = None
        self._routers: dict[str, Router] = {}  # of the adapter that is being injected, by the group that shares it
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            config = cast(PolyConfig, self.peft_config[adapter_name])
            check_adapter_name(adapter_name, model, config, PolyLayer.adapter_layer_names)
            warn_of_fused_experts(model, config.target_modules)
            reserve_layers(model, config)
            with torch.inference_mode(False):  # whose tensors could never be trained
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                if install_heads(model, config, adapter_name):
                    LabelledCalls().hook(model)
                if source is not None:
                    copy_adapter(model, source, adapter_name)
            tell_heads(model, self.task_context)
            self.task_context.known_calls.clear()  # what is new has not been seen in them
        except Exception:
            self._take_back(adapter_name)
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            raise
        finally:
            del self._routers
        config = cast(PolyConfig, self.peft_config[adapter_name])
        if config.has_plain_scale and config.r * config.n_skills > 1 and not config.inference_mode:
            warnings.warn(plain_defaults_message(adapter_name, config.r, config.n_skills))

    def _source_of_copy(self, adapter_name: str) -> Optional[str]:
        """The adapter whose own config object the new one was given; the new one then gets a config of its own."""
        config = self.peft_config[adapter_name]
        for name, other in self.peft_config.items():
            if other is config and name != adapter_name:
                self.peft_config[adapter_name] = copy.deepcopy(config)
                warnings.warn(
                    f"Adapter {adapter_name!r} starts as a copy of {name!r}, since it was given that adapter's own "
                    "config. For a new one, pass a config of its own."
                )
                return name
        return None

    def _take_back(self, adapter_name: str) -> None:
        """Remove what a failed injection had put in, so that the model is as it was before."""
        self.peft_config.pop(adapter_name, None)
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, PolyLayer) and adapter_name in layer._all_available_adapter_names():
                active = [other for other in layer.active_adapters if other != adapter_name]
                layer.set_adapter(active)
                layer.delete_adapter(adapter_name)
                if not layer._all_available_adapter_names():
                    parent = self.model.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], layer.base_layer)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: PolyConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        router = self._shared_router(peft_config, current_key)
        if isinstance(target, PolyLayer):
            frozen = adapter_name not in self.active_adapters
            target.update_layer(adapter_name, peft_config, router=router, layer_name=current_key)
            if frozen:
                target.set_requires_grad(adapter_name, False)
            return
        quantisation = get_quantization_kwargs(self)
        check_target(target, current_key, parent, **quantisation)
        new_module = Linear(
            target,
            adapter_name,
            peft_config,
            task_context=self.task_context,
            router=router,
            layer_name=current_key,
            **quantisation,
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # adding an adapter does not make it trainable
        self._replace_module(parent, target_name, new_module, target)

    def _shared_router(self, config: PolyConfig, key: str) -> Optional[Router]:
        """The router that a layer shares with others, drawn when the first of them is made; None if it has its own."""
        group = router_group(config.router_granularity, key)
        if group is None:
            return None
        if group not in self._routers:
            self._routers[group] = get_router(config)
            self._routers[group].reset()
        return self._routers[group]

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        check_architecture(model, target_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with ExitStack() as stack:
            for layer in self.modules():
                if isinstance(layer, PolyLayer):
                    stack.enter_context(keep_requires_grad(layer, adapter_name))
            stack.enter_context(torch.inference_mode(False))
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            for heads in heads_of(self.model, adapter_name) if autocast_adapter_dtype else ():
                heads.to(torch.promote_types(next(heads.parameters()).dtype, torch.float32))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, PolyLayer) and not is_offloaded(child):  # whose weight is not where it is used
            super()._replace_module(parent, child_name, new_module, child)
        else:  # or back to the base layer; PEFT would set its `weight` anew, and some quantised layers have none
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        merge = args[0] if args else kwargs.get("merge", True)
        task = self._prepare_layers_to_save(bool(merge))
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        labels = None if task is None else replace_heads(model, task)
        if labels is not None:
            describe_labels(model, labels)
        tell_heads(model, None)
        LabelledCalls.unhook(model)
        stop_following(model)
        return model

    def _prepare_layers_to_save(self, merge: bool) -> Optional[str]:
        """Before an adapter is unloaded: the task whose head stays; None for none."""
        for name in self.active_adapters:
            config = cast(PolyConfig, self.peft_config[name])
            if not merge and name not in self.task_context.merged:
                give_back_layers(self.model, config)
            elif config.task_names:
                merged = self.task_context.merged.get(name)
                task = config.task_names[self.task_context.one_task(name) if merged is None else merged]
                if check_has_head(self.model, name, task):
                    return task
        return None

    # -------------------------------------------------------------------------------------------------- checkpoints
    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        for _, *others in shared_router_keys(model, adapter_name):
            for key in others:  # a shared router is saved once
                state_dict.pop(key, None)
        return state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict
    ) -> dict:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for first, *others in shared_router_keys(model, adapter_name):
            if first in state_dict:
                state_dict.update({key: state_dict[first] for key in others if key not in state_dict})
        return state_dict

    # ------------------------------------------------------------------------------------------------------- calls
    def train(self, mode: bool = True) -> PolyModel:
        """Set the mode, as for any module.

        Raises:
            ValueError: the adapter is to be trained, and 4-bit weights of the base model give no gradients any more.
        """
        if mode:
            check_not_serving(self.task_context, "`train()`")
        if mode and self._trains:
            let_gradients_pass(self.model)  # one that was loaded for inference, and thawed, is here for the first time
        for name in self.active_adapters if mode else ():  # PEFT thaws `modules_to_save` when adapters are switched
            if is_router_only(self._layers(), name):
                freeze_shared_layers(self.model, cast(PolyConfig, self.peft_config[name]), name)
        return super().train(mode)

    @property
    def _trains(self) -> bool:
        return any(p.requires_grad for name, p in self.model.named_parameters() if self.prefix in name)


def tuner_of(model: Any) -> Optional[PolyModel]:
    """The tuner of a `PeftModel` with a task-routed adapter; None for every other model."""
    tuner = getattr(model, "_modules", {}).get("base_model")
    return tuner if hasattr(type(tuner), "routed") else None  # not by the class, which a reload replaces
