"""Carries out one unit: the tasks, the encoder, and what is trained and tested with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from filelock import FileLock

from peft_poly.layer import PolyLayer

from .data import Row, Tasks, batches, draw, load_tasks
from .encoder import Features, load_features
from .lines import FEW, MANY, Way
from .methods import Adapter, build
from .ranker import scores
from .rates import Rates
from .settings import Settings
from .store import Result, Unit
from .training import accuracy, train

__all__ = ["Run", "Source"]

Found = Iterator[tuple[str, float, float, int]]  # task, accuracy, loss, numbers that learned


@dataclass(frozen=True)
class Source:
    """Where everything comes from, as a worker needs it.

    Attributes:
        data: folder of the tasks.
        held_out: names of the tasks that come later.
        model: folder of the encoder; empty for MiniLM.
        outputs: folder for hidden states and trained adapters.
        settings: sizes.
    """

    data: Path
    held_out: tuple[str, ...]
    model: str
    outputs: Path
    settings: Settings


class Material(NamedTuple):
    """Tasks, and the hidden states of their texts under the layers that are adapted."""

    tasks: Tasks
    features: Features


class Run:
    """The tasks, the encoder, and what a unit does with them.

    Attributes:
        tasks: the rows of all tasks.
        features: their hidden states.
        setup: fingerprint of all that the units of a run have in common.
    """

    def __init__(self, source: Source) -> None:
        self.outputs, self.settings = source.outputs, source.settings
        self._source = source
        self._materials: dict[tuple[bool, bool], Material] = {}
        self.tasks, self.features = self._material(instruction=True, all_layers=False)
        rows = [row for rows in (*self.tasks.known.values(), *self.tasks.held_out.values()) for row in rows]
        about = [[dataclasses.astuple(row) for row in rows], list(self.tasks.known), self.features.fingerprint]
        shared = {name: value for name, value in asdict(self.settings).items() if name not in Settings.OF_UNITS}
        self.setup = hashlib.sha256(json.dumps([about, shared], sort_keys=True).encode()).hexdigest()[:8]

    def carry_out(self, unit: Unit) -> list[Result]:
        """Train if need be, test, and say what came of each task."""
        begin = time.process_time()
        found = list(self._few(unit) if unit.stage.endswith("few") else self._many(unit))
        seconds = round(time.process_time() - begin, 1)
        return [Result(task, round(right, 3), round(loss, 5), size, seconds) for task, right, loss, size in found]

    def material(self, line: str) -> Material:
        """What a line of the multi-task tables is trained and tested on."""
        return self._material(MANY[line].instruction, MANY[line].all_layers)

    def _material(self, instruction: bool, all_layers: bool) -> Material:
        key = (instruction, all_layers)
        if key not in self._materials:
            source, s = self._source, self.settings
            tasks = _cut(load_tasks(source.data, source.held_out, instruction), s)
            rows = [row for rows in (*tasks.known.values(), *tasks.held_out.values()) for row in rows]
            texts = [text for row in rows for text in (row.text, *row.options)]
            n_upper = 0 if all_layers else s.upper_layers
            features = load_features(texts, source.outputs, source.model, n_upper, s.max_length)
            self._materials[key] = Material(tasks, features)
        return self._materials[key]

    def file(self, line: str, rates: str, seed: int, steps: int) -> Path:
        """Where a trained adapter is kept."""
        return self.outputs / self.setup / f"{line}, {rates}, {steps} steps, seed {seed}.pt"

    def adapter(self, line: str, text: str, seed: int, steps: int) -> Adapter:
        """A method trained on all tasks with the rates of `text`: read from its file, or trained and written there."""
        (tasks, features), rates = self.material(line), Rates.parse(text)
        names = list(tasks.known)
        adapter = build(MANY[line].method, rates.scale, features.upper, names, seed)
        if not adapter.parameters():
            return adapter
        path = self.file(line, text, seed, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of a lost file: two workers that start from it would both train it
            if path.exists():
                adapter.model.load_state_dict(torch.load(path, weights_only=True), strict=False)
                return adapter
            s = self.settings
            torch.manual_seed(seed)  # of the routers' noise
            rows = batches(tasks, steps, s.tasks_per_step, s.rows_per_task, seed)
            train(adapter, features, rows, steps, rates)
            learned = {name: p.detach() for name, p in adapter.model.named_parameters() if p.requires_grad}
            staging = path.with_suffix(f".{os.getpid()}")
            torch.save(learned, staging)
            os.replace(staging, path)
        return adapter

    def _many(self, unit: Unit) -> Found:
        adapter = self.adapter(unit.line, unit.rates, unit.seed, unit.steps)
        split = "validation" if unit.stage == "tune" else "test"
        tasks, features = self.material(unit.line)
        for task in tasks.known:
            yield task, *accuracy(adapter, features, tasks.rows(task, split)), adapter.n_trainable

    def _few(self, unit: Unit) -> Found:
        """Each held-out task by itself: a copy of what was trained on the known tasks meets it."""
        way, rates, s = FEW[unit.line], Rates.parse(unit.rates), self.settings
        if way.source:
            trained = self.adapter(way.source, unit.source, unit.seed, s.steps * MANY[way.source].times)
        else:
            trained = build(way.method, rates.scale, self.features.upper, list(self.tasks.known), unit.seed)
        split = "validation" if unit.stage == "tune few" else "test"
        for task in self.tasks.held_out:
            rows = draw(self.tasks, task, unit.shots, unit.draw) if unit.shots else []
            adapter = self.meet(way, trained.copy(), task, rows)
            size = adapter.n_trainable if way.verb != "train_router_only" else _row_size(adapter)
            if way.learns:
                name = f"{unit.seed} {unit.draw} {task}"
                torch.manual_seed(unit.seed)
                train(adapter, self.features, _passes(rows, unit.steps, s.few_batch, name), unit.steps, rates)
            yield task, *accuracy(adapter, self.features, self.tasks.rows(task, split)), size if way.learns else 0

    def meet(self, way: Way, adapter: Adapter, task: str, rows: Sequence[Row]) -> Adapter:
        """Gives the adapter the new task, and says what of it learns."""
        if way.init:
            init = self.nearest(adapter, rows) if way.init == "nearest" else way.init
            (number,) = adapter.model.add_tasks([task], init=init)
            getattr(adapter.model, way.verb)()
        else:
            number = 0  # a LoRA asks for no task
        adapter.task_id = {**adapter.task_id, task: number}
        return adapter

    @torch.no_grad()
    def nearest(self, adapter: Adapter, rows: Sequence[Row]) -> str:
        """The known task that, taken for the new one, has the smallest loss on its rows."""
        adapter.model.eval()
        losses = {}
        for name, number in adapter.task_id.items():
            values, labels = scores(adapter.encode, self.features, rows, {rows[0].task: number})
            losses[name] = torch.nn.functional.cross_entropy(values, labels).item()
        return min(losses, key=losses.__getitem__)


def _cut(tasks: Tasks, settings: Settings) -> Tasks:
    """Only the rows that a run uses."""
    most = {"train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows}

    def kept(names: dict[str, list[Row]]) -> dict[str, list[Row]]:
        return {name: [row for split in most for row in tasks.rows(name, split, most[split])] for name in names}

    return dataclasses.replace(tasks, known=kept(tasks.known), held_out=kept(tasks.held_out))


def _passes(rows: Sequence[Row], steps: int, batch: int, name: str) -> Iterator[list[Row]]:
    """Batches of a few rows, pass after pass, each in an order of its own."""
    random, left = Random(f"passes {name}"), []
    for _ in range(steps):
        if len(left) < min(batch, len(rows)):
            left = random.sample(list(rows), len(rows))
        taken, left = left[:batch], left[batch:]
        yield taken


def _row_size(adapter: Adapter) -> int:
    """Numbers of one router row, all routers together: what learns for one task in MHR-z."""
    routers = {id(r): r for m in adapter.model.modules() if isinstance(m, PolyLayer) for r in m.poly_router.values()}
    return sum(router.module_logits.shape[1] for router in routers.values())
