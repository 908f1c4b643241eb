"""Random nets, adapters, doors and lives against a naive loop: each row alone, in a dense model of its task.

A call may be refused where its rows cannot be known, with the message that says so; it may never be wrong. Some seconds
in the suite; `FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import asyncio
import copy
import os
import re
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from fuzz_nets import MAY_REFUSE, MOVED, PLAIN, WAYS, D, make_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import naive_merge
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from peft_poly import PolyConfig

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "120"))
KINDS = (
    {"n_skills": 3}, {"n_skills": 2, "n_splits": 2}, {"n_skills": 4, "n_splits": 4, "router_granularity": "block"},
    {"poly_type": "gates"}, {"poly_type": "gates", "router_granularity": "model"}, {"n_skills": 1},
)  # fmt: skip


def some(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def hows(of=tuple(WAYS), most: int = 3):
    return st.lists(st.sampled_from(of), min_size=1, max_size=most)


# ------------------------------------------------------------------------------------------------ models and reference
def make(ways: list[str], kind: dict[str, Any], n_tasks: int, seed: int, own_ids: bool = False) -> peft.PeftModel:
    """An adapted net in eval mode, with routers that tell their tasks apart."""
    config = PolyConfig(
        r=2, lora_alpha=4, task_names=[f"t{task}" for task in range(n_tasks)], target_modules=r"blocks\.\d+\.lin",
        init_weights=False, router_noise=False, **kind,
    )  # fmt: skip
    model = peft.get_peft_model(make_net(ways, seed, own_ids), config, autocast_adapter_dtype=False).double().eval()
    stir(model, seed)
    return model


def stir(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise, alpha=2.0 if "router" in name else 0.2)


class Call:
    """The tasks and inputs of one call, and what it should give."""

    def __init__(
        self, model: peft.PeftModel, tasks: list[str], shape: list[int], data: Any, seed: int, codes: bool = False
    ) -> None:
        self.model, self.tasks, self.data = model, tasks, data
        self.ids = [model.task_id(task) for task in tasks]
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(len(tasks), *shape, D, dtype=torch.float64, generator=generator)
        if codes and shape:  # of one dimension, they would not tell how many rows there are
            self.x = torch.randint(0, 16, (len(tasks), *shape), generator=generator)
        self.media: dict[str, torch.Tensor] = {}
        if any(getattr(block, "how", "") == "images" for block in model.get_base_model().blocks):
            owners = data.draw(st.lists(st.integers(0, len(tasks) - 1), min_size=1, max_size=4))
            images = torch.randn(len(owners), D, dtype=torch.float64, generator=generator)
            self.media = {"pixel_values": images, "owners": torch.tensor(owners)}
        self.form = (
            "tensor" if model.base_model.ids_position else data.draw(st.sampled_from(["names", "ids", "tensor"]))
        )
        self.given = {"names": tasks, "ids": self.ids, "tensor": torch.tensor(self.ids)}[self.form]

    def alone(self, passed: bool, **generate: Any) -> torch.Tensor:
        """Each row by itself in the dense model of its task, which gets the ids that the call passes."""
        dense = {task: naive_merge(self.model.get_base_model(), task) for task in set(self.ids)}
        rows = []
        for row, task in enumerate(self.ids):
            own = {"task_ids": [task]} if passed and self.model.base_model.ids_position else {}
            if self.media:
                mine = self.media["owners"] == row
                images = self.media["pixel_values"][mine]
                own |= {"pixel_values": images, "owners": torch.zeros(len(images), dtype=torch.long)}
            with torch.no_grad():
                do = dense[task].generate if generate else dense[task]
                rows.append(do(self.x[row : row + 1], **own, **generate))
        return torch.cat(rows)

    def may_be_refused(self, but_for_numbers: bool = False) -> bool:
        """Whether several tasks and a layer whose rows cannot be known; or where they are not followed."""
        ways = {getattr(block, "how", "table") for block in self.model.get_base_model().blocks}
        lost = {*MAY_REFUSE, *MOVED} if but_for_numbers else MAY_REFUSE
        return (but_for_numbers or len(set(self.ids)) > 1) and bool(ways & lost)


def or_refused(do: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    """What it gives, or the message of its refusal."""
    try:
        return do()
    except ValueError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------- doors
def by_name(call: Call, model: nn.Module) -> torch.Tensor:
    return model(input_ids=call.x, **call.media, task_ids=call.given)


def by_position(call: Call, model: nn.Module) -> torch.Tensor:
    return model(call.x, **call.media, task_ids=call.given)


def in_a_block(call: Call, model: nn.Module) -> torch.Tensor:
    with model.use_task(call.given):
        return model(call.x, **call.media)


def the_base_model_in_a_block(call: Call, model: nn.Module) -> torch.Tensor:
    with model.use_task(call.given):
        return model.get_base_model()(call.x, **call.media)


def while_serving(call: Call, model: nn.Module) -> torch.Tensor:
    with model.serving(max_tasks=2), torch.no_grad():
        return [by_name(call, model) for _ in range(3)][-1]


def in_a_thread(call: Call, model: nn.Module) -> torch.Tensor:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(by_name(call, model))
        except Exception as error:
            found.append(error)

    other = threading.Thread(target=run)
    with model.use_task(call.tasks[0]):
        other.start()
        other.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def in_coroutines(call: Call, model: nn.Module) -> torch.Tensor:
    async def request(tasks: Any, turns: int) -> Any:
        with model.use_task(tasks):
            for _ in range(turns):
                await asyncio.sleep(0)
            return model(call.x, **call.media)

    async def main() -> list[Any]:
        return await asyncio.gather(request(call.given, 1), request(call.tasks[0], 2), request(call.given, 3))

    one, _, other = asyncio.run(main())
    assert torch.equal(one, other)
    check_nothing_is_entered(call, model)
    return one


def in_generators(call: Call, model: nn.Module) -> torch.Tensor:
    def answers(tasks: Any):
        with model.use_task(tasks):
            while True:
                yield model(call.x, **call.media)

    one, other = answers(call.given), answers(call.tasks[0])
    next(one), next(other)
    found = next(one)
    one.close()
    other.close()
    check_nothing_is_entered(call, model)
    return found


def check_nothing_is_entered(call: Call, model: nn.Module) -> None:
    if model.task_names[1:]:
        with pytest.raises(ValueError, match="No task is known"):
            model(call.x, **call.media)


def offloaded(call: Call, model: nn.Module) -> torch.Tensor:
    model = copy.deepcopy(model)
    folder = call.data.draw(st.booleans()) and tempfile.mkdtemp(
        dir=os.environ["FUZZ_FOLDER"]
    )  # accelerate reads old ones
    cpu = torch.device("cpu")
    model = disk_offload(model, folder, cpu) if folder else cpu_offload(model, cpu)
    with torch.no_grad():
        return by_name(call, model)


def of_a_reference(call: Call, model: nn.Module) -> torch.Tensor:
    """As TRL's trainers make one: an adapter with the very config of another starts as its copy."""
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    try:
        return by_name(call, model)
    finally:
        model.set_adapter("default")
        model.delete_adapter("ref")


def traced(call: Call, model: nn.Module) -> torch.Tensor:
    """Traced with other ids."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.model(x, task_ids=ids)

    if call.media or set(WAYS).difference(PLAIN) & {getattr(b, "how", "table") for b in model.get_base_model().blocks}:
        return by_name(call, model)  # what such layers do with numbers is not for a trace
    with torch.no_grad():
        first = torch.arange(len(call.x)) % len(model.task_names)
        return torch.jit.trace(Wrapped(), (call.x, first), check_trace=False)(call.x, torch.tensor(call.ids))


DOORS = [
    by_name, by_position, in_a_block, the_base_model_in_a_block, while_serving, in_a_thread, in_coroutines,
    in_generators, offloaded, of_a_reference, traced,
]  # fmt: skip
PASSING = {by_name, by_position, while_serving, in_a_thread, offloaded, of_a_reference, traced}


# ---------------------------------------------------------------------------------------------------------------- lives
def lived(model: peft.PeftModel, step: str, seed: int, data: Any) -> peft.PeftModel:
    """The model after a step of its life."""
    if step == "add":
        model.add_tasks([f"new{data.draw(st.integers(0, 10**6))}-{len(model.task_names)}"])
    elif step == "remove" and len(model.task_names) > 1:
        model.remove_tasks(data.draw(st.sampled_from(model.task_names)))
    elif step == "rename":
        model.base_model.rename_task(0, f"renamed{data.draw(st.integers(0, 10**6))}")
    elif step == "write":
        stir(model, seed + 1)
    elif step == "copy":
        model = copy.deepcopy(model)
    elif step == "merge":
        merged_for_a_while(model, data)
    elif step == "save":
        folder = os.path.join(os.environ["FUZZ_FOLDER"], str(seed))
        model.save_pretrained(folder)
        base = copy.deepcopy(model).unload()
        model = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).double().eval()
    return model


def merged_for_a_while(model: peft.PeftModel, data: Any) -> None:
    """A service merges a task in inference mode, answers, takes it out again, and training goes on."""
    call = Call(model, [data.draw(st.sampled_from(model.task_names))] * 2, [], data, 0)
    wanted = call.alone(passed=True)
    with torch.inference_mode(data.draw(st.booleans())):
        model.merge_adapter(task=call.tasks[0])
        torch.testing.assert_close(by_name(call, model), wanted, rtol=1e-8, atol=1e-10)
        model.unmerge_adapter()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    call.x.requires_grad_()  # as reentrant checkpoints ask
    by_name(call, model).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


@pytest.fixture(autouse=True)
def _a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))


STEPS = ["add", "remove", "rename", "save", "write", "copy", "merge"]


# ---------------------------------------------------------------------------------------------------------------- tests
@some(2 * EXAMPLES)
@given(
    ways=hows() | hows(["images", "plain"]) | hows(PLAIN),
    kind=st.sampled_from(KINDS),
    n_tasks=st.integers(1, 4),
    shape=st.lists(st.integers(1, 4), max_size=3),
    life=st.lists(st.sampled_from(STEPS), max_size=2),
    own_ids=st.booleans(),
    data=st.data(),
)
def test_rows_are_what_they_are_alone_or_refused(ways, kind, n_tasks, shape, life, own_ids, data):
    seed = data.draw(st.integers(0, 999))
    model = make(ways, kind, n_tasks, seed, own_ids)
    for turn, step in enumerate(["", *life]):
        model = lived(model, step, seed, data)
        tasks = data.draw(st.lists(st.sampled_from(model.task_names), min_size=1, max_size=4))
        call = Call(model, tasks, shape, data, seed + turn, codes=data.draw(st.booleans()))
        door = data.draw(st.sampled_from(DOORS))
        wanted = call.alone(passed=door in PASSING)
        with torch.set_grad_enabled(data.draw(st.booleans())):
            out = or_refused(lambda door=door, call=call, model=model: door(call, model))
        if isinstance(out, str):
            assert call.may_be_refused(door is traced), out
            assert "exclude_modules" in out, out
        else:
            torch.testing.assert_close(out.detach(), wanted, rtol=1e-8, atol=1e-10)


@some(2 * EXAMPLES)
@given(
    ways=hows([*PLAIN, "tied", "windows outside"]) | hows([way for way in WAYS if way != "images"]),
    kind=st.sampled_from(KINDS),
    tasks=st.just(["t0", "t1"]) | st.lists(st.sampled_from(["t0", "t1"]), min_size=1, max_size=3),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    beams=st.integers(1, 3),
    guidance=st.sampled_from([None, None, 2.0]),
    special=st.sampled_from(["ends", "", "tiled"]),
    data=st.data(),
)
def test_an_own_generate_gives_each_row_what_it_gives_the_row_alone(
    ways, kind, tasks, shape, beams, guidance, special, data
):
    """Rows that are repeated in this order or that, computed twice over, or leave when they have ended."""
    seed = data.draw(st.integers(0, 999))
    model = make(ways, kind, 2, seed)
    call, how = Call(model, tasks, shape, data, seed), {"num_beams": beams, "guidance_scale": guidance}
    special = "" if guidance else special
    wanted = call.alone(passed=True, **how)
    if special == "tiled":
        wanted = wanted.unflatten(0, (-1, beams)).transpose(0, 1).flatten(0, 1)
    if special == "ends":
        dense = naive_merge(model.get_base_model(), call.ids[0])
        with torch.no_grad():
            wanted[:beams] = dense(call.x[:1].repeat_interleave(beams, 0))
    out = or_refused(lambda: model.generate(call.x, **how, special=special, task_ids=call.given))
    if isinstance(out, str):
        assert call.may_be_refused() or (special and len(set(tasks)) > 1), out
        assert re.search("exclude_modules|This `generate`", out)
    else:
        torch.testing.assert_close(out, wanted, rtol=1e-8, atol=1e-10)


@some(EXAMPLES)
@given(
    ways=hows(["plain", "checkpointed", "reentrant", "nested", "tied"]),
    kind=st.sampled_from(KINDS),
    calls=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=3),
    inner=st.sampled_from(["the output", "a hidden state", "a submodule"]),
    data=st.data(),
)
def test_gradients_are_those_of_each_row_by_itself_without_checkpoints(ways, kind, calls, inner, data):
    """Several forwards, their backwards in any order, inside another task's block, or with another task set."""
    seed = data.draw(st.integers(0, 999))
    model = make(ways, kind, 3, seed)
    free = make(["tied" if how == "tied" else "plain" for how in ways], kind, 3, seed)
    for adapted in (model, free):
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("poly_" in name)
    xs = [torch.randn(3, 2, D, dtype=torch.float64) for _ in calls]

    def loss(adapted: nn.Module, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
        x = x.clone().requires_grad_()
        block, caught = adapted.get_base_model().blocks[-1], []
        if inner == "a submodule":
            with adapted.use_task(ids):
                return block(x, None, None).pow(2).sum()
        hook = block.register_forward_hook(lambda module, args, out: caught.append(out))
        out = adapted(x, task_ids=ids)
        hook.remove()
        return (caught[0] if inner == "a hidden state" else out).pow(2).sum()

    losses = [loss(model, x, ids) for x, ids in zip(xs, calls, strict=True)]
    model.set_task(data.draw(st.sampled_from([None, 0, 1])))
    with model.use_task(data.draw(st.sampled_from([None, 0, 2]))):
        for place in data.draw(st.permutations(range(len(losses)))):
            losses[place].backward()
    for x, ids in zip(xs, calls, strict=True):
        for row, task in enumerate(ids):
            loss(free, x[row : row + 1], [task]).backward()
    for (name, ours), (_, wanted) in zip(model.named_parameters(), free.named_parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-7, atol=1e-9, msg=name)


DERIVATIVES = ["forward mode", "of each row by vmap", "second"]


@some(EXAMPLES)
@given(
    ways=hows(["plain", "flattened", "sequence first", "tied"], most=2),
    kind=st.sampled_from(KINDS),
    tasks=st.lists(st.sampled_from(["t0", "t1"]), min_size=1, max_size=3),
    shape=st.lists(st.integers(1, 3), max_size=1),
    which=st.sampled_from(DERIVATIVES),
    data=st.data(),
)
def test_derivatives_are_those_of_the_dense_models(ways, kind, tasks, shape, which, data):
    seed = data.draw(st.integers(0, 999))
    model = make(ways, kind, 2, seed)
    call = Call(model, tasks, shape, data, seed)
    dense = {task: naive_merge(model.get_base_model(), task) for task in set(call.ids)}
    tangent = torch.randn_like(call.x)

    def derivative(f, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        if which == "forward mode":
            return jvp(f, (x,), (tangent,))[1]
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), x)[0] if which == "second" else slope.detach()

    if which == "forward mode":
        model(call.x, task_ids=call.given)  # which is not followed there, and is known from a call before
    rows = [slice(row, row + 1) for row in range(len(tasks))]
    wanted = [derivative(dense[task], call.x[row], tangent[row]) for row, task in zip(rows, call.ids, strict=True)]
    if which == "of each row by vmap":
        parameters = dict(model.named_parameters())

        def of_row(x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            return functional_call(model, parameters, (x[None],), {"task_ids": task[None]}).pow(2).sum()

        out = vmap(grad(of_row))(call.x, torch.tensor(call.ids))
    else:
        out = derivative(lambda x: model(x, task_ids=call.given), call.x, tangent)
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-7, atol=1e-9)
