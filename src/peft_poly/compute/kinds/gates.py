"""The kind `"gates"`: one LoRA that all tasks share, and a gate for each task and rank.

    g_t = 1 + module_logits[t]                                (r,)
    y   = base(x) + ((x A) * g_t) B * lora_alpha / r

The diagonal case of the task matrix of MTL-LoRA (arXiv 2410.09437). Nothing is mixed: a batch of any number of tasks
costs two products and one multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import nn

from ...config import PolyConfig
from ...router import Router
from ...tasks.batch import TaskBatch, kept_in_generation
from ..adapted import Adapted
from ..keeping.kept import Kept, Origin, Shortcut
from ..parts import ids_of_rows, tensors_of
from ..products import in_dtype, to_add_to
from .gating_node import GatedUpdate, add_gated
from .kind import Kind
from .routed import routed_for_backward, routed_without

__all__ = ["GateRouter", "Gates"]


class GateRouter(Router):
    """One row of gates per task, as what they differ from 1 by.

    Args:
        poly_config (`PolyConfig`): `n_tasks` and `r` are read.

    Attributes:
        module_logits (`nn.Parameter`): `(n_tasks, r)`, zero at the start.
    """

    def __init__(self, poly_config: PolyConfig) -> None:
        super().__init__()
        self.config = poly_config  # its `unknown_task` may be set at any time
        self.poly_type = poly_config.poly_type
        self.n_splits = 1
        self.n_skills = poly_config.r
        self.module_logits = nn.Parameter(torch.empty(poly_config.n_tasks, poly_config.r))

    def reset(self) -> None:
        """All gates at one: every task starts as the shared LoRA."""
        nn.init.zeros_(self.module_logits)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"n_tasks={self.n_tasks}, r={self.module_logits.shape[1]}"

    def route(self, z: torch.Tensor, noise: Optional[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """`1 + z`, `(..., r) -> (..., 1, r)`, at least float32; no noise, and a gradient that needs nothing."""
        return (z if z.dtype in (torch.float32, torch.float64) else z.float()).add(1).unsqueeze(-2), None

    def grad_route(self, grad: torch.Tensor, w: torch.Tensor, p: Optional[torch.Tensor], noisy: bool) -> torch.Tensor:
        """That of the gates, `(..., 1, r)`."""
        return grad

    def forward(self, task_ids: torch.Tensor, input_ids: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates of a batch.

        Args:
            task_ids (`torch.LongTensor`): `(b,)`; an id out of range fails in the look-up, never wraps.
            input_ids: ignored; there for PEFT's signature.

        Returns:
            `(b, 1, r)`, at least float32.

        Raises:
            ValueError: `task_ids` is None.
        """
        if task_ids is None:
            raise ValueError("task_ids should not be None: a router needs to know the task of each row.")
        tasks = task_ids.reshape(-1).to(self.module_logits.device)
        return self.route(torch.embedding(self.logits_of_tasks(), tasks), None)[0]


class Gates(Kind):
    """`y = base(x) + ((x A) * g_t) B * lora_alpha / r`, `g_t` the gates of the task of each row."""

    name = "gates"
    tags = ("mtl-lora",)
    unit = "rank"
    weight = "gate"
    weights = "gates"
    n_skills = 1
    n_splits = 1
    centre = 1.0

    # ------------------------------------------------------------------------------------------------------- settings
    def check(self, config: PolyConfig) -> None:
        """One skill, one split, no temperature."""
        for setting in ("n_skills", "n_splits"):
            value = getattr(config, setting)
            if value != 1:
                raise ValueError(
                    f"`{setting}` must be 1 with poly_type='gates', one LoRA that all tasks share, got {value!r}. "
                    f"Leave it out; for a larger adapter choose a larger `r`."
                )
        if config.router_temperature != 1:
            raise ValueError(
                "`router_temperature` has no meaning with poly_type='gates', whose gates are not sampled, got "
                f"{config.router_temperature!r}. Leave it out."
            )

    def columns(self, config: PolyConfig) -> int:
        """A gate for each rank."""
        return config.r

    def router(self, config: PolyConfig) -> GateRouter:
        """See `GateRouter`."""
        return GateRouter(config)

    def described(self, config: PolyConfig) -> str:
        """The rank, and where it is from."""
        return (
            f"This adapter serves {config.n_tasks} task(s) with one LoRA of rank {config.r} that they share, and a "
            "gate for each task, layer and rank: the diagonal case of MTL-LoRA (arXiv 2410.09437)."
        )

    # ---------------------------------------------------------------------------------------- what one layer computes
    def pair(self, layer: Adapted, name: str, tasks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `diag(g_t) B`."""
        A, B = layer.poly_lora_A[name][0, 0], layer.poly_lora_B[name][0, 0]
        router: Any = layer.poly_router[name]
        gated = router(tasks).to(B.device).transpose(1, 2) * B  # (b, r, out), rounded once where B is 16-bit
        return A.expand(gated.shape[0], *A.shape), gated.to(B.dtype)

    def update(self, layer: Adapted, name: str, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """`scale * ((x A) * g_t) B`."""
        A, B = layer.poly_lora_A[name][0, 0], layer.poly_lora_B[name][0, 0]
        router: Any = layer.poly_router[name]
        gates = router(tasks)[:, 0] * layer.scaling[name]
        u = torch.matmul(x, A)
        rows = gates.view(gates.shape[0], *[1] * (x.dim() - 2), gates.shape[1]) if x.dim() > 1 else gates[0]
        return torch.matmul(u * rows.to(u), B)

    def node(
        self,
        layer: Adapted,
        name: str,
        base: Optional[torch.Tensor],
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        ids: torch.Tensor,
        n_rows: int,
    ) -> torch.Tensor:
        """See `GatedUpdate`."""
        A, B, logits = tensors_of(layer, name)
        gates, own = routed_for_backward(layer, name, logits, ids, n_rows)
        return GatedUpdate.apply(
            base, x, weight, bias, A, B, layer.scaling[name], gates, own, None if own is None else logits
        )

    def add(
        self,
        layer: Adapted,
        name: str,
        y: torch.Tensor,
        x: torch.Tensor,
        batch: Optional[TaskBatch],
        n_rows: int,
        owned: bool,
    ) -> torch.Tensor:
        """Two products and one multiplication, whatever the tasks."""
        A, B, logits = tensors_of(layer, name)
        gates = gates_of_rows(layer, name, logits, batch, n_rows, x)
        y = to_add_to(y, owned)
        add_gated(y, in_dtype(x, A.dtype), gates, A.view(A.shape[2:]), B.view(B.shape[2:]), layer.scaling[name])
        return y

    # ------------------------------------------------------------------------------------------------------- its life
    def routes(self, layer: Adapted, name: str) -> bool:
        """Every task has gates to learn."""
        return True

    def average(self, layers: Sequence[Adapted], name: str) -> None:
        """The mean gate goes into B, which is the mean of the tasks' updates; all gates are then one."""
        routers: dict[int, Any] = {}
        for layer in layers:
            router: Any = layer.poly_router[name]
            routers[id(router)] = router
            B = layer.poly_lora_B[name]
            gates = router.route(router.module_logits, None)[0].mean(dim=0)  # (1, r)
            folded = gates.to(B.device).view(1, 1, -1, 1) * B
            layer.poly_lora_B[name] = nn.Parameter(folded.to(B.dtype).detach(), requires_grad=B.requires_grad)
        for router in routers.values():
            router.module_logits = nn.Parameter(torch.zeros_like(router.module_logits), requires_grad=False)

    def settings_of_loras(self, ranks: Mapping[str, set[int]], own_weight: Optional[float]) -> dict[str, Any]:
        """The LoRAs are stacked, so that their ranks add up."""
        if own_weight is not None:
            raise ValueError(
                f"`own_weight` has no meaning with poly_type='gates', got {own_weight!r}: each task starts as its LoRA "
                "exactly. Leave it out."
            )
        several = {name: sorted(of_lora) for name, of_lora in ranks.items() if len(of_lora) > 1}
        if several:
            name, found = next(iter(several.items()))
            raise ValueError(f"A LoRA must have one rank in all layers, but that of task {name!r} has {found}.")
        return {"r": sum(rank for of_lora in ranks.values() for rank in of_lora)}

    def take_loras(
        self, layer: Adapted, name: str, pairs: Sequence[tuple[Any, Any, float]], own_weight: Optional[float]
    ) -> None:
        """Each task's gates are one on the ranks of its own LoRA and zero elsewhere: exact."""
        logits: Any = layer.poly_router[name].module_logits
        logits.fill_(-1)
        first = 0
        for task, (A, B, scale) in enumerate(pairs):
            ranks = slice(first, first + A.shape[0])
            layer.poly_lora_A[name][0, 0, :, ranks] = A.T
            layer.poly_lora_B[name][0, 0, ranks] = B.T * (scale / layer.scaling[name])
            logits[task, ranks] = 0
            first = ranks.stop

    # ------------------------------------------------------------------------------------------------------ its looks
    def shown(self, config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The gates; no probability is behind them."""
        return 1 + logits.unsqueeze(1), None

    def why_not_poly(self, config: PolyConfig) -> Optional[str]:
        """PEFT's own Poly mixes skills; it has no gates."""
        return "POLY mixes skills, and this adapter has gates (poly_type='gates'), which it cannot express."


def gates_of_rows(
    layer: Adapted, name: str, logits: torch.Tensor, batch: Optional[TaskBatch], n_rows: int, x: torch.Tensor
) -> torch.Tensor:
    """The gates of the rows, `(b, r)` or `(1, r)` for all, dtype of A, without gradients; kept within `generate`."""
    ids = ids_of_rows(layer, batch, name, n_rows)
    A, B, _ = tensors_of(layer, name)

    def looked_up() -> torch.Tensor:
        tasks = ids.to(logits.device, non_blocking=True)
        return routed_without(layer, name, logits, ids, tasks)[:, 0].to(A.dtype)

    kept = None if layer.training else kept_in_generation()
    if kept is None:
        return looked_up()
    entry = kept.get((layer, name))
    if entry is None or not entry.holds(batch, ids, (logits,)):
        entry = kept[layer, name] = Kept(batch, ids, (logits,), (looked_up(),))
    elif Shortcut.fits(layer, name, x):  # not the first token: there will be more
        values = (A[0, 0], B[0, 0], *entry.values)
        kept[layer] = Shortcut(layer, name, x, batch, None, Origin((logits, A, B)), values, _gated)
    return entry.values[0]


def _gated(y: torch.Tensor, x: torch.Tensor, values: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
    A, B, gates = values
    add_gated(y, x, gates, A, B, scale)
    return y
