"""Optimizers with the two-speed learning rate of the papers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn

from ..adapter.labelled.heads import TaskHeads
from ..layer import PolyLayer

__all__ = ["create_poly_optimizer", "poly_parameter_groups", "warn_of_untrained"]


def poly_parameter_groups(
    model: nn.Module, *, lr: float, router_lr: Optional[float] = None, weight_decay: Optional[float] = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: `adapters`, `router`, `modules_to_save` and `no_decay`.

    `modules_to_save` has all other matrices that train, heads for instance, and `no_decay` all other vectors that do:
    biases, norms.

    The papers train the router at 0.1 and the skills at 1e-3: with one rate for both the router hardly leaves uniform.
    The router has no weight decay, so that the row of a task that is absent from the data stays as it is.

    Args:
        model: a model with task-routed layers. Parameters that do not require a gradient are left out.
        lr: learning rate of all groups but the router's.
        router_lr: learning rate of the router rows. None: that of each adapter's config, `PolyConfig.router_lr`.
        weight_decay: of `adapters` and `modules_to_save`; the router and `no_decay` have none. None: the optimizer's
            own default.

    Returns:
        The groups that are not empty, in the order above, each with its `name`; a `Trainer` logs the rate of the first.
        Also fit for `Trainer(optimizer_cls_and_kwargs=(cls, {"params": groups, "lr": lr}))`.

    Raises:
        ValueError: the model has no task-routed layer, or nothing to train.
    """
    layers = [module for module in model.modules() if isinstance(module, PolyLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-routed layer. Add an adapter with a PolyConfig first.")
    skills = {id(p) for layer in layers for held in (layer.poly_lora_A, layer.poly_lora_B) for p in held.values()}
    rates = {
        id(p): layer.task_context.configs[name].effective_router_lr if router_lr is None else router_lr
        for layer in layers
        for name, router in layer.poly_router.items()
        for p in router.parameters()
    }
    named: dict[str, list[nn.Parameter]] = {"adapters": [], "modules_to_save": [], "no_decay": []}
    routers: dict[float, list[nn.Parameter]] = {}  # by rate: adapters of different kinds can be active together
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in rates:
            routers.setdefault(rates[id(parameter)], []).append(parameter)
        elif id(parameter) in skills:
            named["adapters"].append(parameter)
        else:
            named["no_decay" if parameter.dim() < 2 else "modules_to_save"].append(parameter)
    if not routers and not any(named.values()):
        raise ValueError("No parameter requires a gradient. Load the adapter with `is_trainable=True`.")
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"name": "adapters", "params": named["adapters"], "lr": lr, **decay},
        *({"name": "router", "params": found, "lr": rate, "weight_decay": 0.0} for rate, found in routers.items()),
        {"name": "modules_to_save", "params": named["modules_to_save"], "lr": lr, **decay},
        {"name": "no_decay", "params": named["no_decay"], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_poly_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    router_lr: Optional[float] = None,
    weight_decay: Optional[float] = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose router learns at a rate of its own; see `peft_poly.training.poly_parameter_groups`.

    A `Trainer` that is given no optimizer makes this one, for the `optim` of its `TrainingArguments`.

    Args:
        model: a model with task-routed layers.
        optimizer_cls: any torch optimizer class, such as `torch.optim.AdamW`.
        lr: learning rate of everything but the router.
        router_lr: learning rate of the router rows. None: that of each adapter's config, `PolyConfig.router_lr`.
        weight_decay: of everything but the router and vectors; None for the optimizer's default.
        kwargs: further arguments of `optimizer_cls`.

    Raises:
        ValueError: the model has no task-routed layer, or nothing to train.
        TypeError: `optimizer_cls` is a name or an optimizer, not a class.

    Example:

    ```py
    >>> import peft, torch
    >>> from peft_poly import PolyConfig, create_poly_optimizer
    >>> config = PolyConfig(target_modules=["0"], n_tasks=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 2)), config)
    >>> optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-3, router_lr=0.1)
    >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
    [('adapters', 0.001), ('router', 0.1)]

    ```
    """
    if not callable(optimizer_cls):
        raise TypeError(f"optimizer_cls must be a class, such as torch.optim.AdamW, got {optimizer_cls!r}.")
    groups = poly_parameter_groups(model, lr=lr, router_lr=router_lr, weight_decay=weight_decay)
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    heads = [module for module in model.modules() if isinstance(module, TaskHeads)]
    if heads and hasattr(optimizer, "register_step_pre_hook"):
        optimizer.register_step_pre_hook(functools.partial(_leave_unasked, heads))
    return optimizer


def warn_of_untrained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warn of trainable parameters that an optimizer lacks which trains others of the model.

    A `Trainer` keeps its optimizer from one `train()` to the next, and what was thawed or added between is not in it.

    Args:
        model: what is to be trained.
        optimizer: the one that there is already.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    learn = {name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    left = [name for name, parameter in learn.items() if parameter not in held]
    if left and len(left) < len(learn):  # none at all: FSDP has put others in their places
        warnings.warn(
            f"The {type(optimizer).__name__} of this Trainer lacks {len(left)} of the {len(learn)} tensors that "
            f"require a gradient, such as {left[0]}, so they stay as they are. If they were thawed or added after it "
            "was made, make a new Trainer.",
            stacklevel=2,
        )


def _leave_unasked(heads: list[TaskHeads], *step: Any) -> None:
    """Before a step: a head that no row asked for, on any process, has no gradient, and so neither decays nor drifts.

    Where the host does not know the rows' tasks, or processes share gradients, all heads take part, by zeros.
    """
    given = [p for module in heads for p in module.parameters() if p.grad is not None]
    sizes = torch.stack([_size(p.grad) for p in given]).tolist() if given else []  # type: ignore[arg-type]
    for parameter, size in zip(given, sizes, strict=True):
        if size == 0:
            parameter.grad = None


def _size(grad: torch.Tensor) -> torch.Tensor:
    """The sum of a gradient's absolute values, over all parts of one that is sharded, some of which may be empty."""
    size = torch.linalg.vector_norm(grad, 1, dtype=torch.promote_types(grad.dtype, torch.float32)).float()
    return size.full_tensor() if hasattr(size, "full_tensor") else size
