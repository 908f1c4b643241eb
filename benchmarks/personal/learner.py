"""An adapted encoder with a head, trained and tested on the examples of many tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from peft_poly.compare.learning.methods import BIAS_RATE
from peft_poly.router import Router

from ..quality.encoder import Features
from ..quality.methods import Adapter, build
from ..quality.ranker import embed
from ..quality.rates import Rates
from .lines import Line
from .problem import Example

__all__ = ["Learner", "auc", "chances", "train"]

WARM_UP = 10  # steps; constant from there on, so that a run of many steps has been one of few
CLIP = 1.0
FEWEST = 12  # sequences of a call: for few, what a call costs is more than what padding does


class Head(nn.Module):
    """Logits of the classes, with what each of `tasks` adds: nothing, a bias, or a head of its own."""

    def __init__(self, width: int, classes: int, tasks: int, own: str) -> None:
        super().__init__()
        self.shared = nn.Linear(width, classes)
        self.bias = nn.Parameter(torch.zeros(tasks, classes)) if own else None
        self.own = nn.Parameter(torch.zeros(tasks, classes, width)) if own == "head" else None

    def forward(self, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """`(b, d), (b,) -> (b, classes)`."""
        logits = self.shared(x)
        if self.bias is not None:
            logits = logits + self.bias[tasks]
        return logits if self.own is None else logits + torch.einsum("bd,bcd->bc", x, self.own[tasks])


class Learner:
    """A line, built.

    Args:
        line: what it is.
        rates: its learning rates and scale.
        features: of all texts.
        tasks: names of the tasks, by id.
        classes: number of classes.
        seed: of all parameters.
    """

    def __init__(self, line: Line, rates: Rates, features: Features, tasks: list[str], classes: int, seed: int) -> None:
        assert line.method is not None
        self.line, self.features = line, features
        self.adapter: Adapter = build(line.method, rates.scale, features.upper, tasks, seed)
        self.width = next(features.upper.parameters()).shape[-1]
        self.head = Head(self.width, classes, len(tasks), line.own)

    def logits(self, rows: list[Example]) -> torch.Tensor:
        """`(b, classes)`."""
        tasks = [self.adapter.task_id[row.task] for row in rows]
        routed = self.adapter.method.kind != "lora"  # else a text has one vector, whosever it is
        places: dict[tuple[int, int], int] = {}
        for row, task in zip(rows, tasks, strict=True):
            places.setdefault((self.features.index[row.text], task if routed else 0), len(places))
        vectors = embed(self.adapter.encode, self.features, list(places), FEWEST) * math.sqrt(self.width)
        of_rows = [
            places[self.features.index[row.text], task if routed else 0] for row, task in zip(rows, tasks, strict=True)
        ]
        return self.head(vectors[of_rows], torch.tensor(tasks))

    def loss(self, rows: list[Example]) -> torch.Tensor:
        """Mean cross-entropy."""
        return nn.functional.cross_entropy(self.logits(rows), torch.tensor([row.label for row in rows]))

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.adapter.model, self.head) for p in module.parameters() if p.requires_grad]

    @property
    def n_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def optimizer(self, rates: Rates) -> torch.optim.Optimizer:
        optimizer = self.adapter.optimizer(rates)
        head = {name: p for name, p in self.head.named_parameters() if p.requires_grad}
        own_lr = 0.0  # of biases; without one they learn as the head does
        if self.line.own == "bias":
            own_lr = rates.router_lr if self.adapter.method.kind == "lora" else BIAS_RATE * rates.lr
        own = [head.pop("bias")] if own_lr else []
        for name, params, lr in (("head", list(head.values()), rates.lr), ("own", own, own_lr)):
            if params:
                optimizer.add_param_group({"name": name, "params": params, "lr": lr})
        return optimizer

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What was learnt."""
        learnt = {name: p.detach() for name, p in self.adapter.model.named_parameters() if p.requires_grad}
        return {"adapter": learnt, "head": self.head.state_dict()}

    def load(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        self.adapter.model.load_state_dict(state["adapter"], strict=False)
        self.head.load_state_dict(state["head"])

    def copy(self) -> Learner:
        other = copy.copy(self)
        other.adapter, other.head = self.adapter.copy(), copy.deepcopy(self.head)
        return other


def train(learner: Learner, batches: Iterator[list[Example]], stops: Iterable[int], rates: Rates) -> Iterator[int]:
    """Train to each of the numbers of steps `stops`, and hand it out there."""
    optimizer = learner.optimizer(rates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    routers = [m for m in learner.adapter.model.modules() if isinstance(m, Router)] if learner.line.decay else []
    done = 0
    for stop in stops:
        learner.adapter.model.train()
        while done < stop:
            optimizer.zero_grad()
            learner.loss(next(batches)).backward()
            nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            for router in routers:
                _decay(router, rates.router_lr * learner.line.decay)
            done += 1
        yield stop


@torch.no_grad()
def _decay(router: Router, share: float) -> None:
    """All rows go so much of the way to their mean."""
    rows = router.module_logits
    rows.lerp_(rows.mean(dim=0, keepdim=True).expand_as(rows), share)


@torch.no_grad()
def chances(learner: Learner, rows: list[Example], batch: int = 512) -> torch.Tensor:
    """Probabilities `(b, classes)`."""
    learner.adapter.model.eval()
    parts = [learner.logits(rows[begin : begin + batch]).softmax(-1) for begin in range(0, len(rows), batch)]
    return torch.cat(parts)


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """How often a row of class 1 has a higher score than one of class 0, ties half; nan where one class is missing."""
    one, zero = scores[labels == 1], scores[labels == 0]
    if not len(one) or not len(zero):
        return math.nan
    above = (one[:, None] > zero).double() + 0.5 * (one[:, None] == zero).double()
    return float(above.mean())
