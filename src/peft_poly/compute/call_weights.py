"""The mixing weights of all layers of one call, worked out together.

A layer's weights are some numbers and six operations. Done for each layer by itself they cost more than its products on
few tokens; the first layer that asks has them done for all, in as many operations as one layer would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch

from .adapted import Adapted
from .base_layers import PLAIN_TENSORS
from .onloading import is_offloaded, onloaded

__all__ = ["CallWeights"]

KINDS = 4  # of (adapter, tasks) in a call: rows by task and row by row, on two devices; more are left to the layers
SMALL = 4096  # up to so many numbers, it is cheaper to stack a router whole than to look its rows up


class CallWeights:
    """Eval-mode mixing weights for one call at the model's door; it goes with the call.

    Args:
        layers: the model's adapted layers. One that is missing, or whose router is elsewhere now (sharded, on another
            device), works its weights out itself; the router of one that is offloaded is loaded for it.
    """

    def __init__(self, layers: Sequence[Adapted]) -> None:
        self.layers = layers
        self._known: dict[tuple[str, int], tuple[torch.Tensor, dict[int, tuple[Any, ...]]]] = {}

    def of(self, router: Any, name: str, tasks: torch.Tensor) -> Optional[torch.Tensor]:
        """The weights `(g, h, k)`, at least float32, of a router for tasks `(g,)`; None if unknown.

        Without noise, and without autograd.
        """
        key = (name, id(tasks))
        entry = self._known.get(key)
        if entry is None:
            if len(self._known) == KINDS:
                return None
            entry = self._known[key] = (tasks, self._work_out(name, tasks))  # holds the tasks: their id stays theirs
        routed = entry[1].get(id(router))
        if routed is None or (routed[0] is not None and routed[0] != _state(router.module_logits)):  # changed meanwhile
            return None
        w: torch.Tensor = routed[2]
        return w

    def _work_out(self, name: str, tasks: torch.Tensor) -> dict[int, tuple[Any, ...]]:
        """By id of the router: what tells a change of its logits, None if each use loads them; them; the weights."""
        found: dict[int, tuple[Any, torch.Tensor]] = {}
        layer: Any
        for layer in self.layers:
            router = layer._modules["poly_router"]._modules.get(name)
            if router is None or id(router) in found:
                continue
            logits = router._parameters.get("module_logits")
            away = is_offloaded(router)
            if away:
                with onloaded(router):
                    logits = router.module_logits
            if logits is not None and _is_here(logits, tasks.device):
                found[id(router)], weigh = (None if away else _state(logits), logits), router.weigh
        routers = [logits for _, logits in found.values()]
        if not routers or any(
            logits.dtype != routers[0].dtype or logits.shape != routers[0].shape for logits in routers
        ):
            return {}
        if routers[0].numel() <= SMALL:
            z = torch.stack(routers).index_select(1, tasks)
        else:
            z = torch.stack([torch.embedding(logits, tasks) for logits in routers])
        return {key: (*found[key], of_router) for key, of_router in zip(found, weigh(z).unbind(), strict=True)}


def _state(logits: torch.Tensor) -> tuple[int, int, int]:
    """Differs from what it was when they are replaced, moved, cast or written to."""
    return id(logits), logits.data_ptr(), logits._version


def _is_here(logits: torch.Tensor, device: torch.device) -> bool:
    """Whether these are on `device` now: what shards or offloads parameters brings them layer by layer."""
    return (
        type(logits) in PLAIN_TENSORS
        and logits.device == device
        and logits.untyped_storage().nbytes() > 0
        and not logits.is_inference()
    )
