"""Each row of a mixed batch against the row alone, with a batch of one task as the control."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adapters import adapt
from torch import nn

from peft_poly import PolyConfig

TASKS = ["rte", "sst2"]


def two_tasks(base: nn.Module, **settings) -> nn.Module:
    settings = {
        "target_modules": "all-linear",
        "task_names": TASKS,
        "init_weights": False,
        "lora_alpha": 128,
        **settings,
    }
    return adapt(base.eval(), PolyConfig(**settings))


def same_as_alone(call: Callable[..., torch.Tensor], ids: list[str], *rows: torch.Tensor) -> None:
    """`call(*rows, task_ids=...)` gives a row for each of `rows`."""
    with torch.no_grad():
        for _ in range(2):  # the first call of a kind is followed, the others go by what came out
            mixed = call(*rows, task_ids=ids)
            for row, task in enumerate(ids):
                alone = call(*(value[row : row + 1] for value in rows), task_ids=task)[0]
                torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)
        one = call(*rows, task_ids=ids[0])
        for row in range(len(ids)):
            alone = call(*(value[row : row + 1] for value in rows), task_ids=ids[0])[0]
            torch.testing.assert_close(one[row], alone, atol=1e-5, rtol=1e-5)
        assert any(not torch.allclose(one[row], mixed[row], atol=1e-4) for row in range(len(ids)))  # tasks differ
