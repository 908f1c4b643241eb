"""What a kind of adapter (`PolyConfig.poly_type`) must say of itself.

A kind keeps no state: tensors lie in the layer, `poly_lora_A` `(h, k, in / h, r)`, `poly_lora_B` `(h, k, r, out / h)`
and the router's `module_logits` `(t, columns)`. Nothing else in the package knows a kind by name: it asks
`config.KINDS[poly_type]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from ...config import PolyConfig
from ...router import Router
from ...tasks.batch import TaskBatch
from ..adapted import Adapted

__all__ = ["Kind"]


class Kind(ABC):
    """One kind of adapter: its settings, its maths, its life and its looks.

    Attributes:
        name: the value of `PolyConfig.poly_type`.
        n_skills, n_splits: what the config has where they were not given.
        tags: of its model cards.
        unit: what a weight is one of, for tables and pictures.
        weight, weights: what tables and pictures call one weight, and all of a task.
        centre: the value of a weight that says nothing about a task; pictures are drawn around it. None: the weights
            of a split sum to 1, and pictures run up from 0.
    """

    name: str
    n_skills: int
    n_splits: int
    tags: tuple[str, ...]
    unit: str
    weight: str
    weights: str
    centre: Optional[float]

    # ------------------------------------------------------------------------------------------------------- settings
    @abstractmethod
    def check(self, config: PolyConfig) -> None:
        """Raise `ValueError` for settings that this kind cannot have."""

    @abstractmethod
    def columns(self, config: PolyConfig) -> int:
        """Numbers that a router has for each task."""

    @abstractmethod
    def router(self, config: PolyConfig) -> Router:
        """A router whose parameters are not drawn yet."""

    @abstractmethod
    def described(self, config: PolyConfig) -> str:
        """One sentence for a model card: what the adapter is, and its paper."""

    # ---------------------------------------------------------------------------------------- what one layer computes
    @abstractmethod
    def pair(self, layer: Adapted, name: str, tasks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tasks `(b,)` are as LoRAs: `(b, in, r), (b, r, out)`, scale left out; differentiable."""

    @abstractmethod
    def update(self, layer: Adapted, name: str, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """What the adapter adds, in plain differentiable operations.

        Args:
            layer: the layer.
            name: the adapter.
            x: `(b, ..., in)`, dtype of A.
            tasks: LongTensor `(b,)`, or `(1,)` for all rows.

        Returns:
            `(b, ..., out)`.
        """

    @abstractmethod
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
        """`base` plus the update, as one autograd node; without `base`, `F.linear(x, weight, bias)` stands for it.

        Args:
            layer: the layer.
            name: the adapter.
            base: `(b, ..., out)`, or None.
            x: `(b, ..., in)`.
            weight: of the base layer, frozen, or None.
            bias: the same.
            ids: LongTensor `(n_rows,)`, or `(1,)` for all rows.
            n_rows: rows of x.
        """

    @abstractmethod
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
        """`y` plus the update, without gradients; in place if `y` is `owned`."""

    # ------------------------------------------------------------------------------------------------------- its life
    @abstractmethod
    def routes(self, layer: Adapted, name: str) -> bool:
        """Whether the router has anything to learn."""

    @abstractmethod
    def average(self, layers: Sequence[Adapted], name: str) -> None:
        """In place, under `no_grad`: one LoRA that all tasks share in each layer, and routers that say nothing."""

    @abstractmethod
    def settings_of_loras(self, ranks: Mapping[str, set[int]], own_weight: Optional[float]) -> dict[str, Any]:
        """`r` and `n_skills` of an adapter made of plain LoRAs; the ranks that each has in its layers, by name.

        `own_weight` is the share that a task's own LoRA starts with; None for the default of the kind.

        Raises:
            ValueError: they cannot be one adapter of this kind.
        """

    @abstractmethod
    def take_loras(
        self, layer: Adapted, name: str, pairs: Sequence[tuple[Any, Any, float]], own_weight: Optional[float]
    ) -> None:
        """Fill an adapter with LoRAs `(A (r, in), B (r, out), scale)`, one a task, in the order of the tasks."""

    # ------------------------------------------------------------------------------------------------------ its looks
    @abstractmethod
    def shown(self, config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Weights `(t, h, k)` of a router at eval, and the probabilities behind them where there are such.

        Args:
            config: the adapter's config, of this package or of PEFT's own Poly.
            logits: `(t, columns)`, float32.
        """

    @abstractmethod
    def why_not_poly(self, config: PolyConfig) -> Optional[str]:
        """Why PEFT's own Poly cannot compute this, a sentence; None if it can."""
