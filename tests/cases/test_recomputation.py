"""A recomputation has the tasks of its forward, whichever loss a backward starts from, whatever is entered then."""

from __future__ import annotations

import functools

import pytest
import torch
from rows_alone import TASKS, two_tasks
from tiny import llama
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peft_poly import use_task

X = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])


def hidden_of(model: nn.Module, **kwargs) -> torch.Tensor:
    """An inner activation that a hook has caught."""
    got = {}
    inner = model.get_base_model().model.layers[1]
    hook = inner.register_forward_hook(lambda m, a, o: got.update(h=o if isinstance(o, torch.Tensor) else o[0]))
    model(input_ids=X, **kwargs)
    hook.remove()
    return got["h"]


def caught(model: nn.Module) -> None:
    model.set_task("sst2")
    hidden_of(model, task_ids="rte").pow(2).sum().backward()


def submodule(model: nn.Module) -> None:
    inner = model.get_base_model().model
    with model.use_task("rte"):
        h = inner(input_ids=X).last_hidden_state
    with model.use_task("sst2"):
        h.pow(2).sum().backward()


def set_in_between(model: nn.Module) -> None:
    model.set_task("rte")
    h = model.get_base_model().model(input_ids=X).last_hidden_state
    model.set_task("sst2")
    h.pow(2).sum().backward()


def one_backward_of_several(model: nn.Module) -> None:
    one, other = hidden_of(model, task_ids="rte"), model(input_ids=X, task_ids=TASKS).logits
    with use_task(model, "sst2"):
        third = model.get_base_model().model(input_ids=X).last_hidden_state
        (one.sum() + other.pow(2).sum() + third.pow(3).sum()).backward()


def in_turn(model: nn.Module) -> None:
    losses = [hidden_of(model, task_ids=task).pow(2).sum() for task in ("rte", TASKS, "sst2")]
    for index in (1, 2, 0):
        with model.use_task(["sst2", "rte"]):
            losses[index].backward()


@REENTRANT
@pytest.mark.parametrize("step", [caught, submodule, set_in_between, one_backward_of_several, in_turn])
def test_gradients_are_bit_equal_to_those_without_checkpointing(step, use_reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = two_tasks(llama(), target_modules=["q_proj", "v_proj", "up_proj"], router_noise=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        step(model)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, got = gradients(False), gradients(True)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def test_checkpointing_that_keeps_the_products_has_the_same_gradients():
    """torch's selective checkpointing refuses what writes into a result that it keeps."""

    def policy(ctx, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = two_tasks(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), target_modules=["0", "2"]).train()
    inner, x = model.get_base_model(), torch.randn(2, 3, 8)

    def gradients(keeps: bool) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with model.use_task(TASKS):
            kept = {"use_reentrant": False, "context_fn": contexts}
            y = checkpoint(inner, checkpoint(inner, x, **kept), **kept) if keeps else inner(inner(x))
        y.pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for wanted, got in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(got, wanted)


class Again(torch.autograd.Function):
    """A recomputation by hand, as reversible layers and offloading checkpoints have it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return None, x.grad


def test_an_unknown_recomputation_is_refused_not_guessed():
    model = two_tasks(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"])
    model.set_task("sst2")
    x = torch.randn(2, 8, requires_grad=True)
    with model.use_task("rte"):
        y = Again.apply(model.get_base_model(), x)
        with pytest.raises(ValueError, match="nothing tells for which forward"):
            y.sum().backward()

    def known(x: torch.Tensor) -> torch.Tensor:
        with model.use_task("rte"):
            return model.get_base_model()(x)

    Again.apply(known, x).sum().backward()
    wanted = torch.autograd.grad(model(x, task_ids="rte").sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)
