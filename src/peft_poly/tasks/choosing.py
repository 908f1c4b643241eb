"""`use_task`: the tasks of calls that say none, for any model with task-routed layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Optional, Protocol, cast

from torch import nn

from .context import TaskContext
from .entries import owner_of_block
from .ids import TaskIds

__all__ = ["check_one_task_is_set", "routed_layers", "task_contexts", "use_task"]


class RoutedLayer(Protocol):
    """A task-routed layer, as far as it must be known here."""

    task_context: TaskContext
    poly_lora_A: nn.ParameterDict

    @property
    def disable_adapters(self) -> bool:
        """Whether it computes without any."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that it computes with."""


def routed_layers(model: nn.Module) -> Iterator[RoutedLayer]:
    """The task-routed layers of a model."""
    for module in model.modules():
        if "poly_lora_A" in module._modules:
            yield cast(RoutedLayer, module)


def task_contexts(model: nn.Module) -> list[TaskContext]:
    """The contexts of a model's task-routed layers: one, unless models that were adapted by themselves were joined."""
    contexts = {id(layer.task_context): layer.task_context for layer in routed_layers(model)}
    return list(contexts.values())


def check_one_task_is_set(model: nn.Module, what: str) -> None:
    """Raise unless one task is known to every thread, for what computes in threads of its own.

    Args:
        model: the model.
        what: who computes, for the message.

    Raises:
        ValueError: an active adapter has several tasks, and none was set; `use_task` was entered.
    """
    for layer in routed_layers(model):
        context = layer.task_context
        several = [
            name for name in layer.active_adapters if name in context.configs and context.configs[name].n_tasks > 1
        ]
        several = [name for name in several if name not in context.merged and not layer.disable_adapters]
        if several and (context.default is None or context.current() is not None):
            raise ValueError(
                f"{what} computes in a thread of its own, with the rows of all requests in one, and so for one task at "
                "a time, which `use_task` and `task_ids` cannot tell it. Choose it with `model.set_task(...)`, "
                "outside of `use_task`."
            )


@contextmanager
def use_task(model: nn.Module, task: Optional[TaskIds]) -> Iterator[None]:
    """Choose the task, or the tasks of the rows, of all calls in this thread that say none.

    Works for every model with task-routed layers: a `PeftModel`, and one that was given its adapter by
    `peft.inject_adapter_in_model` or transformers' `model.add_adapter`.

    Args:
        model: the model.
        task: one id or name for all rows, a list of them, or a LongTensor `(b,)`; None for none.

    Raises:
        ValueError: the model has no task-routed layer; an active adapter has no such task.

    Example:

    ```py
    >>> import torch
    >>> from peft import inject_adapter_in_model
    >>> from peft_poly import PolyConfig, use_task
    >>> config = PolyConfig(target_modules=["0"], task_names=["cat", "dog"])
    >>> model = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(8, 2)))
    >>> with use_task(model, ["dog", "cat"]):
    ...     model(torch.randn(2, 8)).shape
    torch.Size([2, 2])

    ```
    """
    adapters: dict[int, tuple[TaskContext, dict[str, None]]] = {}
    for layer in routed_layers(model):
        _, active = adapters.setdefault(id(layer.task_context), (layer.task_context, {}))
        active.update(dict.fromkeys(name for name in layer.active_adapters if name in layer.poly_lora_A))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no task-routed layer. Add an adapter with a PolyConfig first.")
    owner = owner_of_block()
    with ExitStack() as stack:
        for context, active in adapters.values():
            stack.enter_context(context.use(None if task is None else context.resolve(task, active), owner=owner))
        yield
