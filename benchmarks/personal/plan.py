"""What is to be run, in an order that makes a fair table of a run cut short: the main lines at one seed, then the next.

for each case:  tune ─▶ many (seed 0) ─▶ many (seed 1) ─▶ ... ─▶ other lines ─▶ tune new ─▶ new (seed 0) ─▶ ... ─▶ cures
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from ..quality.rates import Rates
from ..quality.store import Store
from .lines import CURES, LINES, MORE, WAYS
from .settings import Settings

__all__ = ["Plan", "Result", "Unit"]


@dataclass(frozen=True)
class Unit:
    """One thing to run, and all that its result depends on.

    Attributes:
        setup: fingerprint of the data, the encoder and the sizes.
        stage: tune, many, tune new, or new.
        case: a key of `Settings.cases`.
        line: a key of `lines.LINES` or `lines.WAYS`.
        rates: text of the `Rates`.
        source: of a new task: text of the rates and the steps of the adapter that it starts from; else "none".
        seed: of the parameters and the order of the rows.
        steps: of training; in tuning, the most.
        shots: rows of a new task.
        draw: always 0.
    """

    setup: str
    stage: str
    case: str
    line: str
    rates: str
    source: str
    seed: int
    steps: int
    shots: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Result:
    """What a unit has measured on one task, or in tuning at one number of steps.

    Attributes:
        task: name of the task, or the number of steps.
        accuracy: in per cent; in tuning the mean over tasks.
        auc: in per cent; nan with more than two classes, or where the rows have one.
        loss: mean cross-entropy of the rows.
        parameters: how many numbers learned.
        seconds: CPU time of the whole unit.
    """

    task: str
    accuracy: float
    auc: float
    loss: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Slot:
    """A unit whose rates and steps may still be unknown."""

    stage: str
    case: str
    line: str
    seed: int
    shots: int = 0
    rates: Optional[Rates] = None


class Plan:
    """The units of one setup, and which of them are done."""

    def __init__(self, settings: Settings, setup: str, store: Store) -> None:
        self.settings, self.setup, self.store = settings, setup, store
        self.slots = [slot for case in settings.cases for slot in self._slots(case)]

    def lines(self, case: str) -> list[str]:
        """The lines of a case."""
        return [line for line in LINES if self.settings.cases[case].cures or line not in CURES]

    def _slots(self, case: str) -> Iterator[Slot]:
        s, of = self.settings, self.settings.cases[case]
        few, main = s.seeds[: s.few_seeds], [line for line in self.lines(case) if line not in (*MORE, *CURES)]
        yield from self._many(case, main, s.seeds)
        yield from self._many(case, MORE, few)
        if of.new and s.tune:
            for way in WAYS:
                yield from (Slot("tune new", case, way, s.seeds[0], max(s.shots), rates) for rates in WAYS[way].grid)
        for seed in few if of.new else ():
            for shots in s.shots:
                yield from (
                    Slot("new", case, way, seed, shots) for way in WAYS if WAYS[way].verb or shots == s.shots[0]
                )
        yield from self._many(case, CURES if of.cures else (), few)

    def _many(self, case: str, lines: Sequence[str], seeds: Sequence[int]) -> Iterator[Slot]:
        if self.settings.tune:
            yield from (trial for line in lines for trial in self._trials(case, line))
        yield from (Slot("many", case, line, seed) for seed in seeds for line in lines)

    def _trials(self, case: str, line: str) -> list[Slot]:
        """What chooses a line's rates and steps; without a rate, those of another line or case are taken."""
        of, seed = LINES[line], self.settings.seeds[0]
        if self.settings.cases[case].like or of.like:
            return [Slot("tune", case, line, seed)] if of.method else []
        return [Slot("tune", case, line, seed, rates=rates) for rates in of.grid]

    def _taken(self, slot: Slot) -> Optional[Rates]:
        """The rates of a trial: its own, or those chosen elsewhere; None while these are unknown."""
        if slot.rates is not None:
            return slot.rates
        like = self.settings.cases[slot.case].like
        chosen = self.chosen(like or slot.case, slot.line if like else LINES[slot.line].like)
        return None if chosen is None else chosen[0]

    def next(self, running: Container[Unit] = ()) -> Optional[Unit]:
        """The first unit that is neither done nor running, and has all that it needs; None if there is none now."""
        for slot in self.slots:
            unit = self.unit(slot)
            if unit is not None and unit not in self.store.done and unit not in running and self._has_source(slot):
                return unit
        return None

    def unit(self, slot: Slot) -> Optional[Unit]:
        """The unit of a slot; None while its rates or steps are unknown."""
        s, new = self.settings, slot.stage.endswith("new")
        source = self._source(slot) if new else "none"
        if source is None:
            return None
        if slot.stage.startswith("tune"):
            rates, steps = self._taken(slot), max(s.new_steps if new else s.steps)
            if rates is None:
                return None
        else:
            found = self.chosen_new(slot.case, slot.line) if new else self.chosen(slot.case, slot.line)
            if found is None:
                return None
            rates, steps = found
        return Unit(self.setup, slot.stage, slot.case, slot.line, str(rates), source, slot.seed, steps, slot.shots)

    def _source(self, slot: Slot) -> Optional[str]:
        chosen = self.chosen(slot.case, WAYS[slot.line].source)
        return None if chosen is None else f"{chosen[0]}, {chosen[1]}"

    def _has_source(self, slot: Slot) -> bool:
        """Whether the adapter that a new task starts from is trained: two workers must not train it at once."""
        if not slot.stage.endswith("new"):
            return True
        return self.unit(Slot("many", slot.case, WAYS[slot.line].source, slot.seed)) in self.store.done

    def chosen(self, case: str, line: str) -> Optional[tuple[Rates, int]]:
        """Rates and steps that did best on held-out training rows; None while they are not all tried."""
        trials = self._trials(case, line) if self.settings.tune else []
        if not trials:
            return LINES[line].rates, min(LINES[line].steps, self.settings.steps[-1])
        return self._best(trials)

    def chosen_new(self, case: str, way: str) -> Optional[tuple[Rates, int]]:
        """The same of a way to meet a new task."""
        of, s = WAYS[way], self.settings
        if not s.tune or not of.grid:
            return of.rates, of.steps
        return self._best([Slot("tune new", case, way, s.seeds[0], max(s.shots), rates) for rates in of.grid])

    def _best(self, slots: list[Slot]) -> Optional[tuple[Rates, int]]:
        tried: dict[tuple[Rates, int], Result] = {}
        for slot in slots:
            unit = self.unit(slot)
            if unit is None or unit not in self.store.done:
                return None
            tried |= {(Rates.parse(unit.rates), int(result.task)): result for result in self.store.done[unit]}
        return max(tried, key=lambda key: (tried[key].accuracy, -tried[key].loss))

    def done(self) -> int:
        """How many units are done."""
        return sum(self.unit(slot) in self.store.done for slot in self.slots)
