"""The kind `"poly"`: skills are mixed by task, Polytropon (arXiv 2202.13914) and MHR (arXiv 2211.03831)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Optional

import torch
from torch import nn

from ...config import PolyConfig
from ...router import PolyRouter, normalise
from ...tasks.batch import TaskBatch, kept_in_generation
from ...tasks.grouping import Rows, ungrouped_rows
from ..adapted import Adapted
from ..keeping.kept import Kept, Origin, Products, Shortcut
from ..keeping.serving import Serving
from ..onloading import is_offloaded
from ..parts import FIRST_TASK, ids_of_rows, row_tasks, tensors_of
from ..products import low_rank_update
from .kind import Kind
from .mixing import add_update, as_skills, cheaper_together, mix_A, mix_B, mix_one, worth_turning
from .mixing_node import PolyUpdate
from .routed import routed_for_backward, routed_without

__all__ = ["Mixture", "own_skill_logit"]

OWN_WEIGHT = 0.99  # of a task's own skill, in an adapter made of LoRAs

ONE_TASK = Rows(FIRST_TASK, key=(0,))  # of an adapter that has no other


class Mixture(Kind):
    """`y = base(x) + (x A_t) B_t * lora_alpha / r`, `A_t` and `B_t` the skills mixed for the task of each row."""

    name = "poly"
    n_skills = 4
    n_splits = 1
    tags = ("polytropon",)
    unit = "skill"
    weight = "weight"
    weights = "mixing weights"
    centre = None

    # ------------------------------------------------------------------------------------------------------- settings
    def check(self, config: PolyConfig) -> None:
        """Nothing is refused beyond what every kind refuses."""

    def columns(self, config: PolyConfig) -> int:
        """A logit for each split and skill."""
        return config.n_splits * config.n_skills

    def router(self, config: PolyConfig) -> PolyRouter:
        """See `PolyRouter`."""
        return PolyRouter(config)

    def described(self, config: PolyConfig) -> str:
        """Skills, splits, and which of the two papers."""
        method = "Multi-Head Routing (arXiv 2211.03831)" if config.n_splits > 1 else "Polytropon (arXiv 2202.13914)"
        return (
            f"This adapter serves {config.n_tasks} task(s) with one inventory of {config.n_skills} LoRA skills of rank "
            f"{config.r}, mixed per task in {config.n_splits} split(s): {method}."
        )

    # ---------------------------------------------------------------------------------------- what one layer computes
    def pair(self, layer: Adapted, name: str, tasks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed pairs; the mix is small, and 1e-12 needs float32, so that autocast has no part in it."""
        A, B = layer.poly_lora_A[name], layer.poly_lora_B[name]
        with nullcontext() if A.is_meta else torch.autocast(A.device.type, enabled=False):
            router: Any = layer.poly_router[name]
            w = router(tasks).to(A.device)
            return mix_A(w, A), mix_B(w, B)

    def update(self, layer: Adapted, name: str, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """`scale * (x A_t) B_t`."""
        A, B = self.pair(layer, name, tasks)
        return low_rank_update(x, A, B, layer.scaling[name])

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
        """See `PolyUpdate`."""
        A, B, logits = tensors_of(layer, name)
        w, own = routed_for_backward(layer, name, logits, ids, n_rows)
        return PolyUpdate.apply(
            base, x, weight, bias, A, B, layer.scaling[name], w, own, None if own is None else logits
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
        """Mixed pairs per distinct task."""
        rows, A, B = pairs_of_rows(layer, name, batch, n_rows, x)
        if x.dtype != A.dtype:
            x = x.to(A.dtype)
        return add_update(y, x, A, B, layer.scaling[name], rows, owned)

    # ------------------------------------------------------------------------------------------------------- its life
    def routes(self, layer: Adapted, name: str) -> bool:
        """With one skill there is nothing to mix."""
        return layer.n_skills[name] > 1

    def average(self, layers: Sequence[Adapted], name: str) -> None:
        """MHR-mu: A and B become their means over the skills, each by itself: the mix of equal weights."""
        for layer in layers:
            for skills in (layer.poly_lora_A, layer.poly_lora_B):
                old = skills[name]
                skills[name] = nn.Parameter(old.mean(dim=1, keepdim=True), requires_grad=old.requires_grad)
            router: Any = layer.poly_router[name]
            if router.n_skills > 1:  # else a shared router that another layer has made flat
                old = router.module_logits
                router.module_logits = nn.Parameter(old.new_zeros(router.n_tasks, router.n_splits), requires_grad=False)
                router.n_skills = 1
            layer.n_skills[name] = 1

    def settings_of_loras(self, ranks: Mapping[str, set[int]], own_weight: Optional[float]) -> dict[str, Any]:
        """Each LoRA is a skill, and skills have one rank."""
        found = sorted((rank, name) for name, of_lora in ranks.items() for rank in of_lora)
        if len({rank for rank, _ in found}) > 1:
            listed = ", ".join(f"{rank} ({name})" for rank, name in found)
            raise ValueError(f"All LoRAs must have one rank in all layers, but these have: {listed}.")
        return {"r": found[0][0], "n_skills": len(ranks)}

    def take_loras(
        self, layer: Adapted, name: str, pairs: Sequence[tuple[Any, Any, float]], own_weight: Optional[float]
    ) -> None:
        """LoRA i is skill i, on which task i starts with `own_weight` of its mix."""
        h, k, d, r = layer.poly_lora_A[name].shape
        for skill, (A, B, scale) in enumerate(pairs):
            B = B * (scale / layer.scaling[name])
            layer.poly_lora_A[name][:, skill] = A.T.reshape(h, d, r)
            layer.poly_lora_B[name][:, skill] = B.T.reshape(r, h, -1).transpose(0, 1)
        router: Any = layer.poly_router[name]
        logit = own_skill_logit(OWN_WEIGHT if own_weight is None else own_weight, k)
        own = torch.eye(k, dtype=torch.bool, device=router.module_logits.device).repeat(1, h)
        router.module_logits.copy_(torch.where(own, logit, -logit))

    # ------------------------------------------------------------------------------------------------------ its looks
    def shown(self, config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Mixing weights, and the probabilities before they were normalised."""
        p = logits.view(-1, config.n_splits, config.n_skills).sigmoid()
        return normalise(p), p

    def why_not_poly(self, config: PolyConfig) -> Optional[str]:
        """It can."""
        return None


def own_skill_logit(own_weight: float, n_skills: int) -> float:
    """The `z` for which logits `+z` (own skill) and `-z` (the others) put `own_weight` of the mix on the own skill.

    With `p = sigmoid(z)` the weight is `p / (p + (k - 1)(1 - p))`, and `p / (1 - p) = exp(z)`.

    ```py
    >>> round(own_skill_logit(0.99, 8), 2)
    6.54

    ```
    """
    if n_skills == 1:
        return 0.0
    weight = min(own_weight + 5e-7, (1 + own_weight) / 2)  # so that float32 does not round it to less
    return math.log(weight * (n_skills - 1) / (1 - weight))


# ------------------------------------------------------------------------------------------------------- mixed pairs
def pairs_of_rows(
    layer: Adapted, name: str, batch: Optional[TaskBatch], n_rows: int, x: torch.Tensor
) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """Which row has which mixed pair, and the pairs.

    Within `generate` they are mixed once and kept to its end, and in a block of `serving` to the end of that.
    """
    kept, store = (None, None) if layer.training else (kept_in_generation(), layer.task_context.serving)
    rows = None
    if not layer.training:
        rows = ONE_TASK if batch is None else batch.grouped(name, n_rows, x.device, layer.layer_name)
        if store is not None and rows.key is not None and not is_offloaded(layer._modules["poly_lora_A"]):
            return _served(layer, name, batch, rows, x, kept, store)
        if kept is None and rows.index is not None and not cheaper_together(rows, x, layer.r[name]):
            rows = None
    ids = ids_of_rows(layer, batch, name, n_rows)
    if rows is None:
        rows = ungrouped_rows(row_tasks(layer, name, ids, n_rows).to(x.device, non_blocking=True))
    if kept is None:
        return rows, *mixed(layer, name, rows.tasks, x, ids)
    entry, tensors = kept.get((layer, name)), tensors_of(layer, name)
    if entry is None or not entry.holds(batch, rows.tasks, tensors):
        values = mixed(layer, name, rows.tasks, x, ids, kept=True)
        entry = kept[layer, name] = Kept(batch, rows.tasks, tensors, values)
    elif Shortcut.fits(layer, name, x):  # not the first token: there will be more
        kept[layer] = Shortcut(layer, name, x, batch, None, entry.origin, entry.values, _products(rows))
    return rows, *entry.values


def _served(
    layer: Adapted,
    name: str,
    batch: Optional[TaskBatch],
    rows: Rows,
    x: torch.Tensor,
    kept: Optional[dict[Any, Any]],
    store: Serving,
) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """The pairs that the layer keeps for its rows."""
    if rows.index is not None and not cheaper_together(rows, x, layer.r[name]):
        rows = rows.one_by_one()
    tensors = tensors_of(layer, name)
    pair = store.pairs(layer, name, rows, tensors, lambda tasks: mixed(layer, name, tasks, x, tasks, kept=True))
    origin = Origin(tensors)
    if origin.lasting and Shortcut.fits(layer, name, x):
        place = store.shortcuts if kept is None else kept
        place[layer] = Shortcut(layer, name, x, batch, rows.pattern, origin, pair, _products(rows))
    return rows, *pair


def _products(rows: Rows) -> Products:
    """How rows go through their pairs; one token of each row, as in decoding, with the least that can be done."""

    def products(y: torch.Tensor, x: torch.Tensor, pair: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
        A, B = pair
        if x.dim() == 3 and x.shape[1] == 1 and y.dtype == B.dtype:
            if A.dim() == 2:
                y.squeeze(1).addmm_(torch.mm(x.squeeze(1), A), B, alpha=scale)
                return y
            if rows.index is None and A.shape[0] == x.shape[0]:
                return y.baddbmm_(torch.bmm(x, A), B, alpha=scale)
        return add_update(y, x, A, B, scale, rows, True)

    return products


def mixed(
    layer: Adapted, name: str, tasks: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, kept: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Mixture.pair` for tasks `(g,)`, made of the batch's ids, without autograd or autocast; of one task `(in, r)` and
    `(r, out)`. To turn A pays for few tokens too if it is kept for calls to come.
    """
    A, B, logits = tensors_of(layer, name)
    w = routed_without(layer, name, logits, ids, tasks)
    if w.shape[0] == 1:
        return mix_one(w, A, B)
    w = as_skills(w, A, B)
    return mix_A(w, A, kept or worth_turning(x, w.shape[0]), placed=True), mix_B(w, B)
