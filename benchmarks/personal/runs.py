"""Carries out one unit: the problem, the encoder, and what is trained and tested with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from filelock import FileLock
from torch import nn

from ..quality.encoder import Features, load_features
from ..quality.rates import Rates
from .films import all_users, folder, many_ratings
from .learner import Learner, auc, chances, train
from .lines import LINES, WAYS, Way
from .plan import Result, Unit
from .problem import Example, Examples, Problem, batches, cut, drawn, for_tuning
from .settings import Settings
from .tenants import INTENTS, make_tenants, read_messages

__all__ = ["PROBLEMS", "Run", "Source"]

Found = tuple[str, float, float, float, int]  # task, accuracy, auc, loss, numbers that learned


@dataclass(frozen=True)
class Source:
    """Where everything comes from, as a worker needs it.

    Attributes:
        data: folder of the data; None for that of the package recbole.
        model: folder of the encoder; empty for MiniLM.
        outputs: folder for hidden states and trained adapters.
        settings: sizes.
        files: of tenants, patterns of the files whose answers are intents.
    """

    data: Path | None
    model: str
    outputs: Path
    settings: Settings
    files: tuple[str, ...] = INTENTS


PROBLEMS: dict[str, Callable[[Source], Problem]] = {
    "films": lambda source: many_ratings(source.data or folder()),
    "all films": lambda source: all_users(source.data or folder()),
    "tenants": lambda source: make_tenants(read_messages(source.data or Path(), source.files)),
}


class Run:
    """The problems, the encoder, and what a unit does with them.

    Attributes:
        setup: fingerprint of all that the units of a run have in common.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.settings = source, source.settings
        self._features: dict[tuple[str, bool], Features] = {}
        self._trained: dict[tuple[str, str, str, int, int], Learner] = {}  # the last one: many new tasks start from it
        names = dict.fromkeys(case.problem for case in self.settings.cases.values())
        most = max(case.rows for case in self.settings.cases.values())
        self.problems = {name: cut(PROBLEMS[name](source), most, self.settings.tested) for name in names}
        about = [dataclasses.astuple(problem) for problem in self.problems.values()]
        sizes = {name: asdict(self.settings)[name] for name in ("max_length", "batch")}
        text = json.dumps([about, sizes, source.model, "feed-forward"], sort_keys=True)
        self.setup = hashlib.sha256(text.encode()).hexdigest()[:8]

    def problem(self, case: str, told: bool = False) -> Problem:
        """What a case trains and tests on."""
        of = self.settings.cases[case]
        problem = cut(self.problems[of.problem], of.rows)
        return problem.named() if told else problem

    def features(self, case: str, told: bool = False) -> Features:
        """Hidden states of all texts of the problem that a case is of; told the name, of those of its known tasks."""
        name, s = case if told else self.settings.cases[case].problem, self.settings
        if (name, told) not in self._features:
            problem = (
                dataclasses.replace(self.problem(case, told), new_train={}, new_test={})
                if told
                else self.problems[name]
            )
            self._features[name, told] = load_features(
                problem.texts, self.source.outputs, self.source.model, max_length=s.max_length, feed_forward=True
            )
        return self._features[name, told]

    def carry_out(self, unit: Unit) -> list[Result]:
        """Train if need be, test, and say what came of each task."""
        begin = time.process_time()
        how = {"tune": self._tune, "many": self._many, "tune new": self._tune_new, "new": self._new}[unit.stage]
        found = list(how(unit))
        seconds = round(time.process_time() - begin, 1)
        return [
            Result(task, round(right, 3), round(area, 3), round(loss, 5), size, seconds)
            for task, right, area, loss, size in found
        ]

    # ------------------------------------------------------------------------------------------------ many tasks
    def _tune(self, unit: Unit) -> Iterator[Found]:
        """Accuracy on held-out training rows after each number of steps, from one run."""
        line, s = LINES[unit.line], self.settings
        problem, rates = for_tuning(self.problem(unit.case, line.told)), Rates.parse(unit.rates)
        learner = Learner(line, rates, self.features(unit.case, line.told), problem.tasks, problem.classes, unit.seed)
        for steps in train(learner, self._batches(problem, unit.seed), s.steps, rates):
            yield _mean(str(steps), list(measure(learner, problem.test)))

    def _many(self, unit: Unit) -> Iterator[Found]:
        line = LINES[unit.line]
        problem = self.problem(unit.case, line.told)
        if line.method is None:
            yield from commonest(problem)
        else:
            yield from measure(self.learner(unit.case, unit.line, unit.rates, unit.steps, unit.seed), problem.test)

    def learner(self, case: str, name: str, text: str, steps: int, seed: int) -> Learner:
        """A line trained on all tasks of a case: read from its file, or trained and written there."""
        line, rates = LINES[name], Rates.parse(text)
        problem = self.problem(case, line.told)
        learner = Learner(line, rates, self.features(case, line.told), problem.tasks, problem.classes, seed)
        path = self.source.outputs / self.setup / f"{case}, {name}, {text}, {steps} steps, seed {seed}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                learner.load(torch.load(path, weights_only=True))
                return learner
            torch.manual_seed(seed)  # of the routers' noise
            for _ in train(learner, self._batches(problem, seed), (steps,), rates):
                pass
            staging = path.with_suffix(f".{os.getpid()}")
            torch.save(learner.state(), staging)
            os.replace(staging, path)
        return learner

    def _batches(self, problem: Problem, seed: int) -> Iterator[list[Example]]:
        return batches([row for rows in problem.train.values() for row in rows], self.settings.batch, str(seed))

    # ------------------------------------------------------------------------------------------------- new tasks
    @cached_property
    def new_parts(self) -> dict[str, tuple[list[str], list[str]]]:
        """Of each problem, the new tasks that settings are tuned on, and those of the tables."""
        s = self.settings
        return {
            name: (list(problem.new_train)[: s.new_tuned], list(problem.new_train)[s.new_tuned :][: s.new_tested])
            for name, problem in self.problems.items()
        }

    def _tune_new(self, unit: Unit) -> Iterator[Found]:
        tuned, _ = self.new_parts[self.settings.cases[unit.case].problem]
        by_steps: dict[int, list[Found]] = {}
        for task in tuned:
            for steps, found in self._meet(unit, task, self.settings.new_steps):
                by_steps.setdefault(steps, []).append(found)
        for steps, found in by_steps.items():
            yield _mean(str(steps), found)

    def _new(self, unit: Unit) -> Iterator[Found]:
        _, tested = self.new_parts[self.settings.cases[unit.case].problem]
        for task in tested:
            yield from (found for _, found in self._meet(unit, task, (unit.steps,)))

    def _meet(self, unit: Unit, task: str, stops: tuple[int, ...]) -> Iterator[tuple[int, Found]]:
        """A copy of what was trained on the known tasks meets a new one."""
        way, rates, problem = WAYS[unit.line], Rates.parse(unit.rates), self.problem(unit.case)
        rates_of_source, _, steps_of_source = unit.source.rpartition(", ")
        key = (unit.case, way.source, rates_of_source, int(steps_of_source), unit.seed)
        if key not in self._trained:
            self._trained = {key: self.learner(*key)}
        learner = self._trained[key].copy()
        rows, tested = drawn(problem.new_train[task], unit.shots), {task: problem.new_test[task]}
        self.give(learner, way, task, rows)
        size = learner.n_trainable if way.verb == "train_all" else _row_size(learner) if way.verb else 0
        if not way.verb:
            ((name, right, area, loss, _),) = measure(learner, tested)
            yield 0, (name, right, area, loss, size)
            return
        torch.manual_seed(unit.seed)
        stream = batches(rows, min(len(rows), self.settings.batch), f"{unit.seed} {task}")
        for steps in train(learner, stream, stops, rates):
            ((name, right, area, loss, _),) = measure(learner, tested)
            yield steps, (name, right, area, loss, size)

    def give(self, learner: Learner, way: Way, task: str, rows: list[Example]) -> None:
        """Adds the task, and says what learns."""
        number = 0  # a shared LoRA asks for no task
        if way.init:
            init = self.nearest(learner, rows) if way.init == "nearest" else way.init
            (number,) = learner.adapter.model.add_tasks([task], init=init)
            if way.verb:
                getattr(learner.adapter.model, way.verb)()
        learner.adapter.task_id = {**learner.adapter.task_id, task: number}
        if way.verb == "train_router_only":
            learner.head.requires_grad_(False)

    @torch.no_grad()
    def nearest(self, learner: Learner, rows: list[Example]) -> str:
        """The known task that, taken for the new one, has the smallest loss on its rows."""
        known = list(learner.adapter.task_id)
        guesses = [dataclasses.replace(row, task=task) for task in known for row in rows]
        found = chances(learner, guesses)
        labels = torch.tensor([row.label for row in guesses])
        losses = nn.functional.nll_loss(found.log(), labels, reduction="none").view(len(known), -1).mean(1)
        return known[int(losses.argmin())]


def commonest(problem: Problem) -> Iterator[Found]:
    """Each task's commonest class in its training rows."""
    for task, rows in problem.test.items():
        counts = Counter(row.label for row in problem.train[task])
        guess = max(sorted(counts), key=counts.__getitem__)
        area = 50.0 if problem.classes == 2 else float("nan")
        yield task, 100 * fmean(row.label == guess for row in rows), area, float("nan"), 0


def measure(learner: Learner, tests: Examples) -> Iterator[Found]:
    """Accuracy, area and loss of each task."""
    rows = [row for found in tests.values() for row in found]
    found_all, begin = chances(learner, rows), 0
    for task, found in tests.items():
        of_task, labels = found_all[begin : begin + len(found)], torch.tensor([row.label for row in found])
        begin += len(found)
        right = float((of_task.argmax(1) == labels).double().mean())
        area = auc(of_task[:, 1], labels) if of_task.shape[1] == 2 else float("nan")
        loss = float(nn.functional.nll_loss(of_task.clamp(min=1e-9).log(), labels))
        yield task, 100 * right, 100 * area, loss, learner.n_trainable


def _mean(name: str, found: list[Found]) -> Found:
    columns = list(zip(*found, strict=True))
    areas = [area for area in columns[2] if area == area]
    area = fmean(areas) if areas else float("nan")
    return name, fmean(columns[1]), area, fmean(columns[3]), columns[4][0]


def _row_size(learner: Learner) -> int:
    """Numbers of one router row, all routers together."""
    routers = {id(m): m for m in learner.adapter.model.modules() if hasattr(m, "module_logits")}
    return sum(router.module_logits.shape[1] for router in routers.values())
