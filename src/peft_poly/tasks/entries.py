"""What each thread, coroutine and generator has entered: a stack that blocks may leave out of turn.

A `threading.local`, since `torch.compile` traces no `ContextVar`, and a `ContextVar` does not keep plain generators
apart. So a block that was entered in a coroutine or a generator belongs to its frame: while that is suspended, the
block is not seen.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
from types import FrameType
from typing import Any, Optional

import torch

from .batch import TaskBatch

__all__ = ["Entries", "Entry", "owner_of_block", "runs"]

SUSPENDED = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
)  # what a function can be for its frame to stop and go on later


_order = itertools.count()


class Entry:
    """One block.

    Args:
        batch: its tasks; None for none.
        outer: the entry below it.
        owner: the frame of the coroutine or generator that it belongs to, if any.
        routing: of all layers, for the one call that the block is for.
        default: the set task of the time that a recomputation goes back to.
    """

    def __init__(
        self,
        batch: Optional[TaskBatch],
        outer: Optional[Entry],
        owner: Optional[FrameType] = None,
        routing: Any = None,
        default: Any = None,
    ) -> None:
        self.batch, self.outer, self.owner, self.routing, self.default = batch, outer, owner, routing, default
        compiling = torch.compiler.is_compiling()
        self.backward = -1 if compiling else torch._C._current_graph_task_id()
        self.order = 0 if compiling else next(_order)  # among those of all contexts
        self.ended = False


class Entries(threading.local):
    """The entries of one thread; there from the start, since the compiler would guard on their absence."""

    def __init__(self) -> None:
        self.top: Optional[Entry] = None
        self.call: Any = None  # the outermost call that this thread is in, of a model with mixed tasks

    def visible(self) -> Optional[Entry]:
        """The innermost block that the running code is in."""
        entry = self.top
        while entry is not None and (entry.ended or (entry.owner is not None and not runs(entry.owner))):
            entry = entry.outer
        return entry

    def leave(self, entry: Entry) -> None:
        """End a block, whichever was entered after it."""
        entry.ended = True
        entry.owner = None
        while self.top is not None and self.top.ended:
            self.top = self.top.outer


def runs(frame: FrameType) -> bool:
    """Whether a frame is on this thread's stack now."""
    running: Optional[FrameType] = sys._getframe(1)
    while running is not None:
        if running is frame:
            return True
        running = running.f_back
    return False


def owner_of_block() -> Optional[FrameType]:
    """The frame of the coroutine or generator that a block which is being entered belongs to; None if to none.

    A generator that `contextlib` has made a context manager of is no owner, nor is `__aenter__`: whoever enters it is.
    """
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        enters = frame.f_code.co_filename == contextlib.__file__ or frame.f_code.co_name == "__aenter__"
        if frame.f_code.co_flags & SUSPENDED and not enters:
            driver = frame.f_back
            if driver is None or driver.f_code.co_filename != contextlib.__file__:
                return frame
        frame = frame.f_back
    return None
