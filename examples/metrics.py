"""What `serve.py` tells a monitoring system: Prometheus text, of the requests, the batches and the process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from batching import Batcher
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class BatcherCollector(Collector):
    """The counts that a batcher keeps."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def collect(self) -> Iterator[Metric]:
        """Each count, as it is now."""
        stats = self.batcher.stats
        yield CounterMetricFamily("serve_answered", "Requests that a batch answered.", value=stats.answered)
        yield CounterMetricFamily(
            "serve_refused", "Requests that were refused or waited too long.", value=stats.refused
        )
        yield CounterMetricFamily("serve_batches", "Batches that were computed.", value=stats.batches)
        yield CounterMetricFamily("serve_batch_tasks", "Tasks in them, the sum over batches.", value=stats.kinds)
        yield GaugeMetricFamily("serve_waiting", "Requests that wait for their batch.", value=self.batcher.waiting)


class Measured:
    """An application (ASGI) whose requests are timed, by their route and the status of the answer.

    A path that is no route counts as `other`: a label must not have as many values as clients can think of.
    """

    def __init__(self, app: Any, registry: CollectorRegistry) -> None:
        self.app = app
        self.seconds = Histogram(
            "serve_request_seconds", "From a request to its answer.", ["route", "status"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.seconds.labels(route, status).observe(time.perf_counter() - start)


def registry_of(batcher: Batcher) -> CollectorRegistry:
    """A registry of its own with the batcher's counts, and the memory and CPU time of the process."""
    registry = CollectorRegistry()
    registry.register(BatcherCollector(batcher))
    ProcessCollector(registry=registry)
    return registry
