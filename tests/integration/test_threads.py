"""Threads that serve different tasks on one model never see each other's, forward, backward or in generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from adapters import GATES, adapt, poly
from peft import inject_adapter_in_model
from tiny import CASES, MLP, TASKS, first, naive_merge
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_poly import PolyConfig, use_task

ROUNDS = 20


def at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    """Run functions in threads that start together; their results, or the first exception."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = functions[index]()
        except Exception as error:  # handed to the caller
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


class Meeting(nn.Module):
    """Makes the threads wait for each other in the middle of every forward, so that their calls do overlap."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.barrier: threading.Barrier | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.barrier is not None:
            self.barrier.wait(timeout=60)
        return self.inner(*args, **kwargs)


def meeting_model(**settings: Any) -> tuple[peft.PeftModel, Meeting]:
    base = MLP()
    base.act = Meeting(base.act)
    settings = {"n_splits": 2, **settings}
    config = PolyConfig(target_modules=["lin0", "lin1"], task_names=TASKS, init_weights=False, **settings)
    model = adapt(base, config)
    return model, base.act


def rounds(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [call() for _ in range(ROUNDS)]


# --------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("settings", [{}, GATES], ids=["poly", "gates"])
@pytest.mark.parametrize("how", ["task_ids", "use_task", "mixed batches"])
def test_three_threads_with_three_tasks_on_one_model(how, settings):
    model, meeting = meeting_model(**settings)
    x = torch.randn(3, 5, 16)
    dense = [naive_merge(model, task).get_base_model() for task in range(3)]
    given = [[0, 1, 2], [1, 2, 0], [2, 2, 1]] if how == "mixed batches" else [0, "sst2", [2, 2, 2]]
    rows = given if how == "mixed batches" else [[task] * 3 for task in range(3)]
    meeting.barrier = threading.Barrier(3)

    def call(task_ids: Any) -> torch.Tensor:
        if how != "use_task":
            return model(x, task_ids=task_ids)
        with model.use_task(task_ids):
            return model(x)

    results = at_once([partial(rounds, partial(call, task_ids)) for task_ids in given])
    for tasks, outputs in zip(rows, results, strict=True):
        wanted = torch.cat([dense[task](x[row : row + 1]) for row, task in enumerate(tasks)])
        for output in outputs:
            torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0][0], results[1][0], atol=1e-2)


def test_three_threads_on_an_injected_model():
    model = CASES["llama"].make()
    inject_adapter_in_model(poly("llama", task_names=TASKS), model)
    inputs = CASES["llama"].inputs()
    model.eval()

    def call(task: int) -> torch.Tensor:
        with use_task(model, task):
            return first(model(**inputs))

    results = at_once([partial(rounds, partial(call, task)) for task in range(3)])
    for task, outputs in enumerate(results):
        wanted = first(naive_merge(model, task)(**inputs))
        for output in outputs:
            torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


def test_a_thread_that_fails_does_not_disturb_the_others():
    model, meeting = meeting_model()
    x = torch.randn(3, 5, 16)

    def failing() -> list[torch.Tensor]:
        outputs = rounds(lambda: model(x, task_ids="rte"))
        for _ in range(ROUNDS):
            with pytest.raises(ValueError, match="entries but"):
                model(x, task_ids=[0, 1])
            with pytest.raises(ValueError, match="No task is known"):
                model(x)
        return outputs

    wanted = [naive_merge(model, task).get_base_model()(x) for task in range(3)]
    meeting.barrier = threading.Barrier(2)
    failed, served = at_once([failing, lambda: rounds(lambda: model(x, task_ids="boolq"))])
    for task, outputs in ((0, failed), (2, served)):
        for output in outputs:
            torch.testing.assert_close(output, wanted[task], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- generate
def test_three_threads_generate_for_three_tasks():
    base = CASES["llama"].make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.6)  # else all tasks would say the same
    model = adapt(base, poly("llama", task_names=TASKS, lora_alpha=40))
    prompt = torch.randint(3, 61, (1, 5)).repeat(2, 1)
    settings = {"input_ids": prompt, "max_new_tokens": 3, "do_sample": False}
    modes = [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}]

    def serve(task: int) -> list[torch.Tensor]:
        return [model.generate(**settings, **modes[turn % 3], task_ids=task) for turn in range(ROUNDS)]

    def serve_mixed() -> list[torch.Tensor]:
        return [model.generate(**settings, **modes[turn % 3], task_ids=[2, 1]) for turn in range(ROUNDS)]

    *results, mixed = at_once([partial(serve, 0), partial(serve, 1), partial(serve, 2), serve_mixed])
    wanted = [[naive_merge(model, task).generate(**settings, **mode) for mode in modes] for task in range(3)]
    assert len({tuple(wanted[task][0][0].tolist()) for task in range(3)}) == 3
    for task, outputs in enumerate(results):
        for turn, output in enumerate(outputs):
            assert output.tolist() == wanted[task][turn % 3].tolist()
    for turn, output in enumerate(mixed):
        half = len(output) // 2
        assert output[:half].tolist() == wanted[2][turn % 3][:half].tolist()
        assert output[half:].tolist() == wanted[1][turn % 3][half:].tolist()


# -------------------------------------------------------------------------------------------------------- backward
class Checkpointed(nn.Module):
    """A block in a checkpoint, in another one if `nested`; the threads meet while they recompute the outer one."""

    def __init__(self, nested: bool, use_reentrant: bool | None) -> None:
        super().__init__()
        self.block, self.nested, self.use_reentrant = MLP(), nested, use_reentrant
        self.barrier: threading.Barrier | None = None

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        if self.barrier is not None and torch._C._current_graph_task_id() != -1:
            self.barrier.wait(timeout=60)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant) if self.nested else self.block(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.outer, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("nested", [False, True], ids=["one checkpoint", "nested"])
def test_three_threads_recompute_each_their_own_task(nested, use_reentrant):
    base = Checkpointed(nested, use_reentrant)
    config = PolyConfig(target_modules=["lin0", "lin1"], n_splits=2, task_names=TASKS, init_weights=False)
    config.router_noise = False  # the generator of random numbers is one for all threads
    model = adapt(base, config).train()
    given = ["rte", [1, 2, 1], 2]

    def gradient(task_ids: Any) -> torch.Tensor | None:
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(x, task_ids=task_ids).pow(2).sum().backward()
        return x.grad

    wanted = [gradient(task_ids) for task_ids in given]
    base.barrier = threading.Barrier(3)
    for _ in range(3):
        got = at_once([partial(gradient, task_ids) for task_ids in given])
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
    assert not torch.allclose(wanted[0], wanted[2], atol=1e-3)
    assert model.base_model.task_context.entries.top is None
