"""Gradient checkpointing: bit-equal gradients, noise and dropout included, whichever forward is recomputed when."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
from adapters import GATES, adapt, poly
from peft import inject_adapter_in_model
from tiny import CASES, MLP, TASKS, Case
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_poly
from peft_poly import PolyConfig, use_task

MIXED, OTHER = [2, 0, 1], [1, 1, 0]
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
Grads = dict[str, torch.Tensor]


def gradients(model: nn.Module) -> Grads:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bit_equal(got: Grads, wanted: Grads) -> None:
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def run(model: nn.Module, step, seed: int = 5) -> Grads:
    """The gradients of one step, of a copy of the model, under one seed; nothing may stay noted."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    step(model).backward()
    for context in peft_poly.tasks.choosing.task_contexts(model):
        assert context.entries.top is None
    return gradients(model)


def equal_but_for_rounding(got: Grads, wanted: Grads) -> None:
    """Far closer than two draws of the noise or the dropout are."""
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)


# ----------------------------------------------------------------------------------------- transformers' switch
HF = ["llama", "gpt2", "bert"]


def tuned(case: str, **settings) -> peft.PeftModel:
    """In training mode, with noise in the router and dropout in the adapter."""
    settings = {"task_names": TASKS, "n_splits": 2, "lora_dropout": 0.2, **settings}
    return adapt(CASES[case].make(), poly(case, **settings)).train()


def switched_on(model: nn.Module, use_reentrant: bool) -> nn.Module:
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


def loss_of(case: Case, task_ids, model: nn.Module, seed: int = 0) -> torch.Tensor:
    inputs = case.inputs(seed=seed)
    if model.peft_config["default"].task_type != "SEQ_CLS":
        inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    else:
        inputs["labels"] = torch.tensor([0, 1, 2])
    return model(**inputs, task_ids=task_ids).loss


@REENTRANT
@pytest.mark.parametrize(
    ("case", "settings"), [*((case, {}) for case in HF), ("llama", GATES), ("gpt2", GATES)], ids=str
)
def test_a_mixed_batch_has_bit_equal_gradients(case, settings, use_reentrant):
    model, step = tuned(case, **settings), partial(loss_of, CASES[case], MIXED)
    wanted = run(model, step)
    bit_equal(run(switched_on(model, use_reentrant), step), wanted)
    others = run(model, partial(loss_of, CASES[case], OTHER))
    assert any(not torch.equal(others[name], gradient) for name, gradient in wanted.items())  # the tasks matter
    again = run(model, step, seed=6)
    assert any(not torch.equal(again[name], gradient) for name, gradient in wanted.items())  # and so does the seed


@REENTRANT
def test_an_encoder_and_a_decoder(use_reentrant):
    """T5 takes another attention kernel while it checkpoints: its outputs are rounded otherwise, with LoRA too."""
    model, step = tuned("t5").double(), partial(loss_of, CASES["t5"], MIXED)  # in which rounding is small
    equal_but_for_rounding(run(switched_on(model, use_reentrant), step), run(model, step))


@REENTRANT
@pytest.mark.parametrize("task_ids", ["sst2", [1, 1, 1], ["boolq", "rte", "sst2"], torch.tensor(MIXED)], ids=str)
def test_every_form_of_ids(task_ids, use_reentrant):
    model, step = tuned("llama"), partial(loss_of, CASES["llama"], task_ids)
    bit_equal(run(switched_on(model, use_reentrant), step), run(model, step))


@REENTRANT
def test_preparing_for_training_through_the_config_of_the_trainer(use_reentrant):
    base = CASES["llama"].make()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model = peft.get_peft_model(base, poly("llama", task_names=TASKS)).train()  # PEFT makes the inputs require grad
    plain = copy.deepcopy(model)
    plain.gradient_checkpointing_disable()
    step = partial(loss_of, CASES["llama"], MIXED)
    bit_equal(run(model, step), run(plain, step))


@REENTRANT
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_shared_routers(granularity, use_reentrant):
    model, step = tuned("llama", router_granularity=granularity), partial(loss_of, CASES["llama"], MIXED)
    got, wanted = run(switched_on(model, use_reentrant), step), run(model, step)
    if granularity == "model" and use_reentrant:  # a backward per block adds to the one router
        equal_but_for_rounding(got, wanted)
    else:
        bit_equal(got, wanted)


def two_forwards(model: nn.Module) -> torch.Tensor:
    case = CASES["llama"]
    return loss_of(case, MIXED, model) + 2 * loss_of(case, "sst2", model, seed=1) + loss_of(case, OTHER, model, seed=2)


def inside_use_task(model: nn.Module) -> torch.Tensor:
    with model.use_task(MIXED):
        return loss_of(CASES["llama"], None, model)


def with_set_task(model: nn.Module) -> torch.Tensor:
    model.set_task("boolq")
    loss = loss_of(CASES["llama"], None, model)
    model.set_task("rte")
    return loss


def hidden_states(model: nn.Module) -> torch.Tensor:
    """A loss of the user's own, on an output that is not the first."""
    output = model(**CASES["llama"].inputs(), task_ids=MIXED, output_hidden_states=True)
    return output.hidden_states[-1].pow(2).sum()


@REENTRANT
@pytest.mark.parametrize("step", [two_forwards, inside_use_task, with_set_task, hidden_states])
def test_what_happens_between_forward_and_backward_does_not_matter(step, use_reentrant):
    model = tuned("llama")
    bit_equal(run(switched_on(model, use_reentrant), step), run(model, step))


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_backwards_in_either_order(order, use_reentrant):
    def step(model: nn.Module) -> torch.Tensor:
        losses = [loss_of(CASES["llama"], ids, model, seed) for seed, ids in enumerate((MIXED, OTHER))]
        losses[order[0]].backward()
        return losses[order[1]]

    model = tuned("llama")
    bit_equal(run(switched_on(model, use_reentrant), step), run(model, step))


class BackwardInside:
    """A loss whose backward runs while another task is in use, or set."""

    def __init__(self, model: nn.Module, loss: torch.Tensor) -> None:
        self.model, self.loss = model, loss

    def backward(self) -> None:
        self.model.set_task("rte")
        with self.model.use_task("sst2"), use_task(self.model, [0, 0, 1]):
            self.loss.backward()
        self.model.set_task(None)


@REENTRANT
def test_a_backward_inside_another_tasks_block(use_reentrant):
    model = tuned("llama")
    wanted = run(model, two_forwards)
    bit_equal(run(switched_on(model, use_reentrant), lambda m: BackwardInside(m, two_forwards(m))), wanted)


@REENTRANT
def test_a_forward_for_another_task_between_forward_and_backward(use_reentrant):
    def step(model: nn.Module, between: bool) -> torch.Tensor:
        loss = loss_of(CASES["llama"], MIXED, model)
        if between:
            with torch.random.fork_rng(), torch.no_grad():
                loss_of(CASES["llama"], "sst2", model)
            loss_of(CASES["llama"], OTHER, model)
        return loss

    model = tuned("llama")
    bit_equal(
        run(switched_on(model, use_reentrant), partial(step, between=True)), run(model, partial(step, between=False))
    )


def test_a_graph_that_is_kept_can_be_gone_through_again():
    def step(model: nn.Module) -> torch.Tensor:
        loss = loss_of(CASES["llama"], MIXED, model)
        loss.backward(retain_graph=True)
        with model.use_task("sst2"):
            loss.backward(retain_graph=True)
        return loss

    model = tuned("llama")
    bit_equal(run(switched_on(model, use_reentrant=False), step), run(model, step))


def test_gradients_asked_for_by_autograd_grad():
    def step(model: nn.Module) -> Grads:
        torch.manual_seed(5)
        loss = loss_of(CASES["llama"], MIXED, model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    model = tuned("llama")
    bit_equal(step(switched_on(model, use_reentrant=False)), step(model))


@REENTRANT
def test_two_adapters_at_once(use_reentrant):
    model = tuned("llama")
    model.add_adapter("other", poly("llama", n_tasks=5, r=2))
    model.base_model.set_adapter(["default", "other"])
    step = partial(loss_of, CASES["llama"], MIXED)
    bit_equal(run(switched_on(model.train(), use_reentrant), step), run(model, step))


@pytest.mark.transformers_door
@REENTRANT
def test_a_model_with_an_adapter_of_transformers(use_reentrant):
    base = CASES["llama"].make()
    base.add_adapter(poly("llama", task_names=TASKS, lora_dropout=0.2))
    base.train()

    def step(model: nn.Module) -> torch.Tensor:
        with use_task(model, MIXED):
            inputs = CASES["llama"].inputs()
            return model(**inputs, labels=inputs["input_ids"]).loss

    bit_equal(run(switched_on(base, use_reentrant), step), run(base, step))


def test_in_eval_mode_nothing_is_noted():
    model = switched_on(tuned("llama"), use_reentrant=False).eval()
    with torch.no_grad():
        loss_of(CASES["llama"], MIXED, model)
    assert model.base_model.task_context.entries.top is None


def test_a_failed_backward_leaves_the_next_one_right():
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("on purpose")

    def step(model: nn.Module, fail: bool) -> torch.Tensor:
        if fail:
            embedding = model.get_input_embeddings()
            hook = embedding.register_forward_hook(lambda module, args, output: Refusing.apply(output.requires_grad_()))
            with torch.random.fork_rng():
                loss = loss_of(CASES["llama"], "sst2", model)
                with pytest.raises(RuntimeError, match="on purpose"):
                    loss.backward()
            hook.remove()
            model.zero_grad()
        return loss_of(CASES["llama"], MIXED, model)

    model = tuned("llama")
    bit_equal(
        run(switched_on(model, use_reentrant=False), partial(step, fail=True)), run(model, partial(step, fail=False))
    )


# ------------------------------------------------------------------------------------------ torch's own checkpoint
class Stack(nn.Module):
    """Blocks with checkpoints inside a checkpoint, as deep models have them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP() for _ in range(depth)])
        self.widen = nn.Linear(4, 16)
        self.use_reentrant: bool | None = None

    def again(self, function, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return self.widen(self.blocks[index](x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(len(self.blocks)):
            x = self.again(partial(self.block, index), x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.inner, x)


def stack_config(**settings) -> PolyConfig:
    settings = {"r": 4, "n_splits": 2, "task_names": TASKS, "init_weights": False, "lora_dropout": 0.2, **settings}
    return PolyConfig(target_modules=["lin0", "lin1"], **settings)


def stack() -> peft.PeftModel:
    return adapt(Stack(), stack_config()).train()


def checkpointed(model: nn.Module, use_reentrant: bool) -> nn.Module:
    model = copy.deepcopy(model)
    next(module for module in model.modules() if isinstance(module, Stack)).use_reentrant = use_reentrant
    return model


def x(seed: int = 3) -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@REENTRANT
def test_nested_checkpoints_of_a_custom_module(use_reentrant):
    def step(model: nn.Module) -> torch.Tensor:
        return model(x(), task_ids=MIXED).sum() + model(x(4), task_ids="sst2").pow(2).sum()

    model = stack()
    bit_equal(run(checkpointed(model, use_reentrant), step), run(model, step))


@REENTRANT
def test_nested_checkpoints_of_an_injected_module(use_reentrant):
    model = inject_adapter_in_model(stack_config(), Stack()).train()

    def step(model: nn.Module) -> torch.Tensor:
        with use_task(model, MIXED):
            one = model(x())
        with use_task(model, "sst2"):
            return one.sum() + model(x(4)).pow(2).sum()

    bit_equal(run(checkpointed(model, use_reentrant), step), run(model, step))


@dataclass
class Answer:
    """An output of the user's own kind, which torch cannot look into."""

    answer: torch.Tensor
    others: list[torch.Tensor]


class Answering(Stack):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(super().forward(x), [super().forward(2 * x)])


@REENTRANT
def test_outputs_of_the_users_own_kind(use_reentrant):
    def step(model: nn.Module) -> torch.Tensor:
        one, other = model(x(), task_ids=MIXED), model(x(4), task_ids="sst2")
        return one.answer.sum() + other.others[0].pow(2).sum()

    model = adapt(Answering(), stack_config()).train()
    bit_equal(run(checkpointed(model, use_reentrant), step), run(model, step))


@REENTRANT
@pytest.mark.parametrize("inside", [None, True, False], ids=["no inner", "inner reentrant", "inner not reentrant"])
def test_a_checkpoint_around_the_whole_call(use_reentrant, inside):
    def step(model: nn.Module, whole: bool) -> torch.Tensor:
        outputs = []
        for seed, ids in ((3, MIXED), (4, "sst2")):
            call = partial(model, task_ids=ids)
            outputs.append(checkpoint(call, x(seed), use_reentrant=use_reentrant) if whole else call(x(seed)))
        return outputs[0].sum() + outputs[1].pow(2).sum()

    model = stack()
    wanted = run(model, partial(step, whole=False))
    bit_equal(run(model if inside is None else checkpointed(model, inside), partial(step, whole=True)), wanted)


def in_a_block(model: nn.Module, use_reentrant: bool | None) -> torch.Tensor:
    with model.use_task(MIXED):
        return (model(x()) if use_reentrant is None else checkpoint(model, x(), use_reentrant=use_reentrant)).sum()


@REENTRANT
def test_a_checkpoint_around_a_call_inside_use_task(use_reentrant):
    model = stack()
    wanted = run(model, partial(in_a_block, use_reentrant=None))
    bit_equal(run(model, partial(in_a_block, use_reentrant=use_reentrant)), wanted)


# --------------------------------------------------------------------------------------------------------- memory
def test_notes_of_graphs_that_are_gone_hold_nothing():
    model, given = stack(), torch.tensor(MIXED)
    for seed in range(3):
        model(x(seed), task_ids=given).sum().backward()
    model(x(), task_ids=given)  # and one without a backward
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is peft_poly.tasks.batch.TaskBatch]
    assert [batch for batch in alive if batch.given is given] == []
