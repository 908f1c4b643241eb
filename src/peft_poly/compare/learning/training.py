"""One trainer for all methods, and the answers of what was trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..data import Row, Tasks, batches
from .methods import Method, adapt, n_trainable, optimizer_of
from .texts import Texts

__all__ = ["LOOKS", "Trained", "commonest", "told", "train"]

WARM_UP = 10  # steps; the rate is constant from there on, so that a run of many steps has been one of few
CLIP = 1.0
LOOKS = 4  # how often in a run the validation rows are asked


class Classifier(nn.Module):
    """An adapted encoder, and a class for each label; a row chooses from those of its task.

    A class starts as the vector that the untrained encoder gives the text of its label.

    Args:
        method: what the adapter is made of.
        encoder: changed in place; `encoder.unload()` gives it back.
        texts: cuts texts into tokens.
        tasks: the tasks and their labels.
    """

    def __init__(self, method: Method, encoder: nn.Module, texts: Texts, tasks: Tasks) -> None:
        super().__init__()
        self.method, self.texts = method, texts
        keys = [[(task if method.own_heads else "", label) for label in tasks.labels[task]] for task in tasks.names]
        place = {key: n for n, key in enumerate(dict.fromkeys(key for of_task in keys for key in of_task))}
        starts = _embedded(encoder, texts, [label for _, label in place])
        self.weight = nn.Parameter(nn.functional.normalize(starts, dim=-1))  # (classes, d)
        self.bias = nn.Parameter(starts.new_zeros(len(place)))
        self.task_id = {task: n for n, task in enumerate(tasks.names)}
        self.label_id = {task: {label: n for n, label in enumerate(labels)} for task, labels in tasks.labels.items()}
        own = nn.utils.rnn.pad_sequence(
            [torch.tensor([place[key] for key in of_task]) for of_task in keys], batch_first=True, padding_value=-1
        )
        self.register_buffer("own", own)  # (tasks, c)
        self.biases = nn.Parameter(starts.new_zeros(own.shape)) if method.own_biases else None
        self.unused = int((own < 0).sum()) if method.own_biases else 0  # biases of labels that a task does not have
        self.encoder = adapt(method, encoder, texts.blocks.targets, tasks.names)
        self.to(starts.device)

    def forward(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(b, c)` of each row's labels, -inf where its task has fewer, and the right ones `(b,)`."""
        task_ids = torch.tensor([self.task_id[row.task] for row in rows], device=self.weight.device)
        call = {"task_ids": task_ids} if self.method.kind != "lora" else {}
        vectors = self.texts.vectors(self.encoder, [self.read(row) for row in rows], **call)
        own = self.own[task_ids]  # type: ignore[index]
        logits = (vectors @ self.weight.T + self.bias).gather(1, own.clamp(min=0))
        if self.biases is not None:
            logits = logits + self.biases[task_ids]
        logits = logits.masked_fill(own < 0, -torch.inf)
        labels = [self.label_id[row.task][row.label] for row in rows]
        return logits, torch.tensor(labels, device=logits.device)

    def read(self, row: Row) -> str:
        """The text that the encoder gets of a row."""
        return told(row) if self.method.told else row.text

    def learns(self) -> None:
        """Adapters are in training, so that routers may sample; what does not learn, and its dropout, is not."""
        self.eval()
        for module in self.modules():
            if isinstance(module, BaseTunerLayer):
                module.train()


def told(row: Row) -> str:
    """A row's text with the name of its task before it."""
    return f"{row.task}: {row.text}"


@torch.no_grad()
def _embedded(encoder: nn.Module, texts: Texts, labels: list[str]) -> torch.Tensor:
    parts = texts.in_order(labels)
    vectors = torch.cat([texts.vectors(encoder, [labels[n] for n in part]) for part in parts])
    return vectors[torch.tensor([n for part in parts for n in part]).argsort()]


@dataclass(frozen=True)
class Trained:
    """What came of one run.

    Attributes:
        steps: after which it answered best on the validation rows.
        validation: share of those it had right there.
        loss: mean cross-entropy there.
        right: for each test row whether its answer is.
        parameters: numbers that learned.
    """

    steps: int
    validation: float
    loss: float
    right: list[bool]
    parameters: int


def train(
    method: Method,
    encoder: nn.Module,
    texts: Texts,
    tasks: Tasks,
    *,
    lr: float,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[], Any] = lambda: None,
) -> Trained:
    """Train one method from one seed, and let the best of `LOOKS` moments answer the test rows.

    Args:
        method: what is trained.
        encoder: frozen; as it was when the call ends.
        texts: cuts texts into tokens.
        tasks: the rows.
        lr: of everything but routers and the biases of tasks.
        steps: of training.
        batch_size: rows of a step.
        seed: of the parameters, the order of the rows, dropout and the routers' noise.
        progress: called after each step.
    """
    torch.manual_seed(seed)
    model = Classifier(method, encoder, texts, tasks)
    try:
        optimizer = optimizer_of(method, model, lr, model.biases)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        looks = {round(steps * (look + 1) / LOOKS) for look in range(LOOKS)}
        best: tuple[float, float, int] = (-1.0, 0.0, 0)
        kept: dict[str, torch.Tensor] = {}
        for step, rows in zip(range(1, steps + 1), batches(tasks.train, batch_size, seed), strict=False):
            model.learns()
            optimizer.zero_grad()
            nn.functional.cross_entropy(*model(rows)).backward()
            nn.utils.clip_grad_norm_(learnt.values(), CLIP)
            optimizer.step()
            schedule.step()
            progress()
            if step in looks:
                right, loss = answers(model, tasks.validation)
                found = (sum(right) / len(right), -loss, step) if math.isfinite(loss) else (0.0, -math.inf, step)
                if found > best:
                    best, kept = found, {name: p.detach().clone() for name, p in learnt.items()}
        with torch.no_grad():
            for name, parameter in learnt.items():
                parameter.copy_(kept[name])
        right, _ = answers(model, tasks.test)
        return Trained(best[2], best[0], -best[1], right, n_trainable(model) - model.unused)
    finally:
        model.encoder.unload()


@torch.no_grad()
def answers(model: Classifier, rows: Sequence[Row]) -> tuple[list[bool], float]:
    """For each row whether the answer is right, and the mean cross-entropy."""
    model.eval()
    right, total = [False] * len(rows), 0.0
    for places in model.texts.in_order([model.read(row) for row in rows]):
        logits, labels = model([rows[n] for n in places])
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        for n, hit in zip(places, (logits.argmax(1) == labels).tolist(), strict=True):
            right[n] = hit
    return right, total / len(rows)


def commonest(tasks: Tasks) -> list[bool]:
    """For each test row whether its label is the commonest of its task's training rows; the first one on a tie."""
    counts = Counter((row.task, row.label) for row in tasks.train)
    guess = {task: max(labels, key=lambda label: counts[task, label]) for task, labels in tasks.labels.items()}
    return [row.label == guess[row.task] for row in tasks.test]
