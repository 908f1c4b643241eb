"""The blocks of an encoder: which of them are adapted, and hidden states under those, computed once for each text.

    text ─▶ embeddings ─▶ lower blocks ─▶ kept ─▶ upper blocks + adapter ─▶ hidden states
            └────── frozen, once for each text ──┘└────────── in every step ──────────┘

Nothing under the first adapted block learns, so what comes out there is the same in every step and for every method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Blocks"]


class Blocks:
    """The stack of blocks of an encoder.

    Args:
        encoder: any encoder of transformers.
        adapted: how many of its last blocks are adapted; 0 for all.

    Attributes:
        targets: names of the layers that an adapter changes.

    Raises:
        ValueError: it has fewer blocks than that; its blocks have no linear layer.
    """

    def __init__(self, encoder: nn.Module, adapted: int = 0) -> None:
        stacks = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
        outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
        name = max(outer, key=lambda name: len(stacks[name]), default="")  # those inside are experts, or heads
        self.stack = list(stacks[name]) if stacks else []
        if not 0 <= adapted <= len(self.stack):
            raise ValueError(f"The encoder has {len(self.stack)} blocks, so {adapted} of them cannot be adapted.")
        self.lower = self.stack[: len(self.stack) - adapted] if adapted else []
        self.first = self.stack[len(self.lower)] if self.lower else None
        self._give_tuples = False  # the blocks, hidden states first: those of transformers 4 do
        inside = [f"{name}.{n}." for n in range(len(self.lower), len(self.stack))]
        self.targets = [
            path
            for path, module in encoder.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and path.startswith(tuple(inside))
        ]
        if not self.targets:
            raise ValueError(f"{type(encoder).__name__} has no stack of blocks with linear layers to adapt.")

    @contextmanager
    def watched(self) -> Iterator[list[torch.Tensor]]:
        """Inside, each call of the encoder appends the hidden states `(b, l, d)` that reach the first adapted block."""
        found: list[torch.Tensor] = []

        def watch(block: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(_hidden(args, kwargs))

        assert self.first is not None  # only where some blocks are not adapted
        with self.first.register_forward_pre_hook(watch, with_kwargs=True):
            yield found

    @contextmanager
    def given(self, states: torch.Tensor) -> Iterator[None]:
        """Inside, a call of the encoder begins at the first adapted block, with `states (b, l, d)`."""

        def give(block: nn.Module, args: Any, kwargs: Any) -> None:
            _hidden(args, kwargs).copy_(states)  # in place: routed layers follow a call's rows through its tensors

        assert self.first is not None
        with self.first.register_forward_pre_hook(give, with_kwargs=True):
            for block in self.lower:
                block.forward = _handed_on_first if self._give_tuples else _handed_on
            try:
                yield
            finally:
                for block in self.lower:
                    del block.forward

    @torch.no_grad()
    def can_be_given(self, encoder: nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether an encoder comes to the same from kept states: blocks may hand on more than hidden states."""
        if self.first is None:
            return False
        with self.watched() as found, self.lower[0].register_forward_hook(self._note_output):
            wanted = encoder(**inputs).last_hidden_state
        try:
            with self.given(found[0]):
                return torch.allclose(encoder(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False

    def _note_output(self, block: nn.Module, args: Any, output: Any) -> None:
        self._give_tuples = isinstance(output, tuple)


def _hidden(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _handed_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands for the forward of a block that has nothing to do."""
    return hidden_states


def _handed_on_first(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    return (hidden_states,)
