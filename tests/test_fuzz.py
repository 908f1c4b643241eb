"""Random models, adapters, doors and lives against a naive loop: each row alone, in a dense model of its task.

A call may be refused where its rows cannot be known, with the message that says so; it may never be wrong. Some seconds
in the suite; `FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import os
import threading

import peft
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import naive_merge
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_poly import PolyConfig

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
D = 8
REFUSED = "exclude_modules"
HOWS = ("plain", "sequence first", "flattened", "windows", "tied", "checkpointed", "reentrant")


class Net(nn.Module):
    """A stack of adapted layers, each called in its own way: `(b, ..., D) -> (b, ..., D)`."""

    def __init__(self, hows: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hows = hows
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in hows)
        for before, (how, layer) in enumerate(zip(hows[1:], list(self.layers)[:-1], strict=True)):
            if how == "tied":
                self.layers[before + 1] = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for how, layer in zip(self.hows, self.layers, strict=True):
            x = torch.tanh(self.through(how, layer, x)) + 0.5 * x
        return x

    def through(self, how: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if how in ("checkpointed", "reentrant") and torch.is_grad_enabled():
            return checkpoint(layer, x, use_reentrant=how == "reentrant")
        if how == "sequence first" and x.dim() > 2:
            return layer(x.transpose(0, 1)).transpose(0, 1)
        if how == "flattened":
            return layer(x.reshape(-1, D)).view(x.shape)
        if how == "windows" and x.dim() > 2 and x.shape[1] % 2 == 0:
            return layer(x.reshape(x.shape[0] * 2, -1, D)).view(x.shape)
        return layer(x)


KINDS = (
    {"n_skills": 3}, {"n_skills": 2, "n_splits": 2}, {"n_skills": 4, "n_splits": 4, "router_granularity": "block"},
    {"poly_type": "gates"}, {"poly_type": "gates", "router_granularity": "model"}, {"n_skills": 1},
)  # fmt: skip


def make(hows, kind, n_tasks, seed):
    """An adapted net in eval mode, with routers that tell their tasks apart."""
    names = [f"t{task}" for task in range(n_tasks)]
    config = PolyConfig(
        r=2,
        lora_alpha=4,
        task_names=names,
        target_modules=r"layers\.\d+",
        init_weights=False,
        router_noise=False,
        **kind,
    )
    model = peft.get_peft_model(Net(hows, seed).double(), config, autocast_adapter_dtype=False).double().eval()
    stir(model, seed)
    return model


def stir(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise, alpha=2.0 if "router" in name else 0.2)


def alone(model, x, tasks):
    """Each row in the dense model of its task."""
    dense = {task: naive_merge(model.get_base_model(), model.task_id(task)) for task in set(tasks)}
    with torch.no_grad():
        return torch.cat([dense[task](x[row : row + 1]) for row, task in enumerate(tasks)])


def as_ids(model, tasks, form):
    ids = [model.task_id(task) for task in tasks]
    return {"names": tasks, "ids": ids, "tensor": torch.tensor(ids)}[form]


def called(model, x, tasks, door, form):
    """The outputs, through a door."""
    given = as_ids(model, tasks, form)
    if door == "task_ids":
        return model(x, task_ids=given)
    if door == "use_task":
        with model.use_task(given):
            return model(x)
    if door == "serving":
        with model.serving(max_tasks=2), torch.no_grad():
            return [model(x, task_ids=given) for _ in range(3)][-1]
    if door == "thread":
        found = []
        other = threading.Thread(target=lambda: found.append(model(x, task_ids=given)))
        with model.use_task(tasks[0]):
            other.start()
            other.join()
        return found[0] if found else model(x, task_ids=given)  # the refusal, here
    raise AssertionError(door)


lives = st.lists(st.sampled_from(["add", "remove", "rename", "save", "write", "merge", "nothing"]), max_size=3)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    hows=st.lists(st.sampled_from(HOWS), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    n_tasks=st.integers(1, 4),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    life=lives,
    data=st.data(),
)
def test_rows_are_what_they_are_alone_or_refused(hows, kind, n_tasks, shape, life, data, tmp_path_factory):
    seed = data.draw(st.integers(0, 999))
    model = make(hows, kind, n_tasks, seed)
    for turn, step in enumerate(["nothing", *life]):
        model = lived(model, step, hows, seed, data, tmp_path_factory)
        rows = data.draw(st.integers(1, 4))
        tasks = data.draw(st.lists(st.sampled_from(model.task_names), min_size=rows, max_size=rows))
        x = torch.randn(rows, *shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + turn))
        door = data.draw(st.sampled_from(["task_ids", "use_task", "serving", "thread"]))
        form = data.draw(st.sampled_from(["names", "ids", "tensor"]))
        wanted = alone(model, x, tasks)
        try:
            with torch.set_grad_enabled(data.draw(st.booleans())):
                out = called(model, x, tasks, door, form)
        except ValueError as error:
            refusal = str(error)
        else:
            torch.testing.assert_close(out.detach(), wanted, rtol=1e-8, atol=1e-10)
            continue
        assert REFUSED in refusal
        assert len(set(tasks)) > 1, "one task is never refused"


def lived(model, step, hows, seed, data, tmp_path_factory):
    """The model after a step of its life."""
    if step == "add":
        model.add_tasks([f"new{len(model.task_names)}-{data.draw(st.integers(0, 10**6))}"])
    elif step == "remove" and len(model.task_names) > 1:
        model.remove_tasks(data.draw(st.sampled_from(model.task_names)))
    elif step == "rename":
        model.base_model.rename_task(0, f"renamed{data.draw(st.integers(0, 10**6))}")
    elif step == "write":
        stir(model, seed + 1)
    elif step == "merge":
        task = data.draw(st.sampled_from(model.task_names))
        x = torch.randn(2, D, dtype=torch.float64)
        wanted = alone(model, x, [task, task])
        model.merge_adapter(task=task)
        with torch.no_grad():
            torch.testing.assert_close(model(x, task_ids=task), wanted, rtol=1e-8, atol=1e-10)
        model.unmerge_adapter()
    elif step == "save":
        folder = tmp_path_factory.mktemp("fuzz")
        model.save_pretrained(folder)
        base = Net(hows, seed).double()
        model = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).double().eval()
    return model


@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    hows=st.lists(st.sampled_from(["plain", "checkpointed", "reentrant", "tied"]), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    calls=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=3),
    data=st.data(),
)
def test_gradients_are_those_of_each_call_by_itself_without_checkpoints(hows, kind, calls, data):
    """Several forwards, their backwards in any order, some inside another task's block."""
    seed = data.draw(st.integers(0, 999))
    model = make(hows, kind, 3, seed)
    free = make(["tied" if how == "tied" else "plain" for how in hows], kind, 3, seed)
    xs = [torch.randn(3, 2, D, dtype=torch.float64, requires_grad=True) for _ in calls]
    for adapted in (model, free):
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("poly_" in name)
    outs = [model(x, task_ids=ids).pow(2).sum() for x, ids in zip(xs, calls, strict=True)]
    with model.use_task(data.draw(st.integers(0, 2))):
        for place in data.draw(st.permutations(range(len(outs)))):
            outs[place].backward()
    for x, ids in zip(xs, calls, strict=True):
        free(x.detach().requires_grad_(), task_ids=ids).pow(2).sum().backward()
    for (name, ours), (_, wanted) in zip(model.named_parameters(), free.named_parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-7, atol=1e-9, msg=name)
