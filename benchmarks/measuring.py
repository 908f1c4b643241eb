"""Paired timing in one process and one thread, and bytes kept for the backward.

Variants run in turn, forth and back, so that whatever disturbs the machine disturbs all of them; the figures are
medians, over the rounds, of the ratios within a round. The clock is the CPU time of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["median", "median_ratio", "paired", "peak_bytes", "saved_bytes"]


def paired(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    budget: float,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each function in each round: at least three rounds, then until `budget` seconds have gone."""
    repeats = {name: _repeats(function, clock) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, start = list(functions), time.perf_counter()
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            begin = clock()
            for _ in range(repeats[name]):
                functions[name]()
            times[name].append((clock() - begin) / repeats[name])
        if i >= 2 and time.perf_counter() - start > budget:
            break
    return times


def _repeats(function: Callable[[], Any], clock: Callable[[], float], at_least: float = 0.05) -> int:
    """How often a function runs in so many seconds; its first run is for warming up."""
    function()
    begin, n = clock(), 0
    while n == 0 or clock() - begin < at_least:
        function()
        n += 1
    return n


def median_ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def saved_bytes(function: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.detach())  # kept alive, so that no address is counted twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that a call has allocated at one time."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
