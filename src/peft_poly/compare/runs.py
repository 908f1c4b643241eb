"""The runs of a comparison, in an order that makes a fair table of one that is stopped; what is done is not done again.

every method at every rate, first seed ─▶ the rate that does best on validation rows ─▶ second seed ─▶ third ...
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from .. import recommended
from .comparison import Comparison, Settings
from .data import Row, Tasks, load_tasks
from .learning.blocks import Blocks
from .learning.encoder import fingerprint, load_encoder
from .learning.methods import BIAS_RATE, METHODS, Method
from .learning.texts import Texts
from .learning.training import LOOKS, Trained, told, train
from .progress import Progress
from .store import Store, Unit

__all__ = ["compare_methods"]

PROBED = 4  # steps that are timed before a comparison starts
DEFAULT = Settings()
ASKING = 1 / 3  # of the time of a step, for as many rows that are only asked


def compare_methods(
    folder: Path,
    base: str,
    output: Path,
    settings: Settings = DEFAULT,
    say: Callable[[str], Any] = print,
) -> Comparison:
    """Train all methods on the tasks of a folder; what `output` has of an earlier call with the same data is kept.

    Args:
        folder: of `*.jsonl` files; see `data`.
        base: folder or Hub id of an encoder.
        output: folder for `runs.jsonl`.
        settings: of all methods.
        say: told what the user should know before the training starts.

    Raises:
        ValueError: the data or the encoder cannot be used; the message says why.
    """
    start = time.perf_counter()
    tasks = load_tasks(folder)
    encoder, tokenizer = load_encoder(base)
    texts = Texts(tokenizer, Blocks(encoder, settings.blocks), settings.max_length)
    texts.check_known(row.text for row in tasks.train)
    run = _Run(tasks, encoder, texts, settings, Store(output / "runs.jsonl"))
    for line in (_about(tasks, settings), *tasks.notes):
        say(line)
    if run.left():
        run.read_all()
        say(run.forecast())
        run.carry_out()
    else:
        say(f"All {run.number} runs are in {run.store.path}.")
    runs, rates = {}, {}
    for method in METHODS:
        rates[method.name] = run.chosen(method)
        runs[method.name] = [run.done[run.unit(method, rates[method.name], seed)] for seed in range(settings.seeds)]
    return Comparison(tasks, settings, runs, rates, time.perf_counter() - start)


def _about(tasks: Tasks, settings: Settings) -> str:
    sizes = {len(labels) for labels in tasks.labels.values()}
    labels = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"
    return (
        f"{len(tasks.names)} tasks of {labels} labels; rows: {len(tasks.train)} to train, {len(tasks.validation)} to "
        f"choose on, {len(tasks.test)} to test. {settings.steps(tasks)} steps of {settings.batch_size} rows a run."
    )


class _Run:
    """A comparison in the making."""

    def __init__(self, tasks: Tasks, encoder: nn.Module, texts: Texts, settings: Settings, store: Store) -> None:
        self.tasks, self.texts, self.settings, self.store = tasks, texts, settings, store
        self.setups = _setups(tasks, encoder, settings)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.encoder = encoder.to(device or "cpu")
        self.done = store.read()

    def unit(self, method: Method, lr: float, seed: int) -> Unit:
        return Unit(self.setups[method], method.name, lr, seed)

    def chosen(self, method: Method) -> float:
        """The rate that did best at the first seed, on validation rows."""
        found = {lr: self.done[self.unit(method, lr, 0)] for lr in self.settings.rates}
        return max(found, key=lambda lr: (found[lr].validation, -found[lr].loss))

    def plan(self) -> Iterator[tuple[Method, float, int]]:
        """All runs; the rates of later seeds are known when the first seed is done."""
        yield from ((method, lr, 0) for method in METHODS for lr in self.settings.rates)
        for seed in range(1, self.settings.seeds):
            yield from ((method, self.chosen(method), seed) for method in METHODS)

    @property
    def number(self) -> int:
        """How many runs there are in all."""
        return len(METHODS) * (len(self.settings.rates) + self.settings.seeds - 1)

    def left(self) -> int:
        """How many runs are still to do, at most: while a rate is unknown, no run of a later seed is done."""
        first = [(method, lr, 0) for method in METHODS for lr in self.settings.rates]
        open_first = sum(self.unit(*run) not in self.done for run in first)
        if open_first:
            return open_first + len(METHODS) * (self.settings.seeds - 1)
        return sum(self.unit(*run) not in self.done for run in self.plan())

    def read_all(self) -> None:
        """What can be computed once for each text is computed."""
        rows = [row for part in _parts(self.tasks) for row in part]
        self.texts.keep(self.encoder, [text for row in rows for text in (row.text, told(row))])

    def forecast(self) -> str:
        """How long it will take, from a few steps of the quickest method and of one that routes."""
        left = self.left()
        step = fmean(self._seconds_of_a_step(method) for method in (METHODS[0], METHODS[-1]))
        asked = LOOKS * len(self.tasks.validation) + len(self.tasks.test)
        seconds = left * step * (self.settings.steps(self.tasks) + ASKING * asked / self.settings.batch_size)
        known = f", {self.number - left} of {self.number} are done already" if left < self.number else ""
        return (
            f"{left} runs{known}: about {_duration(seconds)} on this machine, as it is now. Stop it when you like: "
            f"what is done stays in {self.store.path}."
        )

    def _seconds_of_a_step(self, method: Method) -> float:
        few = replace(self.tasks, validation=self.tasks.validation[:1], test=self.tasks.test[:1])
        stamps: list[float] = []
        self._train(method, self.settings.rates[0], 0, few, PROBED, lambda: stamps.append(time.perf_counter()))
        return median(later - earlier for earlier, later in itertools.pairwise(stamps))

    def _train(
        self, method: Method, lr: float, seed: int, tasks: Tasks, steps: int, progress: Callable[[], Any]
    ) -> Trained:
        sizes = {"steps": steps, "batch_size": self.settings.batch_size}
        return train(method, self.encoder, self.texts, tasks, lr=lr, seed=seed, progress=progress, **sizes)

    def carry_out(self) -> None:
        """Do what is left, and write down each run when it is done."""
        steps = self.settings.steps(self.tasks)
        with Progress(self.left() * steps) as progress:
            for method, lr, seed in self.plan():
                unit = self.unit(method, lr, seed)
                if unit not in self.done:
                    progress.begin(f"{method.name}, rate {lr:g}, seed {seed}")
                    self.done[unit] = self._train(method, lr, seed, self.tasks, steps, progress.step)
                    self.store.add(unit, self.done[unit])


def _setups(tasks: Tasks, encoder: nn.Module, settings: Settings) -> dict[Method, str]:
    """Fingerprint of all that the runs of a method have in common; more rates or seeds only add runs."""
    rows = [[[row.task, row.text, row.label] for row in part] for part in _parts(tasks)]
    common = {key: value for key, value in asdict(settings).items() if key not in ("rates", "seeds")}
    about = [rows, tasks.labels, common, recommended.SETTINGS, recommended.ROUTER_LR, fingerprint(encoder)]
    kinds = {m: [m.kind, m.told, m.own_heads, *([BIAS_RATE] if m.own_biases else [])] for m in METHODS}
    texts = {m: json.dumps([*about, *kind], sort_keys=True) for m, kind in kinds.items()}
    return {method: hashlib.sha256(text.encode()).hexdigest()[:16] for method, text in texts.items()}


def _parts(tasks: Tasks) -> tuple[list[Row], ...]:
    return tasks.train, tasks.validation, tasks.test


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"
