"""One adapted linear layer: a frozen base layer, an inventory of skills, and a router that mixes them per task.

             ┌───────────────────────── base layer ─────────────────────────┐
    x ───────┤                                                              (+)──▶ y
             └─ dropout ─▶ A_t (in, r) ─▶ · alpha / r ─▶ B_t (r, out) ──────┘
                             ▲                             ▲
    task t ─▶ router ─▶ w: (h, k) mixes A: (h, k, in / h, r) and B: (h, k, r, out / h)

For one task at eval this is exactly a LoRA of rank r, which is what merging rests on.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional, Union, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, onload_layer
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .compute.base_layers import is_linear
from .compute.keeping.kept import shortcut_of
from .compute.keeping.serving import check_not_serving
from .compute.kinds import KINDS
from .compute.kinds.initialisation import draw_skills
from .compute.merging import merge, unmerge
from .compute.onloading import at_hand, execution_device, is_elsewhere, is_offloaded
from .compute.paths import Path, choose_path
from .compute.states import evaluating, keep_requires_grad
from .config import PolyConfig
from .router import Router, get_router
from .tasks.batch import TaskBatch
from .tasks.context import TaskContext
from .tasks.ids import TaskIds
from .tasks.rows.calls import place_of_rows

__all__ = ["Linear", "PolyLayer"]


class PolyLayer(BaseTunerLayer):
    """The adapters of one layer, by name: parameters, router and settings.

    With `h = n_splits` and `k = n_skills`, the tensors have the layout of PEFT's own Poly: `poly_lora_A`
    `(h, k, in_features // h, r)`, `poly_lora_B` `(h, k, r, out_features // h)`, `poly_router`'s `module_logits`
    `(n_tasks, h * k)`.

    Args:
        base_layer: the layer to adapt.
        task_context: knows the task of each row; None: one of its own.
        kwargs: how PEFT reads a quantised weight (`get_apply_tensor_subclass`).

    Raises:
        TypeError: the base layer is no linear layer.
    """

    training: bool
    layer_name: str
    _modules: Any
    prefix = "poly_"  # of every container of adapters, by which PEFT tells them from the base layer
    adapter_layer_names = ("poly_lora_A", "poly_lora_B", "poly_router")
    other_param_names = (
        "r",
        "n_tasks",
        "n_skills",
        "n_splits",
        "poly_type",
        "lora_alpha",
        "scaling",
        "poly_dropout",
        "merged_tasks",
    )

    def __init__(self, base_layer: nn.Module, task_context: Optional[TaskContext] = None, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.task_context = TaskContext({}) if task_context is None else task_context
        self.r: dict[str, int] = {}
        self.n_tasks: dict[str, int] = {}
        self.n_skills: dict[str, int] = {}
        self.n_splits: dict[str, int] = {}
        self.poly_type: dict[str, str] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.poly_dropout = nn.ModuleDict()
        self.poly_router = nn.ModuleDict()
        self.poly_lora_A = nn.ParameterDict()
        self.poly_lora_B = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, int] = {}
        self.frozen_peft_weight_names = {}
        self.cast_input_dtype_enabled = True
        self.row_dim, self.rows_known = 0, False  # where the rows of a call are in its input; see `tasks/rows/calls.py`
        self.kwargs = kwargs

        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        if not is_linear(base, self.quantization_backend):
            raise TypeError(f"{type(base).__name__} cannot be adapted: it is no linear layer.")
        self.fan_in_fan_out = isinstance(base, Conv1D)
        sizes: Any = _get_in_out_features(base)
        self.in_features: int = sizes[0]
        self.out_features: int = sizes[1]

    def update_layer(
        self,
        adapter_name: str,
        config: PolyConfig,
        inference_mode: bool = False,
        router: Optional[Router] = None,
        layer_name: str = "this layer",
    ) -> None:
        """Add an adapter, or make one anew.

        Args:
            adapter_name: its name.
            config: its settings.
            inference_mode: create it frozen.
            router: a router shared with other layers; one of its own is made if None.
            layer_name: name of the layer, for messages.

        Raises:
            ValueError: `n_splits` does not divide the layer's features.
        """
        for side, size in (("in", self.in_features), ("out", self.out_features)):
            if size % config.n_splits:
                raise ValueError(
                    f"n_splits={config.n_splits} does not divide the {size} {side}-features of {layer_name}. Choose a "
                    f"divisor of both {self.in_features} and {self.out_features}, or leave the layer out with "
                    "`exclude_modules`."
                )
        self.task_context.configs[adapter_name] = config
        h, k = config.n_splits, config.n_skills
        self.r[adapter_name] = config.r
        self.n_tasks[adapter_name] = config.n_tasks
        self.n_skills[adapter_name] = k
        self.n_splits[adapter_name] = h
        self.poly_type[adapter_name] = config.poly_type
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.poly_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.poly_lora_A[adapter_name] = nn.Parameter(torch.empty(h, k, self.in_features // h, config.r))
        self.poly_lora_B[adapter_name] = nn.Parameter(torch.empty(h, k, config.r, self.out_features // h))
        self.poly_router[adapter_name] = get_router(config) if router is None else router
        self.reset_poly_parameters(adapter_name, config.init_weights, reset_router=router is None)
        for module in (self.poly_dropout[adapter_name], self.poly_router[adapter_name]):
            module.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; tasks that `use_task` has entered are not those of another of its name."""
        self.task_context.moves += 1
        super().delete_adapter(adapter_name)

    def reset_poly_parameters(self, adapter_name: str, init_weights: Any, reset_router: bool = True) -> None:
        """Draw the parameters of an adapter anew; see `PolyConfig.init_weights`.

        With `init_weights` True or False the draws are those of PEFT's own Poly: one seed, equal parameters.

        Args:
            adapter_name: its name; nothing is done if the layer has no such adapter.
            init_weights: as in `PolyConfig`.
            reset_router: draw the router anew too.
        """
        if adapter_name not in self.poly_lora_A:
            return
        draw_skills(self.poly_lora_A[adapter_name], self.poly_lora_B[adapter_name], init_weights)
        if reset_router:
            cast(Router, self.poly_router[adapter_name]).reset()

    def mixed_pair(self, adapter_name: str, task_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank pairs of tasks: `(b,) -> (b, in, r), (b, r, out)`, dtype of the adapter."""
        with at_hand(self, [adapter_name], task_ids):
            return KINDS[self.poly_type[adapter_name]].pair(self, adapter_name, task_ids)

    def get_delta_weight(self, adapter: str, task: Union[int, str, None] = None) -> torch.Tensor:
        """What a task adds to the base weight, in its layout, `(out, in)` or `(in, out)` for Conv1D.

        Args:
            adapter: name of the adapter.
            task: id or name of the task. Default: the set one, or the only one.

        Raises:
            ValueError: the adapter has several tasks and none was chosen.
        """
        task_id = self.task_context.one_task(adapter, task)
        with evaluating(self.poly_router[adapter]):
            A, B = self.mixed_pair(adapter, torch.tensor([task_id]))
        exact = torch.promote_types(A.dtype, torch.float32)
        delta = (A[0].to(exact) @ B[0].to(exact)) * self.scaling[adapter]
        return (delta if self.fan_in_fan_out else delta.T).to(A.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the task to convert is known, for then the adapter is a LoRA."""
        return self.task_context.has_one_task(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters.

        Args:
            enabled: False takes merged ones out of the weight at once.
        """
        if not enabled and self.merged:
            with onload_layer(self):
                self.unmerge()
        super().enable_adapters(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        if device is None and is_offloaded(self.get_base_layer()):
            device = execution_device(self.get_base_layer())
        with keep_requires_grad(self, adapter_name):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the scale of an adapter to `scale * lora_alpha / r`.

        Args:
            adapter_name: its name; nothing is done if the layer has no such adapter.
            scale: a plain number.
        """
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = scale * self.lora_alpha[adapter_name] / self.r[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`, a plain number."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: Optional[float] = None) -> None:
        """Divide the scale of the active adapters by `scale`, or put back `lora_alpha / r`."""
        for name in self.active_adapters:
            if name in self.scaling:
                reset = self.lora_alpha[name] / self.r[name]
                self.scaling[name] = reset if scale is None else self.scaling[name] / scale


class Linear(nn.Module, PolyLayer):
    """A task-routed `nn.Linear` or `Conv1D`, quantised or not.

    Equation: `y = base(x) + dropout(x) A_t B_t * lora_alpha / r`, where `A_t`, `B_t` are the skills mixed for the
    task of each row (arXiv 2202.13914, 2211.03831).

    Args:
        base_layer: the layer to adapt.
        adapter_name: name of its first adapter.
        poly_config: settings of that adapter.
        task_context: knows the task of each row; shared by the layers of a model.
        router: a router shared with other layers; one of its own is made if None.
        layer_name: name of the layer, for messages.
        kwargs: how PEFT reads a quantised weight (`get_apply_tensor_subclass`).

    Raises:
        TypeError: the base layer is no linear layer.
        ValueError: `n_splits` does not divide its features.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        poly_config: PolyConfig,
        task_context: Optional[TaskContext] = None,
        router: Optional[Router] = None,
        layer_name: str = "this layer",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if task_context is None:
            task_context = TaskContext({adapter_name: poly_config})
        PolyLayer.__init__(self, base_layer, task_context, **kwargs)
        self.layer_name = layer_name
        self._active_adapter = adapter_name
        self.train(base_layer.training)  # a fresh module is in training mode, whatever the model is in
        self.update_layer(adapter_name, poly_config, router=router, layer_name=layer_name)

    def forward(self, x: torch.Tensor, *args: Any, task_ids: Optional[TaskIds] = None, **kwargs: Any) -> torch.Tensor:
        """`(b, ..., in) -> (b, ..., out)`, in the base layer's dtype.

        Args:
            x: input of any number of dimensions.
            task_ids: tasks of the rows, where no `PeftModel` or `use_task` has said them.

        Raises:
            ValueError: no task is known, or the ids do not fit the rows.
        """
        if not self.training and task_ids is None and not args and not kwargs:
            shortcut = shortcut_of(self)
            if shortcut is not None and shortcut.leads(self, x):
                return shortcut.go(self, x)
        if self._disable_adapters or self.merged_adapters:
            return self._without_routing(x, args, task_ids, kwargs)
        held = self._modules["poly_lora_A"]
        active = [name for name in self.active_adapters if name in held]  # type: ignore[operator]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        n_rows = x.shape[0] if x.dim() > 1 else 1
        batch = self.task_context.of_call(task_ids, active, None if task_ids is None else n_rows)
        if self.training and batch is not None and batch.unknown:
            self.task_context.check_known(batch)
        path = choose_path(self, x, active, batch)
        if is_elsewhere(self, active):
            with at_hand(self, active, x):
                return self._routed(path, x, active, batch, n_rows, args, kwargs, said=task_ids is not None)
        return self._routed(path, x, active, batch, n_rows, args, kwargs, said=task_ids is not None)

    def _routed(
        self,
        path: Path,
        x: torch.Tensor,
        active: list[str],
        batch: Optional[TaskBatch],
        n_rows: int,
        args: Any,
        kwargs: Any,
        said: bool,
    ) -> torch.Tensor:
        if batch is None or not batch.mixed or said:
            return path(self, x, active, batch, n_rows, args, kwargs)
        dim, batch = place_of_rows(self, x, batch)
        if dim == 0:
            return path(self, x, active, batch, n_rows, args, kwargs)
        y = path(self, x.transpose(0, dim), active, batch, x.shape[dim], args, kwargs)
        return y.transpose(0, dim).contiguous()  # as the base layer returns it: models look at it by `view`

    def _without_routing(self, x: torch.Tensor, args: Any, task_ids: Optional[TaskIds], kwargs: Any) -> torch.Tensor:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters and task_ids is not None:
            self.task_context.resolve(task_ids, self.merged_adapters)  # raises for another task than the merged
        return self.base_layer(x, *args, **kwargs)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        task: Union[int, str, None] = None,
    ) -> None:
        """Add what one task of each adapter adds to the base weight.

        Args:
            safe_merge: check the result for NaN and infinity before it replaces the weight.
            adapter_names: adapters to merge. Default: the active ones.
            task: id or name of the task. Default: the set one, or the only one.

        Raises:
            ValueError: no task was chosen; the merged weight is not finite; the quantised layer cannot be merged.
        """
        merge(self, safe_merge, adapter_names, task)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.")
        unmerge(self)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        check_not_serving(self.task_context, "Loading")
        super()._load_from_state_dict(state_dict, prefix, *args)
        error_msgs = args[-1]
        for name in self.poly_lora_A:
            for kind, key in _tensor_keys(name).items():
                found, wanted = state_dict.get(prefix + key), self.get_parameter(key)
                if found is not None and found.shape != wanted.shape:
                    error_msgs.append(
                        f"{kind} of adapter {name!r} in {prefix[:-1]}: the checkpoint has {tuple(found.shape)}, its "
                        f"config asks for {tuple(wanted.shape)}. The weights belong to another adapter_config.json or "
                        "another base model; r, n_tasks, n_skills, n_splits and the layer's size must be the same."
                    )

    def extra_repr(self) -> str:
        """How the base layer is quantised, if it is."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "poly." + super().__repr__()


def _tensor_keys(adapter_name: str) -> dict[str, str]:
    return {
        "poly_lora_A": f"poly_lora_A.{adapter_name}",
        "poly_lora_B": f"poly_lora_B.{adapter_name}",
        "router": f"poly_router.{adapter_name}.module_logits",
    }
