"""`use_task` around an `await` or a `yield`: each coroutine, generator and thread has its own, or none."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rows_alone import two_tasks
from tiny import MLP
from torch import nn

X = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return two_tasks(MLP())


@pytest.fixture
def which(model):
    with torch.no_grad():
        known = {task: model(X, task_ids=task) for task in ("rte", "sst2")}

    def which() -> str:
        """The task that a call gets which says none."""
        try:
            with torch.no_grad():
                output = model(X)
        except ValueError as error:
            return "refused" if "No task is known" in str(error) else str(error)
        return next(task for task, wanted in known.items() if torch.equal(output, wanted))

    return which


def test_coroutines_that_take_turns(model, which):
    async def request(task: str, turns: int) -> list[str]:
        seen = []
        with model.use_task(task):
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(which())
        await asyncio.sleep(0)
        return [*seen, which()]

    async def main() -> list[list[str]]:
        return await asyncio.gather(request("rte", 2), request("sst2", 4), request("rte", 3))

    assert asyncio.run(main()) == [["rte"] * 2 + ["refused"], ["sst2"] * 4 + ["refused"], ["rte"] * 3 + ["refused"]]
    assert which() == "refused"


def test_a_coroutine_awaits_another_inside_its_block_and_a_task_beside_it_sees_none(model, which):
    async def helper() -> str:
        await asyncio.sleep(0)
        return which()

    async def main() -> tuple[str, str]:
        with model.use_task("rte"):
            return await helper(), await asyncio.create_task(helper())

    assert asyncio.run(main()) == ("rte", "refused")
    with model.use_task("sst2"):
        assert asyncio.run(helper()) == "sst2"


def test_a_block_of_a_suspended_generator_is_not_seen(model, which):
    def answers(task: str):
        with model.use_task(task):
            yield which()
            yield which()

    one, other = answers("rte"), answers("sst2")
    assert (next(one), next(other), next(one), next(other)) == ("rte", "sst2", "rte", "sst2")
    assert which() == "refused"
    with model.use_task("sst2"):
        third = answers("rte")
        assert (next(third), which(), next(third), which()) == ("rte", "sst2", "rte", "sst2")
    assert which() == "refused"
    for generator in (one, third, other):
        assert list(generator) == []
    assert which() == "refused"


@pytest.mark.parametrize("how", ["generator", "class", "stack"])
def test_own_context_managers_around_a_block(model, which, how):
    @contextlib.contextmanager
    def by_generator(task: str):
        with model.use_task(task):
            yield

    class ByClass:
        def __init__(self, task: str) -> None:
            self.block = model.use_task(task)

        def __enter__(self):
            self.block.__enter__()

        def __exit__(self, *error):
            return self.block.__exit__(*error)

    def by_stack(task: str):
        stack = contextlib.ExitStack()
        stack.enter_context(model.use_task(task))
        return stack

    make = {"generator": by_generator, "class": ByClass, "stack": by_stack}[how]
    with make("rte"):
        assert which() == "rte"

    async def request(task: str) -> str:
        with make(task):
            await asyncio.sleep(0)
            return which()

    async def main() -> list[str]:
        return await asyncio.gather(request("rte"), request("sst2"))

    assert asyncio.run(main()) == ["rte", "sst2"]
    assert which() == "refused"


def test_blocks_that_end_out_of_turn_leave_nothing_behind(model, which):
    one, other = model.use_task("rte"), model.use_task("sst2")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert which() == "sst2"
    other.__exit__(None, None, None)
    assert which() == "refused"
    assert model.base_model.task_context.entries.top is None


def test_a_pool_of_threads_sees_no_block_of_its_caller(model, which):
    with ThreadPoolExecutor(2) as pool, model.use_task("rte"):
        assert {pool.submit(which).result() for _ in range(4)} == {"refused"}

        def own(task: str) -> str:
            with model.use_task(task):
                return which()

        assert list(pool.map(own, ["rte", "sst2"] * 4)) == ["rte", "sst2"] * 4

    async def main() -> str:
        with model.use_task("rte"):
            return await asyncio.to_thread(which)

    assert asyncio.run(main()) == "refused"


def test_a_compiled_call_in_a_coroutines_block_is_refused(model):
    fast = torch.compile(model, backend="eager", fullgraph=True)

    async def request() -> None:
        with model.use_task("rte"):
            fast(X)

    with pytest.raises(Exception, match=r"coroutine or a generator|Observed exception"):
        asyncio.run(request())


def test_a_block_that_a_managers_aenter_enters_belongs_to_whoever_entered_it(model, which):
    class Block:
        def __init__(self, task: str) -> None:
            self.block = model.use_task(task)

        async def __aenter__(self) -> None:
            self.block.__enter__()

        async def __aexit__(self, *error) -> None:
            self.block.__exit__(*error)

    async def request(task: str) -> tuple[str, str]:
        async with Block(task):
            await asyncio.sleep(0)
            inside = which()
        return inside, which()

    async def main() -> list[tuple[str, str]]:
        return await asyncio.gather(request("rte"), request("sst2"))

    model.set_task("rte")
    assert asyncio.run(main()) == [("rte", "rte"), ("sst2", "rte")]
