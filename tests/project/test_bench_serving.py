"""The load test of the servers: ways take turns, warm-up is not counted, and the table has a line for each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no part of the package

from benchmarks import serving
from benchmarks.servers import ask, started


def test_ways_take_turns_after_a_warm_up(monkeypatch):
    asked: list[tuple[str, int]] = []
    ways = [
        serving.Way(name, lambda part, name=name: asked.append((name, part)), [1, 2, 3], clients, os.getpid())
        for name, clients in (("one", 1), ("two", 2))
    ]
    seconds = iter([(0.0, 0.0)] * 2 + [(1.0, 0.3), (2.0, 0.6), (3.0, 0.9), (2.0, 0.6)])
    plain = serving.Way.__call__
    monkeypatch.setattr(serving.Way, "__call__", lambda way, parts=None: (plain(way, parts), next(seconds))[1])
    console = Console(width=120)
    with console.capture() as shown:
        console.print(serving.table(ways, n_requests=3, rounds=2))
    assert asked[:3] == [("one", 1), ("two", 1), ("two", 2)]  # as many as a way has clients
    rounds = ["".join(name[0] for name, _ in asked[n : n + 3]) for n in range(3, len(asked), 3)]
    assert rounds == ["ooo", "ttt", "ooo", "ttt"]
    one, two = (line for line in shown.get().splitlines() if line.strip().startswith(("one", "two")))
    assert " ".join(one.split()) == "one 200 (100 to 300) 2.00 (1.00 to 3.00)"
    assert " ".join(two.split()) == "two 200 (200 to 200) 1.50 (1.50 to 1.50)"


def test_cpu_time_is_that_of_a_process_and_of_what_it_started():
    def work(_: int) -> None:
        sum(range(10**6))

    _, cpu = serving.Way("here", work, [0] * 5, 1, os.getpid())()
    assert cpu > 0


def test_cpu_time_of_this_process_is_not_that_of_the_servers_that_it_started(tmp_path):
    busy = "print('ready', flush=True)\nwhile True: pass"
    with started([sys.executable, "-c", busy], "ready", tmp_path / "log") as (_, process):
        while sum(psutil.Process(process).cpu_times()[:2]) < 0.1:
            pass
        alone = serving.Way("here", lambda _: None, [0], 1, os.getpid(), started=False)._cpu()
        assert serving.Way("all", lambda _: None, [0], 1, os.getpid())._cpu() >= alone + 0.1


def test_a_server_is_asked_and_ends_with_the_block(tmp_path):
    (tmp_path / "answer").write_text('{"tasks": 2}')
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path]
    with started(command, r"port \d+", tmp_path / "log") as (found, _):
        address = f"http://127.0.0.1:{found.removeprefix('port ')}"
        assert ask(f"{address}/answer") == {"tasks": 2}
    with pytest.raises(OSError, match="refused"):
        ask(f"{address}/answer")


def test_a_server_that_ends_at_once_says_why(tmp_path):
    with (
        pytest.raises(RuntimeError, match="no such thing"),
        started([sys.executable, "-c", "raise SystemExit('no such thing')"], "ready", tmp_path / "log"),
    ):
        pass
