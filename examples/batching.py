"""Dynamic batching: requests that arrive together are answered together, by one call in one worker thread.

    submit(item) ─┐                                      ┌─▶ answer
    submit(item) ─┼─▶ waiting, at most max_queue ─▶ run([item, item, item]) ─┼─▶ answer
    submit(item) ─┘    (max_batch, max_wait)             └─▶ answer

While a batch is computed the next one gathers, so a busy server hardly waits. Knows nothing of models or tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


class RefusedError(Exception):
    """The request was not answered: too many wait already, it waited too long, or the server is stopping."""


@dataclass
class Stats:
    """Counts since the start: requests answered (with an error, too) and refused, batches, and kinds in them."""

    answered: int = 0
    refused: int = 0
    batches: int = 0
    kinds: int = 0


@dataclass(eq=False)
class Waiting:
    """A request in the queue, and when it came, in seconds of the loop's clock."""

    item: Any
    future: asyncio.Future[Any]
    arrived: float

    def give_up(self, why: str) -> bool:
        """Refuse it, unless it was answered or its client has gone; says whether it was refused."""
        waits = not self.future.done()
        if waits:
            self.future.set_exception(RefusedError(why))
        return waits


class Batcher:
    """Collects items and hands them to `run` in batches. Use it as `async with Batcher(...) as batcher`.

    Args:
        run: answers a list of items by a list of as many answers; called in a thread of its own, one batch at a time.
        max_batch: most items of a batch.
        max_wait: seconds that an item waits for company at most.
        max_queue: most items that wait; what comes on top is refused.
        max_delay: seconds beyond `max_wait` after which an item that still waits for its batch is refused.
        kind: what an item is of, its task for one; counted in the stats.
        mixed: whether a batch may hold items of several kinds. False is there to compare with.

    Raises:
        ValueError: `max_batch` or `max_queue` is below 1, `max_wait` below 0, or `max_delay` not above 0.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], list[Any]],
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 256,
        max_delay: float = 30.0,
        kind: Callable[[Any], Hashable] = lambda item: None,
        mixed: bool = True,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or max_wait < 0 or max_delay <= 0:
            raise ValueError(
                "A batcher needs max_batch and max_queue of 1 at least, a max_wait of 0 or more, and a max_delay above "
                f"0; got {max_batch}, {max_queue}, {max_wait} and {max_delay}."
            )
        self.run, self.kind, self.mixed = run, kind, mixed
        self.max_batch, self.max_wait, self.max_queue, self.max_delay = max_batch, max_wait, max_queue, max_delay
        self.stats = Stats()
        self._waiting: list[Waiting] = []
        self._stopping = True

    @property
    def running(self) -> bool:
        """Whether items are taken, and answered."""
        return not self._stopping and not self._serving.done()

    @property
    def waiting(self) -> int:
        """How many items wait for their batch."""
        return len(self._waiting)

    async def __aenter__(self) -> Batcher:
        self._stopping = False
        self._news = asyncio.Event()  # something came, or we stop
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._serving = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Take nothing new, answer what waits, and stop."""
        self._stopping = True
        self._news.set()
        await self._serving
        self._worker.shutdown()

    async def submit(self, item: Any) -> Any:
        """The answer to one item.

        Raises:
            RefusedError: the queue is full, the item has waited for `max_delay`, or the server is stopping.
            Exception: what `run` raised for this item.
        """
        if self._stopping or len(self._waiting) >= self.max_queue:
            self.stats.refused += 1
            raise RefusedError(
                "The server is stopping." if self._stopping else f"{self.max_queue} requests wait already."
            )
        loop = asyncio.get_running_loop()
        waiting = Waiting(item, loop.create_future(), loop.time())
        self._waiting.append(waiting)
        self._news.set()
        late = loop.call_later(self.max_wait + self.max_delay, self._late, waiting)
        try:
            return await waiting.future
        finally:
            late.cancel()

    async def between(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns, called in the thread of the batches while none is computed.

        Raises:
            Exception: what `work` raised.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _late(self, waiting: Waiting) -> None:
        """Refuse an item that still waits; one that is being computed gets its answer."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self.stats.refused += waiting.give_up(
                f"The request has waited for {self.max_delay:g} s, and its turn has not come."
            )
            self._news.set()

    async def _serve(self) -> None:
        while self._waiting or not self._stopping:
            if self._waiting:
                await self._gather()
                await self._answer(self._next_batch())
            else:
                await self._wait_for_news(None)

    async def _gather(self) -> None:
        """Wait until a batch is full, or its first item has waited long enough."""
        loop = asyncio.get_running_loop()
        while 0 < len(self._waiting) < self.max_batch and not self._stopping:
            left = self._waiting[0].arrived + self.max_wait - loop.time()
            if left <= 0:
                return
            await self._wait_for_news(left)

    async def _wait_for_news(self, seconds: float | None) -> None:
        self._news.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    def _next_batch(self) -> list[Waiting]:
        """The oldest items, out of the queue; those whose client has gone are dropped."""
        alive = [waiting for waiting in self._waiting if not waiting.future.done()]
        fitting = [one for one in alive if self.mixed or self.kind(one.item) == self.kind(alive[0].item)]
        batch = fitting[: self.max_batch]
        self._waiting = [waiting for waiting in alive if waiting not in batch]
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        self.stats.batches += 1
        self.stats.answered += len(batch)
        self.stats.kinds += len({self.kind(waiting.item) for waiting in batch})
        outcomes = await asyncio.get_running_loop().run_in_executor(self._worker, self._outcomes, batch)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.future.done():
                continue
            if isinstance(outcome, Exception):
                waiting.future.set_exception(outcome)
            else:
                waiting.future.set_result(outcome)

    def _outcomes(self, batch: list[Waiting]) -> list[Any]:
        """An answer or an exception for each; after a failure each is tried alone, so that one harms no other."""
        try:
            answers = self.run([waiting.item for waiting in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(batch)} items got {len(answers)} answers.")
            return answers
        except Exception as error:
            return [error] if len(batch) == 1 else [self._outcomes([waiting])[0] for waiting in batch]
