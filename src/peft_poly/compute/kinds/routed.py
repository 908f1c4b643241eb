"""The weights of one layer's rows: its share of the routing of the call, or routed by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..adapted import Adapted
from ..parts import router_of, row_tasks

__all__ = ["OwnRouting", "routed_for_backward", "routed_without"]


@dataclass(frozen=True)
class OwnRouting:
    """The routing of a layer by itself, in whose node the gradient of the weights goes on to the logits.

    Attributes:
        router: it knows the gradient.
        tasks: LongTensor `(g,)`.
        p: what the gradient needs beside the weights, `(g, h, k)` or None.
        noise: that was added, `(g, h, k)` or None.
    """

    router: Any
    tasks: torch.Tensor
    p: Optional[torch.Tensor]
    noise: Optional[torch.Tensor]

    def again(self, logits: torch.Tensor) -> torch.Tensor:
        """The weights `(g, h, k)` anew, differentiable in the logits `(t, columns)`."""
        return self.router.route(torch.embedding(logits, self.tasks), self.noise)[0]

    def grad_logits(
        self,
        grad_w: torch.Tensor,
        w: torch.Tensor,
        p: Optional[torch.Tensor],
        tasks: torch.Tensor,
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """`(g, h, k) -> (t, columns)`; the rest as it was saved."""
        grad_z = self.router.grad_route(grad_w, w, p, self.noise is not None).flatten(1)
        scatter = torch.ops.aten.embedding_dense_backward  # deterministic on a GPU too
        return scatter(grad_z, tasks, logits.shape[0], -1, False).to(logits.dtype)


def routed_for_backward(
    layer: Adapted, name: str, logits: torch.Tensor, ids: torch.Tensor, n_rows: int
) -> tuple[torch.Tensor, Optional[OwnRouting]]:
    """Weights `(g, h, k)` of a layer's rows, one of each where the router samples, and how their gradient goes on.

    Args:
        layer: the layer.
        name: the adapter.
        logits: the router's.
        ids: the batch's, `(n_rows,)` or `(1,)`.
        n_rows: rows of the layer's input.

    Returns:
        The weights; and the routing of the layer by itself, or None if the routing of the call sees to the gradient.
    """
    tasks, router = row_tasks(layer, name, ids, n_rows), router_of(layer, name)
    routing = layer.task_context.routing
    share = None if routing is None else routing.of(layer, name, ids, len(tasks), logits)
    if share is None:
        with torch.no_grad():
            tasks = tasks.to(logits.device, non_blocking=True)
            z = torch.embedding(logits, tasks)
            noise = router.noise_like(z)
            w, p = router.route(z, noise)
        return w, OwnRouting(router, tasks, p, noise)
    if share.without_gradient and torch._C._current_graph_task_id() != -1:
        return share.stored, OwnRouting(router, share.tasks, share.p, share.noise)
    return share.w, None


def routed_without(
    layer: Adapted, name: str, logits: torch.Tensor, ids: torch.Tensor, tasks: torch.Tensor
) -> torch.Tensor:
    """Weights `(g, h, k)` of tasks `(g,)`, without gradients.

    Args:
        layer: the layer.
        name: the adapter.
        logits: the router's.
        ids: the batch's, which the tasks are made of.
        tasks: distinct ones, or one per row; where the router samples one per row.
    """
    router, routing = router_of(layer, name), layer.task_context.routing
    if routing is not None:
        share = routing.of(layer, name, ids, len(tasks), logits, without_gradient=True)
        if share is not None:
            return share.stored
        w: Optional[torch.Tensor] = None if router.samples else routing.weights.of(router, name, tasks)
        if w is not None:
            return w
    with torch.no_grad():
        z = torch.embedding(logits, tasks)
        return router.route(z, router.noise_like(z))[0]
