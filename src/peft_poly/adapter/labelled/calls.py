"""Calls of a classifier with `labels`: its own loss knows one kind of them, so ours takes its place."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from .classifiers import active_heads
from .loss import label_loss

__all__ = ["LabelledCalls"]

OURS = ("labels", "num_items_in_batch", "label_smoothing")  # arguments that the base model is not to see


class LabelledCalls:
    """Two hooks of a base model: one takes the labels out of a call, the other puts the loss into its output."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a call in this thread is not part of a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()

    def hook(self, model: nn.Module) -> None:
        """Put the hooks on a base model, once."""
        if not any(is_of_labels(hook) for hook in model._forward_hooks.values()):
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.register_forward_hook(self.after, prepend=True)  # while the call is still followed

    @staticmethod
    def unhook(model: nn.Module) -> None:
        """Take them off again."""
        for hooks in (model._forward_hooks, model._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if is_of_labels(hook):
                    del hooks[key]
        model._forward_pre_hooks_with_kwargs = type(model._forward_pre_hooks_with_kwargs)(
            (key, value)
            for key, value in model._forward_pre_hooks_with_kwargs.items()
            if key in model._forward_pre_hooks
        )

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: notes the labels, and calls the model without."""
        heads, self._local.call = active_heads(module), None
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # the first is `self`
        # PEFT's class for a task type passes arguments of texts, as None, to models of images and sound too.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in names}
        if heads is None:
            return args, kwargs
        position = names.index("labels") if "labels" in names else len(args)
        if len(args) > position:
            kwargs["labels"] = args[position]
            args = (*args[:position], None, *args[position + 1 :])
        labels, n_items, smoothing = (kwargs.pop(name, None) for name in OURS)
        if labels is not None:
            self._local.call = (heads, labels, n_items, smoothing or 0.0)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the output with our loss in it."""
        call, self._local.call = getattr(self._local, "call", None), None
        if call is None:
            return None
        heads, labels, n_items, smoothing = call
        logits = output["logits"] if isinstance(output, dict) else output[0]
        tasks = heads.heads_of_rows(logits.shape[0])
        loss = label_loss(logits, torch.as_tensor(labels), tasks, heads, n_items, smoothing)
        if isinstance(output, dict):
            return type(output)(**{"loss": loss, **{key: value for key, value in output.items() if key != "loss"}})
        return (loss, *output)


def is_of_labels(hook: Any) -> bool:
    """Whether a hook of a model is one of ours."""
    return isinstance(getattr(hook, "__self__", None), LabelledCalls)
