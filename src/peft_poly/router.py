"""Routers: from task ids to mixing weights (Polytropon, arXiv 2202.13914, section 2.2; MHR, arXiv 2211.03831).

    z = module_logits[task]                      (b, h * k), viewed as (b, h, k)
    p = sigmoid((z + logit(u)) / temperature)    training with noise, u ~ U(0, 1): a relaxed Bernoulli
    p = sigmoid(z)                               otherwise
    w = p / (sum_k p + 1e-12)                    normalised inside each split

Letters: b batch, t task, k skill, h split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Optional

import torch
from torch import nn

from .config import KINDS, PolyConfig

__all__ = ["PolyRouter", "Router", "get_router"]

EPS = 1e-12


def get_router(poly_config: PolyConfig) -> Router:
    """The router that `poly_config.poly_type` names; its parameters are not drawn yet, see `Router.reset`.

    Args:
        poly_config: settings of the adapter.

    Raises:
        ValueError: there is no router of that type.
    """
    if poly_config.poly_type not in KINDS:
        raise ValueError(f"Unsupported poly_type {poly_config.poly_type!r}. Supported are: {sorted(KINDS)}.")
    return KINDS[poly_config.poly_type].router(poly_config)


def logistic_noise(like: torch.Tensor) -> torch.Tensor:
    """`logit(u)`, u ~ U(0, 1): the noise of a relaxed Bernoulli, of the shape, dtype and device of `like`.

    `u` is clamped to [eps, 1 - eps] as `torch.distributions` does, so that its logit is finite.
    """
    return _logistic(torch.rand_like(like))


def _logistic(u: torch.Tensor) -> torch.Tensor:
    return torch.logit(u, eps=torch.finfo(u.dtype).eps)


def route(
    logits: torch.Tensor,
    tasks: torch.Tensor,
    noise: Optional[torch.Tensor],
    temperature: float,
    n_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixing weights and the p before normalising.

    Args:
        logits: `(t, h * k)`.
        tasks: LongTensor `(g,)`.
        noise: `(g, h, k)`, or None for the sigmoid.
        temperature: of the relaxed Bernoulli.
        n_splits: h.

    Returns:
        Two tensors `(g, h, k)`, at least float32: below that 1e-12 would underflow to 0 / 0.
    """
    z = torch.embedding(logits, tasks).view(tasks.shape[0], n_splits, logits.shape[1] // n_splits)
    return weigh(z, noise, temperature)


def weigh(
    z: torch.Tensor, noise: Optional[torch.Tensor] = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` once logits are looked up: z `(..., h, k)`, noise of its shape or None; returns w and p, as `route`."""
    if z.dtype not in (torch.float32, torch.float64):
        z = z.float()
    if noise is not None:
        z = z + noise if temperature == 1.0 else (z + noise) / temperature
    p = torch.sigmoid(z)
    return normalise(p), p


def normalise(p: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the last axis (the skills): `w = p / (sum_k p + 1e-12)`; same shape."""
    return p / (p.sum(dim=-1, keepdim=True) + EPS)


class Router(nn.Module, ABC):
    """Turns the tasks of a batch into weights, by a row of parameters for each task.

    Attributes:
        module_logits (`nn.Parameter`): `(n_tasks, columns)`.
        n_splits: h of the weights.
        n_skills: k of the weights.
        temperature: of its draws, if it samples.
    """

    temperature: float = 1.0
    module_logits: nn.Parameter
    n_splits: int
    n_skills: int

    @property
    def n_tasks(self) -> int:
        """Number of router rows, one per task."""
        return self.module_logits.shape[0]

    @property
    def samples(self) -> bool:
        """Whether each row of a batch gets a draw of its own."""
        return False

    @abstractmethod
    def reset(self) -> None:
        """Draw the parameters anew."""

    def noise_like(self, z: torch.Tensor) -> Optional[torch.Tensor]:
        """A draw for each of rows that are looked up, z `(..., columns)`; None if this router does not sample now."""
        return None

    @abstractmethod
    def route(self, z: torch.Tensor, noise: Optional[torch.Tensor]) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Weights of rows that are looked up, and what their gradient needs beside them.

        Args:
            z: `(..., columns)`.
            noise: of `noise_like`.

        Returns:
            `(..., h, k)`, at least float32, and a tensor of the same shape or None.
        """

    @abstractmethod
    def grad_route(self, grad: torch.Tensor, w: torch.Tensor, p: Optional[torch.Tensor], noisy: bool) -> torch.Tensor:
        """The gradient of z, `(..., h, k)`, from that of the weights.

        Args:
            grad: `(..., h, k)`.
            w: what `route` gave.
            p: the same.
            noisy: whether it was given noise.
        """

    def logits_of_tasks(self) -> torch.Tensor:
        """`module_logits`, `(n_tasks, columns)`; where names may be unknown, the row behind them is their mean."""
        config: Optional[PolyConfig] = getattr(self, "config", None)
        logits = self.module_logits
        if self.training or config is None or config.unknown_task == "error":
            return logits
        return torch.cat([logits, logits.mean(dim=0, keepdim=True)])

    @abstractmethod
    def forward(self, task_ids: torch.Tensor, input_ids: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Weights of a batch.

        Args:
            task_ids: LongTensor `(b,)`.
            input_ids: the rows' tokens `(b, l)`, for routers that look at them.

        Returns:
            `(b, h, k)`, at least float32.
        """

    def extra_repr(self) -> str:
        """The sizes."""
        return f"n_tasks={self.n_tasks}, n_splits={self.n_splits}, n_skills={self.n_skills}"


class PolyRouter(Router):
    """One learnable row of logits per task.

    Args:
        poly_config (`PolyConfig`): `n_tasks`, `n_splits`, `n_skills`, `router_temperature` and `router_noise` are read.

    Attributes:
        module_logits (`nn.Parameter`): `(n_tasks, n_splits * n_skills)`.
    """

    def __init__(self, poly_config: PolyConfig) -> None:
        super().__init__()
        self.config = poly_config  # its `unknown_task` may be set at any time
        self.poly_type = poly_config.poly_type
        self.n_skills = poly_config.n_skills
        self.n_splits = poly_config.n_splits
        self.temperature = float(poly_config.router_temperature)
        self.noise = poly_config.router_noise
        self.module_logits = nn.Parameter(torch.empty(poly_config.n_tasks, self.n_splits * self.n_skills))

    @property
    def samples(self) -> bool:
        """Whether each row of a batch gets a draw of its own, as it does in training unless the noise is off."""
        return self.training and self.noise

    def reset(self) -> None:
        """Logits uniform in +-1e-3: every task starts from almost equal weights."""
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def noise_like(self, z: torch.Tensor) -> Optional[torch.Tensor]:
        """Noise of the relaxed Bernoulli, a draw per row of z `(..., h * k)`: `(..., h, k)`; None without noise."""
        return self._draw(z.shape[:-1], z) if self.samples else None

    def route(self, z: torch.Tensor, noise: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixing weights w and the p before normalising, `(..., h, k)`, at least float32.

        Args:
            z: `(..., h * k)`.
            noise: `(..., h, k)`, or None for the sigmoid.
        """
        return weigh(z.unflatten(-1, (self.n_splits, self.n_skills)), noise, self.temperature)

    def grad_route(self, grad: torch.Tensor, w: torch.Tensor, p: Optional[torch.Tensor], noisy: bool) -> torch.Tensor:
        """`w (grad - sum_k grad w) (1 - p)`, divided by the temperature if it was `noisy`; all `(..., h, k)`."""
        assert p is not None
        grad_z = w * grad
        grad_z.addcmul_(w, grad_z.sum(dim=-1, keepdim=True), value=-1)
        grad_z.addcmul_(grad_z, p, value=-1)
        return grad_z / self.temperature if noisy and self.temperature != 1.0 else grad_z

    def forward(self, task_ids: torch.Tensor, input_ids: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Mixing weights of a batch.

        Args:
            task_ids (`torch.LongTensor`): `(b,)`. Checked once per forward before they come here, not in each router:
                an id out of range fails in the embedding look-up, never wraps.
            input_ids: ignored; there for PEFT's signature.

        Returns:
            `(b, n_splits, n_skills)`, at least float32.

        Raises:
            ValueError: `task_ids` is None.
        """
        if task_ids is None:
            raise ValueError("task_ids should not be None: a router needs to know the task of each row.")
        tasks = task_ids.reshape(-1).to(self.module_logits.device)
        return route(self.logits_of_tasks(), tasks, self.noise_for(tasks), self.temperature, self.n_splits)[0]

    def noise_for(self, tasks: torch.Tensor) -> Optional[torch.Tensor]:
        """Noise for one draw per entry of `tasks`, `(g, h, k)`; None if this router does not sample now."""
        return self._draw(tasks.shape, self.module_logits) if self.samples else None

    def _draw(self, rows: torch.Size, like: torch.Tensor) -> torch.Tensor:
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return _logistic(torch.rand(*rows, self.n_splits, self.n_skills, dtype=dtype, device=like.device))
