"""Recomputation bound to its forward: what `torch.utils.checkpoint` runs again has the tasks that it ran with.

Its two ways, reentrant and not, are given the function to run again; what they get instead enters the tasks and the
routing of the forward first. So it does not matter which loss a backward starts from, in which order, in which thread
or block, or how checkpoints are nested. What recomputes by other means is refused (`TaskContext.of_call`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from .context import living_contexts

__all__ = ["binding_first_argument", "binding_second_argument"]


def bound(function: Callable) -> Callable:
    """`function`, to be run again in a backward with the tasks of now."""
    known = [(context, context.current(), context.set_now(), context.routing) for context in living_contexts()]
    tasks = [entered for entered in known if any(part is not None for part in entered[1:])]
    if not tasks:
        return function

    @functools.wraps(function, updated=())
    def again(*args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # the forward itself
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for context, batch, default, routing in tasks:
                stack.enter_context(context.use(batch, routing, default=default))
            return function(*args, **kwargs)

    return again


def binding_first_argument(method: Callable) -> Callable:
    """`method(function, ...)` with the function bound."""

    @functools.wraps(method)
    def wrapper(function: Callable, *args: Any, **kwargs: Any) -> Any:
        return method(bound(function), *args, **kwargs)

    return wrapper


def binding_second_argument(method: Callable) -> Callable:
    """`method(ctx, function, ...)` with the function bound."""

    @functools.wraps(method)
    def wrapper(ctx: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return method(ctx, bound(function), *args, **kwargs)

    return wrapper
