"""Where the rows of a call are in the input of a layer: known from the call, not guessed from a shape.

The outermost call of a model (or of one of its sub-models, as `generate` calls an encoder) tells how many rows there
are: one per task, or as many times more as the running `generate` makes. The first such call with mixed tasks of each
kind is followed (`following.py`), and each layer keeps what came out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional, Protocol, Union

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import GenerationMixin

from ..batch import TaskBatch, current_generation, rows_left_message, wrong_rows_message
from ..context import TaskContext
from ..ids import ROW_ARGUMENTS, rows_of_call
from ..transforms import is_wrapped
from .following import Following

__all__ = ["LOST", "follow_calls", "follow_own_generate", "place_of_rows", "stop_following"]

LOST = -1  # the place of rows in a layer that does not have them, or not in one dimension
ADVICE = "Let each call have one task, or leave the layer out with `exclude_modules` in PolyConfig."
MEDIA = re.compile(r"pixel|image|video|audio|vision|visual|input_features|input_values|speech|mel|patch")


class Followed(Protocol):
    """A task-routed layer, or heads per task, as far as they must be known here."""

    layer_name: str
    task_context: TaskContext
    row_dim: int
    rows_known: bool


def follow_calls(model: nn.Module, context: TaskContext) -> None:
    """Let a model and its sub-models tell their layers the rows of a call."""
    for module in model.modules():
        if (module is model or hasattr(module, "main_input_name")) and not any(map(_is_ours, _hooks(module))):
            module.register_forward_pre_hook(_Entering(context), with_kwargs=True, prepend=True)
            module.register_forward_hook(_Leaving(context), always_call=True)


def stop_following(model: nn.Module) -> None:
    """Undo `follow_calls`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if _is_ours(hook):
                    hooks.pop(key)
                    for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                        flags.pop(key, None)


@contextmanager
def follow_own_generate(model: nn.Module, context: TaskContext, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Follow the rows of a model's own `generate` from the start, once: it may repeat them in any order.

    Args:
        model: the model.
        context: that of its layers.
        args: positional arguments of `generate`.
        kwargs: its keyword arguments.
    """
    batch, now, kinds = context.current(), current_generation(), context.known_calls.setdefault(model, set())
    is_own = getattr(type(model), "generate", None) is not GenerationMixin.generate
    if not is_own or now is None or now.repeats == 1 or batch is None or not batch.mixed or "generate" in kinds:
        yield
        return
    now.following = Following(batch.n_rows)
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            now.following.start(leaf)
    with now.following:
        yield
    kinds.add("generate")


def place_of_rows(layer: Followed, x: torch.Tensor, batch: TaskBatch, advice: str = ADVICE) -> tuple[int, TaskBatch]:
    """The dimension of `x` that has the rows of a mixed batch, and the batch with as many rows as it.

    Args:
        layer: what is called with `x`.
        x: its input.
        batch: the tasks of the call.
        advice: what to do, for the message.

    Raises:
        ValueError: the rows are not in the input, or not known to be.
    """
    n_rows, call = batch.n_rows, None if torch.compiler.is_compiling() else layer.task_context.entries.call
    if call is not None and call.following is not None and not is_wrapped(x):
        place = call.following.place(x)
        dim = place[0] if place is not None and (place[0] == 0 or place[1] == 1) else LOST
        if dim != LOST or x.shape[0] % n_rows == 0:
            layer.row_dim = dim if layer.row_dim == dim or not layer.rows_known else LOST
            layer.rows_known = True
    elif not torch.compiler.is_compiling() and not layer.rows_known:
        # Left out of the call that was followed, as some are at random in training: the next one is followed again,
        # and meanwhile only a shape that nothing but rows can have will do.
        if call is not None:
            call.kinds.discard(call.kind)
        # Nor is a call of one row followed, or what `torch.func` computes.
        flat = x.dim() == 2 and (is_wrapped(x) or x.shape[0] == n_rows == 1)
        has_rows = flat or (x.dim() > 2 and x.shape[1] != n_rows)
        dim = 0 if call is None or (has_rows and not call.unclear) else LOST
    else:
        dim = layer.row_dim
    if dim == LOST:
        raise ValueError(_unknown_rows_message(n_rows, x, layer.layer_name, advice))
    size = x.shape[dim] if x.dim() > dim else 1
    if batch.in_call and size != n_rows and size % n_rows == 0 and dim == 0 and layer.rows_known:
        return 0, batch.of_call(size // n_rows)
    return dim, batch


class _Call:
    """The outermost call of a model, while it runs."""

    def __init__(self, module: nn.Module, entry: Any) -> None:
        self.module, self.under, self.depth = module, entry, 1
        self.stack = ExitStack()
        self.following: Optional[Following] = None
        self.kinds: set[Any] = set()  # of calls of this module that were followed
        self.kind: Any = None  # of this call
        self.unclear = False  # an argument is as many tensors as there are rows: one for each, or each of them all


class _Entering:
    """Forward pre-hook: begins a call."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        local = self.context.entries
        if local.call is not None:
            if not local.call.under.ended:
                local.call.depth += local.call.module is module
                return
            local.call = None  # of a block that an interrupt has ended
        entry = local.visible()
        batch = self.context.current()
        if batch is None or not batch.mixed or batch.in_call:
            return
        n_rows, told = rows_of_call(args, kwargs)
        call = _Call(module, entry)
        record = _record_of_call(batch, n_rows, module, kwargs.get(told) if isinstance(told, str) else args[:1])
        local.call = call
        assert entry is not None
        call.stack.enter_context(self.context.use(record, entry.routing))
        self._follow(call, record, args, kwargs, told)

    def _follow(
        self, call: _Call, record: TaskBatch, args: tuple, kwargs: dict[str, Any], told: Union[str, int, None]
    ) -> None:
        call.kinds = self.context.known_calls.setdefault(call.module, set())
        named = frozenset((name, _sort_of(value)) for name, value in kwargs.items() if value is not None)
        call.kind = (call.module.training, *map(_sort_of, args), named)
        wrapped = any(map(is_wrapped, pytree.tree_leaves((args, kwargs))))
        if call.kind in call.kinds or record.n_rows < 2 or wrapped:
            return
        given = [(name, value) for name, value in [*enumerate(args), *kwargs.items()] if value is not None]
        of_rows = [name for name, _ in given if name == told or not (isinstance(name, str) and MEDIA.search(name))]
        following = Following(record.n_rows, alone=len(of_rows) == len(given))
        begun = False
        for name, value in given:
            unclear = type(value) in (list, tuple) and len(value) == record.n_rows and name in of_rows and name != told
            call.unclear = call.unclear or unclear
            for leaf in pytree.tree_leaves(value) if name in of_rows and not unclear else ():
                has_some = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] % record.n_rows == 0
                if has_some and (leaf.shape[0] == record.n_rows or name in ROW_ARGUMENTS):
                    following.start(leaf)
                    begun = True
        if begun:
            call.kinds.add(call.kind)
            call.following = following
            call.stack.enter_context(following)


class _Leaving:
    """Forward hook, called after an error too: ends a call."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        call = self.context.entries.call
        if call is not None and call.module is module:
            call.depth -= 1
            if not call.depth:
                self.context.entries.call = None
                call.stack.close()


def _record_of_call(batch: TaskBatch, n_rows: Optional[int], module: nn.Module, told: Any) -> TaskBatch:
    """The tasks of the rows of a call: those said, or what the running `generate` makes of them.

    Raises:
        ValueError: it has another number of rows, or them in another order.
    """
    n_tasks, now = batch.n_rows, current_generation()
    if n_rows is None or (n_rows == n_tasks and (now is None or id(module) not in now.repeated)):
        return batch.of_call()
    if now is None or n_rows not in (n_tasks, n_tasks * now.repeats * (1 + now.doubled)):
        raise ValueError(wrong_rows_message(n_tasks, n_rows, type(module).__name__))
    if n_rows == n_tasks:
        raise ValueError(rows_left_message(n_tasks * now.repeats * (1 + now.doubled), n_rows))
    if now.following is not None and id(module) not in now.repeated and not now.doubled:
        told = told if isinstance(told, torch.Tensor) else told[0]
        if now.following.place(told) != (0, now.repeats):
            raise ValueError(
                f"This `generate` is {type(module).__name__}'s own, and the rows that it repeats do not follow one "
                "another as those of transformers' do (each row, then its copies). With several tasks that cannot be "
                "followed: call it with one task."
            )
    now.repeated.add(id(module))
    return batch.of_call(now.repeats, now.doubled)


def _unknown_rows_message(n_tasks: int, x: torch.Tensor, name: str, advice: str) -> str:
    return (
        f"The input of {name} has the shape {tuple(x.shape)}, and its rows are not the {n_tasks} rows of this call, "
        "which have several tasks: they are images, windows, tokens that were picked, or positions. Such a layer "
        f"serves one task at a time. {advice}"
    )


def _sort_of(value: Any) -> Any:
    """What of an argument may lead a model another way: a flag, or how many and, roughly, how large dimensions."""
    if isinstance(value, torch.Tensor):
        return tuple(int(size).bit_length() for size in value.shape[1:])
    return value if isinstance(value, (bool, str)) else type(value)


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _is_ours(hook: Any) -> bool:
    return type(hook).__name__ in ("_Entering", "_Leaving")
