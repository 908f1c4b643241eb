"""`TaskHeads`: a linear head for each task, of as many labels as the task has.

x (b, ..., d) ─▶ head of the row's task ─▶ logits (b, ..., k of the widest head), -inf beyond the task's own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional

from ...config import PolyConfig
from ...labels import TaskLabels, read_task_labels
from ...tasks.batch import TaskBatch
from ...tasks.context import TaskContext, entered_context
from ...tasks.ids import TaskIds, resolve_tasks, unknown_message
from ...tasks.rows.calls import place_of_rows
from ...tasks.transforms import is_symbolic

__all__ = ["TaskHeads"]

ADVICE = "Let each call have one task, or pass these heads `task_ids`, one for each entry of the first dimension."


class TaskHeads(nn.Module):
    """A linear layer per task: `y = x W_t^T + b_t` for the task `t` of each row.

    In a model of your own put it where the last layer would be, call it as one, and name it in `modules_to_save`: the
    adapter that is put into the model tells it which task each row has. `PolyConfig(task_labels=...)` does it for
    models of transformers.

    Args:
        in_features: features `d` of its input.
        task_labels: the labels of each task by its name, as in `PolyConfig.task_labels`.
        bias: whether heads have one.
        adapter_name: the adapter that it belongs to; None: the one that is active where it is called.

    Raises:
        ValueError: labels of a task are of no kind that there is; no task is known, or one that has no head.

    Attributes:
        labels: what the labels of each task are, by its name.

    Example:

    ```py
    >>> from peft_poly import TaskHeads
    >>> heads = TaskHeads(8, {"sentiment": ["bad", "good"], "topic": 4})
    >>> logits = heads(torch.randn(3, 8), task_ids=["topic", "sentiment", "topic"])
    >>> logits.shape, logits[1].isinf().tolist()
    (torch.Size([3, 4]), [False, False, True, True])

    ```
    """

    # The parameters are the module's own, `weight_0`, `bias_0` ...: modules inside would be found by their names, which
    # PEFT matches against `target_modules` and `modules_to_save`, and tasks may be called what no module may.

    def __init__(
        self,
        in_features: int,
        task_labels: Mapping[str, Any],
        bias: bool = True,
        adapter_name: Optional[str] = None,
    ) -> None:
        super().__init__()
        self.in_features, self.has_bias, self.adapter_name = in_features, bias, adapter_name
        self.layer_name = "TaskHeads"
        self.row_dim, self.rows_known = 0, False  # as those of a task-routed layer
        self.labels: dict[str, TaskLabels] = {}
        self.task_context: Optional[TaskContext] = None  # of the adapted model that it is part of
        self.add(read_task_labels(task_labels, tuple(task_labels)))

    @property
    def width(self) -> int:
        """Number of labels of the widest head."""
        return max(map(len, self.labels.values()))

    def pair(self, head: int) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Weight `(k, d)` and bias `(k,)` of one head, by its place in `labels`."""
        return getattr(self, f"weight_{head}"), getattr(self, f"bias_{head}", None)

    def forward(self, x: torch.Tensor, task_ids: Optional[TaskIds] = None) -> torch.Tensor:
        """`(b, ..., in_features) -> (b, ..., width)`, in the dtype of the heads.

        In a module of one's own the rows of the call may be in another dimension, or have several entries of the first.

        Args:
            x: input of any number of dimensions.
            task_ids: tasks of the rows, where no `PeftModel` or `use_task` has said them.

        Raises:
            ValueError: no task is known, one has no head, or the ids do not fit the rows; or the rows of a mixed batch
                are not in the input.
        """
        dim, batch = (0, None) if task_ids is not None or self.adapter_name else self._place_of_rows(x)
        x = x.transpose(0, dim) if dim else x
        logits = self._logits(x, self.heads_of_rows(x.shape[0], task_ids, batch))
        return logits.transpose(0, dim) if dim else logits

    def _place_of_rows(self, x: torch.Tensor) -> tuple[int, Optional[TaskBatch]]:
        """The dimension that has the rows of a mixed batch, and its record with as many rows; 0, None of any other."""
        context, adapter = self._footing()
        batch = context.of_call(None, [adapter], None) if adapter not in context.merged else None
        if batch is None or not batch.mixed or self.task_context is None:
            return 0, None
        return place_of_rows(self, x, batch, ADVICE)  # type: ignore[arg-type]

    def _logits(self, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        known = heads.device.type == "cpu" and not (torch.compiler.is_compiling() or is_symbolic(heads))
        asked = sorted(set(heads.tolist())) if known and not _takes_part_in_reduction(self) else None
        weight, bias = self._stacked(range(len(self.labels)) if asked is None else asked)
        x = x.to(weight.dtype)
        if asked is not None and len(asked) == 1:
            return x @ weight[0].T + bias[0]
        index = (heads if asked is None else torch.tensor([asked.index(head) for head in heads.tolist()])).to(x.device)
        if index.shape[0] == 1:
            index = index.expand(x.shape[0])
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        logits = torch.bmm(flat, weight[index].transpose(1, 2)) + bias[index].unsqueeze(1)
        return logits.reshape(*x.shape[:-1], -1)

    def _stacked(self, heads: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(g, width, d)` and biases `(g, width)` of heads, filled up with labels that nothing can be."""
        weights, biases = [], []
        for head in heads:
            weight, bias = self.pair(head)
            beyond = self.width - weight.shape[0]
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            weights.append(functional.pad(weight, (0, 0, 0, beyond)))
            biases.append(functional.pad(bias, (0, beyond), value=-torch.inf))
        return torch.stack(weights), torch.stack(biases)

    # ---------------------------------------------------------------------------------------------------- whose rows
    def heads_of_rows(
        self, n_rows: int, task_ids: Optional[TaskIds] = None, batch: Optional[TaskBatch] = None
    ) -> torch.Tensor:
        """The head of each row, `(n_rows,)`, or `(1,)` where one serves them all.

        Args:
            n_rows: rows of the input.
            task_ids: as in `forward`.
            batch: the tasks of the rows, where the call that runs has said them in another way.

        Raises:
            ValueError: as `forward`.
        """
        names = list(self.labels)
        if task_ids is not None:
            return resolve_tasks(task_ids, PolyConfig(task_names=names), n_rows=n_rows)[0]
        context, adapter = self._footing()
        ids = _tasks_of_rows(context, adapter, n_rows, batch)
        config = context.configs[adapter]
        if config.task_names is None or config.task_names == names:
            return ids
        beyond = len(names)  # where no head is
        places = torch.tensor([names.index(name) if name in names else beyond for name in config.task_names])
        heads = places.to(ids.device)[ids]
        message = f"A row has a task that has no head here. There are heads for: {', '.join(names)}."
        if is_symbolic(heads):  # the look-up of its weight checks it
            return heads
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            torch._assert_async((heads < beyond).all(), message)
        elif bool((heads == beyond).any()):
            missing = config.task_names[int(ids[heads == beyond][0])]
            raise ValueError(f"{message} Task {missing!r} of adapter {adapter!r} has none.")
        return heads

    def _footing(self) -> tuple[TaskContext, str]:
        """What knows the tasks of this call, and the adapter whose tasks they are."""
        context = self.task_context or entered_context()
        adapter = None if context is None else self.adapter_name or _active_adapter(context)
        if context is None or adapter is None:
            raise ValueError(
                f"No task is known for this call of a TaskHeads, which has heads for {', '.join(self.labels)}. Call it "
                "in a model with a task-routed adapter, or pass it `task_ids`, one for each row."
            )
        return context, adapter

    # ---------------------------------------------------------------------------------------------- grow and shrink
    def add(self, labels: Mapping[str, TaskLabels], like: Optional[int] = None) -> None:
        """Append heads.

        Args:
            labels: what the labels of the new tasks are, by name.
            like: the head to copy, where the labels are the same; a new one is drawn as `nn.Linear` draws it.
        """
        source = None if like is None else (list(self.labels.values())[like], self.linear(like))
        first = next(self.parameters(), None)
        for name, found in labels.items():
            drawn = nn.Linear(self.in_features, len(found), bias=self.has_bias)
            if source is not None and source[0] == found:
                drawn.load_state_dict(source[1].state_dict())
            head = drawn if first is None else drawn.to(first.device, first.dtype).requires_grad_(first.requires_grad)
            self._set(len(self.labels), head.weight, head.bias)
            self.labels = {**self.labels, name: found}

    def keep(self, heads: list[int]) -> None:
        """Take all heads out but some, which move up.

        Args:
            heads: places of those that stay, in their order.
        """
        kept, n_heads = [self.pair(head) for head in heads], len(self.labels)
        for head in range(n_heads):
            for kind in ("weight", "bias"):
                self._parameters.pop(f"{kind}_{head}", None)
        for place, (weight, bias) in enumerate(kept):
            self._set(place, weight, bias)
        named = list(self.labels.items())
        self.labels = dict(named[head] for head in heads)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; its head stays.

        Args:
            old: its name.
            new: the name it gets.
        """
        self.labels = {new if name == old else name: found for name, found in self.labels.items()}

    @torch.no_grad()
    def linear(self, head: int) -> nn.Linear:
        """One head as a layer by itself, a copy."""
        weight, bias = self.pair(head)
        layer = nn.Linear(self.in_features, weight.shape[0], bias is not None, weight.device, weight.dtype)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def _set(self, head: int, weight: Any, bias: Any) -> None:
        setattr(self, f"weight_{head}", weight)
        if bias is not None:
            setattr(self, f"bias_{head}", bias)

    def extra_repr(self) -> str:
        """The tasks and their numbers of labels."""
        return f"in_features={self.in_features}, " + ", ".join(f"{name}={len(k)}" for name, k in self.labels.items())


def _tasks_of_rows(context: TaskContext, adapter: str, n_rows: int, batch: Optional[TaskBatch]) -> torch.Tensor:
    """The task of each row of a batch that is being computed, `(n_rows,)`, or `(1,)` where all have the same.

    Raises:
        ValueError: no task was said, or not as many as there are rows.
    """
    if adapter in context.merged:
        return torch.tensor([context.merged[adapter]])
    batch = context.of_call(None, [adapter], None) if batch is None else batch
    if batch is not None and adapter in batch.unknown:
        raise ValueError(
            f"{unknown_message(batch.unknown[adapter], context.configs[adapter], adapter)} `unknown_task='mean'` has a "
            "row for it, but no head."
        )
    return torch.tensor([0]) if batch is None else batch.rows(adapter, n_rows, "the heads")


def _active_adapter(context: TaskContext) -> Optional[str]:
    batch = context.current()
    return next(iter(context.poly_adapters() if batch is None else batch.ids), None)


def _takes_part_in_reduction(module: nn.Module) -> bool:
    """Whether processes wait for a gradient of every head, also of those that no row asks for."""
    return (
        module.training
        and torch.is_grad_enabled()
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
