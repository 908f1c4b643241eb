"""What an optimizer has gathered about router rows, when rows come and go: the parameter is a new object then.

An optimizer that nobody passed still holds the old one, and would train nothing: its next step is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["Change", "carry_state", "check_state", "forget", "leave_behind", "train_beside"]

Change = Callable[[torch.Tensor], torch.Tensor]
LEFT = "_peft_poly_left_behind"  # attribute of a parameter that learnt, and has been replaced


def check_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Raise unless `carry_state` can follow these parameters; the optimizer may know some of them only.

    Raises:
        ValueError: it trains none of them, or has gathered what is no row of numbers for each task.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in known for parameter in parameters):
        raise ValueError(
            f"This {type(optimizer).__name__} trains no router of the adapter. Pass the optimizer that does, or make "
            "it anew after the tasks have changed."
        )
    for parameter in parameters:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not (_is_of_all(value, name, parameter) or _has_rows(value, parameter)):
                kind = f"{type(value).__name__} {tuple(value.shape)}"
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name!r} of a router {tuple(parameter.shape)} as a {kind}, "
                    "which has no row for each task. Make the optimizer anew after the tasks have changed."
                )


def carry_state(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, change: Change) -> None:
    """Put `new` in the place of `old`, with the rows of its state changed as its own were."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state: dict[str, Any] = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = {
            name: value if _is_of_all(value, name, old) else change(value) for name, value in state.items()
        }


def train_beside(optimizer: torch.optim.Optimizer, known: Optional[Any], new: Optional[Any]) -> None:
    """Have an optimizer that trains the parameter `known` train `new` in the same way; both may be None."""
    for group in optimizer.param_groups if new is not None else ():
        for at, parameter in enumerate(group["params"]):
            if parameter is known:
                group["params"] = [*group["params"], new]
                if "param_names" in group:
                    names = group["param_names"]
                    group["param_names"] = [*names, f"{names[at]}_of_task_{len(names)}"]
                return


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[Optional[Any]]) -> None:
    """Take parameters out of an optimizer, with all that it has gathered about them."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        kept = [at for at, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names") if len(kept) < len(group["params"]) else ():
            if key in group:
                group[key] = [group[key][at] for at in kept]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]


def leave_behind(parameter: nn.Parameter) -> None:
    """Say that a parameter has been replaced. If it learnt, an optimizer that still holds it takes no further step."""
    if parameter.requires_grad:
        setattr(parameter, LEFT, True)
        _watch_steps()


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_what_was_left)


def _refuse_what_was_left(optimizer: torch.optim.Optimizer, *step: Any) -> None:
    if any(hasattr(parameter, LEFT) for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"This {type(optimizer).__name__} holds parameters of an adapter that `add_tasks`, `remove_tasks` or "
            "`average_skills` has replaced since, so they would learn nothing. Make it anew afterwards (with a "
            "`Trainer`, make a new one), or pass it to the first two, `add_tasks(..., optimizer=optimizer)`."
        )


def _is_of_all(value: Any, name: str, parameter: nn.Parameter) -> bool:
    """Whether it says nothing about single tasks: a count, or what Adafactor keeps of the columns."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or name == "step":
        return True
    return "col" in name and value.shape[-1] == parameter.shape[1]


def _has_rows(value: torch.Tensor, parameter: nn.Parameter) -> bool:
    rows, columns = parameter.shape
    return type(value) is torch.Tensor and value.shape in ((rows, columns), (rows, 1), (rows,))
