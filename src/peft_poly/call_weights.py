"""The mixing weights of all layers of one call, worked out together.

A layer's weights are some numbers and six operations. Done for each layer by itself they cost more than its products on
few tokens; the first layer that asks has them done for all, in as many operations as one layer would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch

from .base_layers import PLAIN_TENSORS
from .router import normalise

if TYPE_CHECKING:
    from .layer import PolyLayer

__all__ = ["CallWeights"]

KINDS = 4  # of (adapter, tasks) in a call: rows by task and row by row, on two devices; more are left to the layers
FEW_TASKS = 4  # up to so many router rows a pair, it is cheaper to stack routers whole than to look rows up in each


class CallWeights:
    """Eval-mode mixing weights for one call at the model's door; it goes with the call.

    Args:
        layers: the model's adapted layers. One that is missing, or whose router is elsewhere now (sharded, offloaded,
            on another device), works its weights out itself.
    """

    def __init__(self, layers: Sequence[PolyLayer]) -> None:
        self.layers = layers
        self._known: dict[tuple[str, int], tuple[torch.Tensor, dict[int, _Routed]]] = {}

    def of(self, logits: torch.Tensor, name: str, tasks: torch.Tensor) -> Optional[torch.Tensor]:
        """The weights `(g, h, k)`, at least float32, of the router with these logits for tasks `(g,)`; None if unknown.

        Without noise, and without autograd.
        """
        key = (name, id(tasks))
        entry = self._known.get(key)
        if entry is None:
            if len(self._known) == KINDS:
                return None
            entry = self._known[key] = (
                tasks,
                self._work_out(name, tasks),
            )  # holds the tasks, so that their id is theirs
        routed = entry[1].get(id(logits))
        return None if routed is None or not routed.holds(logits) else routed.w

    def _work_out(self, name: str, tasks: torch.Tensor) -> dict[int, _Routed]:
        routers: dict[int, Any] = {}
        layer: Any
        for layer in self.layers:
            router = layer._modules["poly_router"]._modules.get(name)
            logits = None if router is None else router._parameters.get("module_logits")
            if logits is not None and _is_here(logits, tasks.device):
                routers[id(logits)] = router
        found = [router.module_logits for router in routers.values()]
        if not found or any(logits.shape != found[0].shape or logits.dtype != found[0].dtype for logits in found):
            return {}
        if found[0].shape[0] <= FEW_TASKS * tasks.shape[0]:
            z = torch.stack(found).index_select(1, tasks)
        else:
            z = torch.stack([torch.embedding(logits, tasks) for logits in found])
        h = next(iter(routers.values())).n_splits
        z = z.view(len(found), tasks.shape[0], h, -1)
        p = torch.sigmoid_(z if z.dtype in (torch.float32, torch.float64) else z.float())
        return {id(logits): _Routed(logits, w) for logits, w in zip(found, normalise(p).unbind(), strict=True)}


class _Routed:
    """The weights of one router, and what they were read from."""

    __slots__ = ("logits", "pointer", "version", "w")

    def __init__(self, logits: torch.Tensor, w: torch.Tensor) -> None:
        self.logits, self.pointer, self.version, self.w = logits, logits.data_ptr(), logits._version, w

    def holds(self, logits: torch.Tensor) -> bool:
        """Whether they are as they were."""
        return self.logits is logits and logits._version == self.version and logits.data_ptr() == self.pointer


def _is_here(logits: torch.Tensor, device: torch.device) -> bool:
    """Whether these are on `device` now: what shards or offloads parameters brings them layer by layer."""
    return (
        type(logits) in PLAIN_TENSORS
        and logits.device == device
        and logits.dim() == 2
        and logits.untyped_storage().nbytes() > 0
        and not logits.is_inference()
    )
