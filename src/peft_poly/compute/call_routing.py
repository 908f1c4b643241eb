"""The routing of all layers of one call at the model's door, worked out together.

A layer's weights are some numbers and some ten small operations, and back. Done for each layer by itself they cost more
than its products on few tokens, and half of a training step's launches.

    CallRouting   with gradients or draws: done at the door, one draw, one autograd node with a result for each layer
    CallWeights   neither: the first layer that asks has them done for all

What is elsewhere (sharded, offloaded, on another device), or is called with other rows, routes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..tasks.batch import TaskBatch
from .adapted import Adapted
from .base_layers import PLAIN_TENSORS
from .kinds.second_derivatives import wants_a_graph
from .onloading import is_offloaded, onloaded, refuse_gradient
from .parts import FIRST_TASK

__all__ = ["CallRouting", "CallWeights", "Share"]

KINDS = 4  # of (adapter, tasks) in a call: rows by task and row by row, on two devices; more are left to the layers
SMALL = 4096  # up to so many numbers, it is cheaper to stack a router whole than to look its rows up


class CallWeights:
    """Eval-mode weights for one call at the model's door; it goes with the call.

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
                found[id(router)], route = (None if away else _state(logits), logits), router.route
        routers = [logits for _, logits in found.values()]
        if not routers or any(
            logits.dtype != routers[0].dtype or logits.shape != routers[0].shape for logits in routers
        ):
            return {}
        w, _ = route(_looked_up(routers, tasks), None)
        return {key: (*found[key], of_router) for key, of_router in zip(found, w.unbind(), strict=True)}


def _state(logits: torch.Tensor) -> tuple[int, int, int]:
    """Differs from what it was when they are replaced, moved, cast or written to."""
    return id(logits), logits.data_ptr(), logits._version


@dataclass(frozen=True)
class Routing:
    """What all layers were routed to.

    Attributes:
        router: one of them, which knows the gradient.
        tasks: LongTensor `(g,)`.
        w: weights `(L, g, h, k)`, without gradients.
        p: what the gradient needs beside them, `(L, g, h, k)` or None.
        noise: that was added, `(L, g, h, k)` or None.
    """

    router: Any
    tasks: torch.Tensor
    w: torch.Tensor
    p: Optional[torch.Tensor]
    noise: Optional[torch.Tensor]


class Share:
    """What one layer gets of the routing of a call.

    Attributes:
        tasks: LongTensor `(g,)`.
        w: weights `(g, h, k)`, through which gradients go to the routers of the call.
        without_gradient: the layer has computed without gradients, in a call that has some: it is checkpointed with
            reentrancy, and its recomputation has a backward of its own, which must not go through `w`.
    """

    __slots__ = ("_logits", "_place", "_routing", "_version", "tasks", "w", "without_gradient")

    def __init__(self, routing: Routing, place: int, w: torch.Tensor, logits: torch.Tensor, router: Any) -> None:
        self._routing, self._place, self.w, self._logits = routing, place, w, logits
        self._version = None if is_offloaded(router) else _state(logits)  # loaded anew for each use
        self.tasks, self.without_gradient = routing.tasks, False

    def is_of(self, logits: torch.Tensor) -> bool:
        """Whether the logits are those that were routed by, and as they were."""
        return self._version is None or (logits is self._logits and _state(logits) == self._version)

    @property
    def stored(self) -> torch.Tensor:
        """The weights without gradients."""
        return self._routing.w[self._place]

    @property
    def p(self) -> Optional[torch.Tensor]:
        """What the gradient needs beside them, `(g, h, k)` or None."""
        return None if self._routing.p is None else self._routing.p[self._place]

    @property
    def noise(self) -> Optional[torch.Tensor]:
        """The noise that was added, `(g, h, k)` or None."""
        return None if self._routing.noise is None else self._routing.noise[self._place]


class CallRouting:
    """The routing of one call, for its forward and for what of it is recomputed in the backward.

    Args:
        layers: the model's adapted layers.
        adapters: the active adapters.
        batch: the tasks; None where an adapter has just one.
        n_rows: how many rows the call has; None if nothing tells.
    """

    def __init__(
        self, layers: Sequence[Adapted], adapters: Sequence[str], batch: Optional[TaskBatch], n_rows: Optional[int]
    ) -> None:
        self.weights = CallWeights(layers)
        self._ids: dict[str, torch.Tensor] = {}
        self._shares: dict[tuple[Any, str], Share] = {}
        for name in adapters:
            self._route(layers, name, FIRST_TASK if batch is None else batch.ids[name], n_rows)

    def of(
        self,
        layer: Adapted,
        name: str,
        ids: torch.Tensor,
        n_tasks: int,
        logits: torch.Tensor,
        without_gradient: bool = False,
    ) -> Optional[Share]:
        """A layer's share; None if it has to route by itself.

        Args:
            layer: the layer.
            name: the adapter.
            ids: the batch's ids for the layer's rows, known by their identity.
            n_tasks: g, one per row where the router samples.
            logits: the router's, as they are now.
            without_gradient: the layer computes without gradients.
        """
        share = self._shares.get((layer, name))
        if share is not None and without_gradient:
            share.without_gradient = True
        if share is None or ids is not self._ids[name] or len(share.tasks) != n_tasks or not share.is_of(logits):
            return None
        return share

    def _route(self, layers: Sequence[Adapted], name: str, ids: torch.Tensor, n_rows: Optional[int]) -> None:
        routed, device = [], None
        for layer in layers:
            router = layer._modules["poly_router"]._modules.get(name)
            logits = None if router is None else _logits_of(router)
            if logits is not None and (device is None or device == logits.device) and _is_here(logits, logits.device):
                device = logits.device
                routed.append((layer, router, logits))
        if device is None or len(routed) < 2 or not _alike(routed):
            return
        router = routed[0][1]
        if not (router.samples or torch.is_grad_enabled()):
            return  # `weights` has them, of those tasks alone that layers ask for
        if torch.is_autocast_enabled(device.type):
            return  # where layers compute in plain operations
        if router.samples:
            if n_rows is None or len(ids) not in (1, n_rows):
                return
            tasks = ids if len(ids) == n_rows else ids.expand(n_rows)
        else:
            tasks = ids
        tasks = tasks.to(device, non_blocking=True)
        with torch.no_grad():
            z = _looked_up([logits for _, _, logits in routed], tasks)
            noise = router.noise_like(z)
            w, p = router.route(z, noise)
        self._ids[name] = ids
        self._hand_out(routed, name, Routing(router, tasks, w, p, noise))

    def _hand_out(self, routed: list[Any], name: str, routing: Routing) -> None:
        all_logits = [logits for _, _, logits in routed]
        learns = torch.is_grad_enabled() and any(logits.requires_grad for logits in all_logits)
        # Backwards, so that a router that layers share sums their gradients in the order of the backward.
        shared = Routed.apply(routing, *all_logits[::-1])[::-1] if learns else routing.w.unbind()
        for place, (layer, router, logits) in enumerate(routed):
            self._shares[layer, name] = Share(routing, place, shared[place], logits, router)


class Routed(torch.autograd.Function):
    """Weights of all layers, each a result of its own; a layer that was not called leaves its router without gradient.

    Twice differentiable: where a gradient is to be differentiated again, it is that of plain operations.
    """

    @staticmethod
    def forward(ctx: Any, routing: Routing, *logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """L times `(t, columns)`, the last layer first; returns L times `(g, h, k)`, in the same order."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(routing.w, routing.p, routing.tasks, routing.noise, *logits)
        ctx.router = routing.router
        return routing.w.unbind()[::-1]

    @staticmethod
    def backward(ctx: Any, *grads: Optional[torch.Tensor]) -> tuple[Any, ...]:
        """Gradients of the logits."""
        w, p, tasks, noise, *all_logits = ctx.saved_tensors
        if wants_a_graph():
            return (None, *_plainly(ctx.router, tasks, noise, all_logits[::-1], grads[::-1])[::-1])
        grads, wanted = grads[::-1], [None] * len(grads)
        called = [layer for layer, grad in enumerate(grads) if grad is not None]
        if len(called) < len(grads):
            index = torch.tensor(called, device=w.device)
            w, p = (None if part is None else part.index_select(0, index) for part in (w, p))
        if called:
            grad_w = torch.stack([grads[layer].to(w.dtype) for layer in called])  # type: ignore[union-attr]
            grad_z = ctx.router.grad_route(grad_w, w, p, noise is not None).flatten(2)
            summed = grad_z.new_zeros(len(called), *all_logits[0].shape).index_add_(1, tasks, grad_z)
            summed = summed.to(all_logits[0].dtype)
            for layer, grad in zip(called, summed.unbind(), strict=True):
                wanted[layer] = grad
        return (None, *wanted[::-1])


def _plainly(
    router: Any,
    tasks: torch.Tensor,
    noise: Optional[torch.Tensor],
    logits: Sequence[torch.Tensor],
    grads: Sequence[Optional[torch.Tensor]],
) -> list[Optional[torch.Tensor]]:
    """The gradients of the logits of all layers, with a graph of their own."""
    found: list[Optional[torch.Tensor]] = []
    for layer, (of_layer, grad) in enumerate(zip(logits, grads, strict=True)):
        if grad is None or not of_layer.requires_grad:
            found.append(None)
            continue
        with torch.enable_grad():
            w, _ = router.route(torch.embedding(of_layer, tasks), None if noise is None else noise[layer])
        found.extend(torch.autograd.grad(w, [of_layer], grad, create_graph=True))
    return found


def _logits_of(router: Any) -> Optional[torch.Tensor]:
    """A router's logits; those of one that is offloaded are loaded, and learn nothing."""
    if not is_offloaded(router):
        logits: Optional[torch.Tensor] = router._parameters.get("module_logits")
        return logits
    with onloaded(router):
        logits = router.module_logits
    if torch.is_grad_enabled() and logits.requires_grad:
        logits.register_hook(refuse_gradient)
    return logits


def _alike(routed: list[Any]) -> bool:
    """Whether routers can be worked out in one go."""
    first, logits = routed[0][1], routed[0][2]
    return all(
        type(router) is type(first)
        and (router.samples, router.temperature, router.n_splits) == (first.samples, first.temperature, first.n_splits)
        and (other.shape, other.dtype) == (logits.shape, logits.dtype)
        for _, router, other in routed
    )


def _looked_up(routers: Sequence[torch.Tensor], tasks: torch.Tensor) -> torch.Tensor:
    """Rows of L routers, `(L, g, columns)`."""
    if routers[0].numel() <= SMALL:
        return torch.stack(tuple(routers)).index_select(1, tasks)
    return torch.stack([torch.embedding(logits, tasks) for logits in routers])


def _is_here(logits: torch.Tensor, device: torch.device) -> bool:
    """Whether these are on `device` now: what shards or offloads parameters brings them layer by layer."""
    return (
        type(logits) in PLAIN_TENSORS
        and not logits.is_meta
        and logits.device == device
        and logits.untyped_storage().nbytes() > 0
        and not logits.is_inference()
    )
