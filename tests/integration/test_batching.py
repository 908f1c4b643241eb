"""The dynamic batching of `examples/serve.py`, with a function in place of a model.

No test waits for a clock: where time matters, it is zero or far longer than any test takes, and gates are events.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LONG = 200.0  # seconds, more than a test may take


@pytest.fixture
def batching(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("batching")


class Run:
    """Answers an item by its negative, notes the batches, and may be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(LONG)
        if 13 in items:
            raise ValueError("unlucky")
        return [-item for item in items]

    async def hold(self, batcher) -> asyncio.Task:
        """Send an item and come back when it is being computed, which `self.gate.set()` lets go on."""
        self.gate.clear()
        self.entered.clear()
        task = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(self.entered.wait, LONG)
        return task


async def submit_all(batcher, items) -> list:
    return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)


def answers(batching, run, items, **settings) -> list:
    async def session():
        async with batching.Batcher(run, **settings) as batcher:
            return await submit_all(batcher, items)

    return asyncio.run(session())


def test_items_that_arrive_together_are_one_batch(batching):
    run = Run()
    assert answers(batching, run, [1, 2, 3], max_batch=3, max_wait=LONG) == [-1, -2, -3]
    assert run.batches == [[1, 2, 3]]


def test_a_lone_item_does_not_wait_for_a_full_batch(batching):
    assert answers(batching, Run(), [1], max_batch=3, max_wait=0.001) == [-1]


def test_a_batch_is_never_larger_than_the_maximum(batching):
    run = Run()
    assert answers(batching, run, range(1, 6), max_batch=2, max_wait=0.0) == [-1, -2, -3, -4, -5]
    assert run.batches == [[1, 2], [3, 4], [5]]


def test_items_gather_while_a_batch_is_computed_in_one_thread_beside_the_loop(batching):
    run = Run()

    async def session():
        async with batching.Batcher(run, max_wait=0.0) as batcher:
            first = await run.hold(batcher)
            rest = [asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)]
            while batcher.waiting < 3:
                await asyncio.sleep(0)  # the loop runs on although the batch is held up
            run.gate.set()
            return await asyncio.gather(first, *rest)

    assert asyncio.run(session()) == [0, -1, -2, -3]
    assert run.batches == [[0], [1, 2, 3]]
    assert len(run.threads) == 1
    assert threading.current_thread().name not in run.threads


def test_an_item_that_fails_harms_no_other(batching):
    *good, bad, last = answers(batching, Run(), [1, 2, 13, 4], max_batch=4, max_wait=LONG)
    assert (good, last) == ([-1, -2], -4)
    assert isinstance(bad, ValueError)


def test_a_wrong_number_of_answers_is_an_error_and_not_a_hang(batching):
    found = answers(batching, lambda items: [1] * 3, [1, 2], max_batch=2, max_wait=LONG)
    assert [str(error) for error in found] == ["1 items got 3 answers."] * 2


def test_a_full_queue_refuses_and_serves_on(batching):
    run = Run()

    async def session():
        async with batching.Batcher(run, max_queue=2, max_wait=0.0) as batcher:
            held = await run.hold(batcher)
            waiting = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
            while batcher.waiting < 2:
                await asyncio.sleep(0)
            with pytest.raises(batching.RefusedError, match="2 requests wait already"):
                await batcher.submit(3)
            run.gate.set()
            await asyncio.gather(held, *waiting)
            assert await batcher.submit(4) == -4
            return batcher.stats

    stats = asyncio.run(session())
    assert (stats.answered, stats.refused) == (4, 1)


def test_an_item_whose_client_has_gone_is_not_computed(batching):
    run = Run()

    async def session():
        async with batching.Batcher(run, max_wait=0.0) as batcher:
            held = await run.hold(batcher)
            gone, stays = (asyncio.create_task(batcher.submit(item)) for item in (1, 2))
            while batcher.waiting < 2:
                await asyncio.sleep(0)
            gone.cancel()
            held.cancel()  # while it is being computed
            run.gate.set()
            return await stays

    assert asyncio.run(session()) == -2
    assert run.batches == [[0], [2]]


def test_stopping_answers_what_waits_and_takes_nothing_new(batching):
    run = Run()

    async def session():
        async with batching.Batcher(run, max_batch=9, max_wait=LONG) as batcher:
            waiting = asyncio.create_task(submit_all(batcher, [1, 2]))
            while batcher.waiting < 2:
                await asyncio.sleep(0)
            assert batcher.running
        assert not batcher.running
        with pytest.raises(batching.RefusedError, match="stopping"):
            await batcher.submit(3)
        return await waiting

    assert asyncio.run(session()) == [-1, -2]


def test_batches_of_one_kind_take_the_oldest_kind_first_and_lose_nobody(batching):
    run = Run()
    found = answers(batching, run, range(1, 8), kind=lambda item: item % 3, mixed=False, max_batch=2, max_wait=0.0)
    assert found == [-1, -2, -3, -4, -5, -6, -7]
    assert run.batches == [[1, 4], [2, 5], [3, 6], [7]]


def test_the_stats_count_batches_and_the_kinds_in_them(batching):
    async def session():
        async with batching.Batcher(Run(), kind=lambda item: item % 2, max_batch=3, max_wait=0.0) as batcher:
            await submit_all(batcher, range(1, 5))
            return batcher.stats

    assert asyncio.run(session()) == batching.Stats(answered=4, refused=0, batches=2, kinds=3)


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait": -1}, {"max_delay": 0}])
def test_settings_that_cannot_serve_are_refused(batching, settings):
    with pytest.raises(ValueError, match="1 at least"):
        batching.Batcher(Run(), **settings)


def test_an_item_that_waits_too_long_is_refused_and_those_beside_it_are_not(batching):
    run = Run()

    async def session():
        async with batching.Batcher(run, max_wait=0.0, max_delay=0.001) as batcher:
            held = await run.hold(batcher)  # what is being computed has waited enough
            with pytest.raises(batching.RefusedError, match=r"has waited for 0\.001 s"):
                await batcher.submit(1)
            run.gate.set()
            assert await held == 0
            return batcher.stats, await batcher.submit(2)

    stats, answer = asyncio.run(session())
    assert answer == -2
    assert (stats.answered, stats.refused) == (2, 1)
    assert run.batches == [[0], [2]]
