"""What is to be run, in an order that makes a fair table of a run cut short: all methods at one seed, then the next.

    tune ─▶ many (seed 0) ─▶ many (seed 1) ─▶ ... ─▶ tune few ─▶ few (seed 0) ─▶ few (seed 1) ─▶ ...

Rates come from the tuning runs, so a unit can only be named once those are done.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Optional

from .lines import FEW, MANY, MATTER
from .rates import Rates
from .settings import Settings
from .store import Result, Store, Unit

__all__ = ["Plan"]


@dataclass(frozen=True)
class Slot:
    """A unit whose rates may still be unknown; `rates` is given where it is a trial of them."""

    stage: str
    line: str
    seed: int
    shots: int = 0
    draw: int = 0
    rates: Optional[Rates] = None


class Plan:
    """The units of one setup, and which of them are done."""

    def __init__(self, settings: Settings, setup: str, store: Store) -> None:
        self.settings, self.setup, self.store = settings, setup, store
        self.slots = list(self._slots())

    def _slots(self) -> Iterator[Slot]:
        s = self.settings
        for table in s.only:
            yield from self._many(table)
        if s.only:
            return
        if s.tune:
            for line in MANY:
                for rates in MANY[line].grid:
                    yield Slot("tune", line, s.tune_seed, rates=rates)
        yield from self._many("main")
        if s.tune:
            for way in FEW:
                for rates in FEW[way].grid:
                    yield Slot("tune few", way, s.seeds[0], s.shots[0], s.draws, rates)  # a draw that no table has
        yield from self._few("main", s.seeds[:1])
        if s.extra:
            yield from self._many("long")
        yield from self._few("main", s.seeds[1:])
        if s.extra:
            yield from self._many("deep")
            yield from self._many("bare")
            yield from self._many("longer")
            yield from self._few("longer", s.seeds)

    def _many(self, table: str) -> Iterator[Slot]:
        s = self.settings
        for seed in sorted({*s.seeds, *s.more_seeds}):
            for line in MANY:
                if MANY[line].table == table and seed in ((*s.seeds, *s.more_seeds) if line in MATTER else s.seeds):
                    yield Slot("many", line, seed)

    def _few(self, table: str, seeds: Sequence[int]) -> Iterator[Slot]:
        ways = [way for way in FEW if FEW[way].table == table]
        for seed in seeds:
            yield from (Slot("few", way, seed) for way in ways if not FEW[way].learns)
            for draw, shots in product(range(self.settings.draws), self.settings.shots):
                yield from (Slot("few", way, seed, shots, draw) for way in ways if FEW[way].learns)

    def next(self, running: Container[Unit] = ()) -> Optional[Unit]:
        """The first unit that is neither done nor running, and has all that it needs; None if there is none now."""
        for slot in self.slots:
            unit = self.unit(slot)
            if unit is not None and unit not in self.store.done and unit not in running and self._has_source(slot):
                return unit
        return None

    def unit(self, slot: Slot) -> Optional[Unit]:
        """The unit of a slot; None while its rates are unknown."""
        few = slot.stage.endswith("few")
        rates = slot.rates or self.rates(slot.line, few)
        source = self.rates(FEW[slot.line].source) if few and FEW[slot.line].source else Rates()
        if rates is None or source is None:
            return None
        s = self.settings
        steps = {"tune": s.tune_steps, "many": s.steps}.get(slot.stage, s.few_steps)
        if slot.stage == "many":
            steps *= MANY[slot.line].times
        return Unit(self.setup, slot.stage, slot.line, str(rates), str(source), slot.seed, steps, slot.shots, slot.draw)

    def _has_source(self, slot: Slot) -> bool:
        """Whether the adapter that a few-shot unit starts from is trained: two workers must not train it at once."""
        source = FEW[slot.line].source if slot.stage.endswith("few") else ""
        if not source:
            return True
        return self.unit(Slot("many", source, slot.seed)) in self.store.done

    def rates(self, line: str, few: bool = False) -> Optional[Rates]:
        """The rates with the highest mean accuracy on validation rows; None while they are not all tried."""
        lines = FEW if few else MANY
        chosen = lines[line].like or line
        if not self.settings.tune or not lines[chosen].grid:
            return lines[chosen].rates
        tried = self.tried(chosen, few)
        if any(results is None for results in tried.values()):
            return None
        return max(tried, key=lambda rates: _quality(tried[rates]))

    def tried(self, line: str, few: bool = False) -> dict[Rates, Optional[list[Result]]]:
        """What each setting of a line's grid came to; None where it has not been run."""
        s = self.settings
        head = ("tune few", line, s.seeds[0], s.shots[0], s.draws) if few else ("tune", line, s.tune_seed, 0, 0)
        units = {rates: self.unit(Slot(*head, rates)) for rates in (FEW if few else MANY)[line].grid}
        return {rates: self.store.done.get(unit) if unit else None for rates, unit in units.items()}

    def done(self) -> int:
        """How many units are done."""
        return sum(self.unit(slot) in self.store.done for slot in self.slots)


def _quality(results: Optional[list[Result]]) -> tuple[float, float]:
    assert results is not None
    return fmean(r.accuracy for r in results), -fmean(r.loss for r in results)
