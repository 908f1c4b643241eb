"""Attention whose layers serve rows and a table of positions: a mixed batch is computed task by task.

DeBERTa's attention sends its table of relative positions through the layers of the queries and keys
(`share_att_key`). The table has no row, so no task of its own: each row's task has to see it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..batch import TaskBatch
from ..choosing import task_contexts
from ..transforms import is_symbolic

__all__ = ["let_attention_compute_by_task"]

SHARING = "DisentangledSelfAttention"  # of DeBERTa, DeBERTa v2 and v3, SEW-D
OF_ROWS = ("hidden_states", "attention_mask", "query_states")  # its arguments that have rows
MARK = "_peft_poly_by_task"


def let_attention_compute_by_task(model: nn.Module) -> None:
    """Teach the classes of such attention in a model, once; with one task they compute as before."""
    for cls in {type(module) for module in model.modules()}:
        if cls.__name__ == SHARING and not hasattr(cls.forward, MARK):
            cls.forward = _by_task(cls.forward)


def _by_task(forward: Callable) -> Callable:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        contexts = [] if torch.compiler.is_compiling() else task_contexts(self)
        batch = contexts[0].current() if len(contexts) == 1 else None
        given = signature.bind(self, *args, **kwargs).arguments
        if batch is None or not batch.mixed or given["hidden_states"].shape[0] != batch.n_rows:
            return forward(self, *args, **kwargs)
        if any(map(is_symbolic, batch.ids.values())):
            raise ValueError(
                f"{type(self).__name__} computes several tasks one after the other, and a trace, or `torch.func`, "
                "cannot follow which rows have which. Give the call one task by its name or number, or leave its "
                "layers out with `exclude_modules`."
            )
        parts, order = [], []
        for rows, of_task in batch.by_task():
            index = torch.tensor(rows, device=given["hidden_states"].device)
            picked = {name: _picked(value, index, batch) if name in OF_ROWS else value for name, value in given.items()}
            with contexts[0].use(of_task):
                parts.append(forward(**picked))
            order += rows
        back = torch.tensor(order, device=given["hidden_states"].device).argsort()
        leaves, shape = zip(*map(pytree.tree_flatten, parts), strict=True)
        whole = [
            torch.cat(part).index_select(0, back) if isinstance(part[0], torch.Tensor) else part[0]
            for part in zip(*leaves, strict=True)
        ]
        call = contexts[0].entries.call
        if call is not None and call.following is not None:
            for tensor in whole:
                if isinstance(tensor, torch.Tensor):
                    call.following.start(tensor)
        return pytree.tree_unflatten(whole, shape[0])

    setattr(wrapper, MARK, True)
    return wrapper


def _picked(value: Any, index: torch.Tensor, batch: TaskBatch) -> Any:
    has_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch.n_rows
    return value.index_select(0, index) if has_rows else value
