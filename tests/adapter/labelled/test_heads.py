"""`TaskHeads`: each row gets the head of its task; in a module of one's own it finds the tasks by itself."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from labelled import LABELS, N_LABELS, NAMES
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_poly import PolyConfig, TaskHeads, create_poly_optimizer, use_task


class Own(nn.Module):
    """An encoder with heads for the tasks, in another order than the adapter has them."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Linear(8, 16)
        self.heads = TaskHeads(16, {name: LABELS[name] for name in reversed(NAMES)})
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.enc(x))
        return checkpoint(self.heads, h, use_reentrant=False) if self.checkpointed else self.heads(h)


def own(**settings):
    given = {"target_modules": ["enc"], "modules_to_save": ["heads"], "task_names": NAMES, "init_weights": False}
    return PolyConfig(**{**given, "router_noise": False, **settings})


def adapted(**settings):
    return peft.get_peft_model(Own(), own(**settings)).eval()


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class TestForward:
    @pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8), (4, 2, 3, 8)])
    def test_each_row_has_the_logits_of_its_own_head(self, shape):
        heads, x = TaskHeads(8, LABELS), torch.randn(shape)
        y = heads(x, task_ids=NAMES)
        assert y.shape == (*shape[:-1], 4)
        for row, size in enumerate(N_LABELS):
            torch.testing.assert_close(y[row, ..., :size], heads.linear(row)(x[row]))
            assert torch.equal(y[row, ..., size:].isinf(), torch.ones_like(y[row, ..., size:]).bool())

    @pytest.mark.parametrize("task_ids", ["stars", 2, ["stars"] * 4, torch.full((4,), 2)])
    def test_one_task_for_all_rows_is_one_product(self, task_ids):
        heads = TaskHeads(8, LABELS)
        torch.testing.assert_close(heads(X, task_ids=task_ids)[:, :1], heads.linear(2)(X))

    def test_it_works_without_a_bias_and_under_autocast(self):
        heads = TaskHeads(8, LABELS, bias=False)
        y = heads(X, task_ids=NAMES)
        with torch.autocast("cpu", torch.bfloat16):
            low = heads(X, task_ids=NAMES)
        torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.05)
        assert [name for name, _ in heads.named_parameters()] == [f"weight_{index}" for index in range(4)]

    def test_heads_that_no_row_asks_for_get_no_gradient(self):
        heads = TaskHeads(8, LABELS)
        heads(X, task_ids=["topic", "stars", "topic", "stars"])[:, 0].sum().backward()
        assert [name for name, p in heads.named_parameters() if p.grad is not None] == [
            "weight_1", "bias_1", "weight_2", "bias_2",
        ]  # fmt: skip

    def test_tasks_may_be_called_what_no_module_may_and_nothing_inside_has_a_name_to_find(self):
        heads = TaskHeads(8, {"type": 2, "a.b": 3, "keys": 2, "default": 2})
        assert heads(X, task_ids=["type", "a.b", "keys", "default"]).shape == (4, 3)
        assert list(heads.named_children()) == []

    def test_copies_and_pickles_compute_the_same(self):
        heads = TaskHeads(8, LABELS)
        for other in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
            assert torch.equal(other(X, task_ids=NAMES), heads(X, task_ids=NAMES))


class TestInAModuleOfOnesOwn:
    def test_it_finds_the_tasks_by_name(self):
        model = adapted()
        heads = model.base_model.model.heads.modules_to_save["default"]
        y = model(X, task_ids=NAMES)
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(y[row], model(X[row : row + 1], task_ids=name)[0])
            assert int((~y[row].isinf()).sum()) == len(heads.labels[name])

    def test_it_is_trained_saved_and_loaded(self, tmp_path):
        model = adapted().train()
        optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=0.1)
        model(X, task_ids=NAMES)[:, 0].sum().backward()
        optimizer.step()
        want = model.eval()(X, task_ids=NAMES)
        assert not torch.equal(want, adapted()(X, task_ids=NAMES))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(Own(), tmp_path).eval()
        torch.testing.assert_close(loaded(X, task_ids=NAMES), want)

    def test_an_exported_task_has_a_plain_layer_in_their_place(self, tmp_path):
        model = adapted()
        model.export_lora("topic", tmp_path)
        size = len(LABELS["topic"]) if isinstance(LABELS["topic"], list) else LABELS["topic"]
        assert f"its `heads` must be a `torch.nn.Linear(16, {size})`" in (tmp_path / "README.md").read_text()
        base = Own()
        base.heads = nn.Linear(16, size)
        lora = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(lora(X), model(X, task_ids="topic")[:, :size])

    def test_an_injected_model_knows_its_tasks_by_use_task(self):
        model = peft.inject_adapter_in_model(own(), Own()).eval()
        with use_task(model, NAMES):
            y = model(X)
        assert y.isinf().sum(1).tolist() == [4 - size for size in N_LABELS]

    def test_a_set_task_and_a_copied_model_do_too(self):
        model = adapted()
        model.set_task("topic")
        copied = copy.deepcopy(model)
        model.set_task("stars")
        assert copied(X).isinf().sum() == 0
        assert model(X).isinf().sum() == 12

    def test_a_set_task_is_known_behind_the_door_too(self):
        model = adapted()
        model.set_task("stars")
        assert model.get_base_model()(X).isinf().sum() == 12

    def test_adapters_of_the_same_model_share_what_it_is_told(self):
        model = adapted()
        model.add_adapter("other", own(task_names=NAMES[::-1]))
        model.set_adapter("other")
        want = [NAMES[index] for index in (3, 1)]
        assert torch.equal(model(X[:2], task_ids=[0, 2]), model(X[:2], task_ids=want))

    def test_a_name_that_the_adapter_lets_in_has_no_head(self):
        model = adapted(unknown_task="mean")
        for task_ids in ("length", ["topic", "length", "topic", "stars"]):
            with pytest.raises(ValueError, match=r"Unknown task 'length'.*a row for it, but no head"):
                model(X, task_ids=task_ids)

    def test_an_optimizer_goes_on_with_the_heads_that_come_and_go(self):
        model = adapted().train()
        optimizer = torch.optim.AdamW([p for p in model.named_parameters() if p[1].requires_grad], lr=0.1)
        heads = model.base_model.model.heads.modules_to_save["default"]

        def step(*tasks):
            before = {name: heads.linear(place).weight for place, name in enumerate(heads.labels)}
            model(X[: len(tasks)], task_ids=list(tasks))[:, 0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            return {
                name for place, name in enumerate(heads.labels) if not torch.equal(heads.pair(place)[0], before[name])
            }

        assert step("topic", "stars") == {"topic", "stars"}
        kept = optimizer.state[heads.pair(list(heads.labels).index("stars"))[0]]
        model.add_tasks(["length"], labels={"length": 6}, optimizer=optimizer)
        assert "length" in step("length", "topic")
        gone = heads.pair(list(heads.labels).index("topic"))
        model.remove_tasks("topic", optimizer=optimizer)
        assert step("length", "stars") >= {"length", "stars"}
        assert optimizer.state[heads.pair(list(heads.labels).index("stars"))[0]] is kept
        known = [p for group in optimizer.param_groups for p in group["params"]]
        assert not {id(p) for p in gone} & {id(p) for p in (*known, *optimizer.state)}
        assert {id(p) for p in heads.parameters()} <= {id(p) for p in known}
        assert all(len(group["params"]) == len(set(group["param_names"])) for group in optimizer.param_groups)

    def test_a_recomputation_in_the_backward_has_the_tasks_of_its_forward(self):
        model = peft.get_peft_model(Own(checkpointed=True), own())
        plain = peft.get_peft_model(Own(), own())
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            losses = [one(X, task_ids=ids)[:, 0].sum() for ids in (NAMES, NAMES[::-1])]  # two forwards, one backward
            sum(losses).backward()
        for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other.grad, msg=name)

    def test_without_the_adapter_the_base_models_own_heads_serve_the_tasks(self):
        model = adapted()
        base = Own()
        base.heads.load_state_dict(model.base_model.model.heads.original_module.state_dict())
        with model.disable_adapter():
            y = model(X, task_ids=NAMES)
        want = base.heads(torch.tanh(base.enc(X)), task_ids=NAMES)
        torch.testing.assert_close(y, want)

    def test_it_grows_and_shrinks_with_the_tasks(self):
        model = adapted()
        before = model(X, task_ids=NAMES)
        model.add_tasks(["length"], labels={"length": 6})
        model.rename_task("topic", "subject")
        model.remove_tasks("sentiment")
        after = model(X, task_ids=["length", "subject", "stars", "genres"])
        assert after.shape == (4, 6)
        torch.testing.assert_close(after[1:, :4], before[1:])

    def test_a_merged_model_has_the_layer_of_one_task(self):
        model = adapted()
        want = model(X, task_ids="genres")
        merged = model.merge_and_unload(task="genres")
        assert type(merged.heads) is nn.Linear
        torch.testing.assert_close(merged(X), want[:, :3], rtol=1e-4, atol=1e-5)

    def test_a_task_without_a_head_is_refused(self):
        model = adapted(task_names=[*NAMES, "length"])
        with pytest.raises(ValueError, match=r"Task 'length' of adapter 'default' has none"):
            model(X, task_ids="length")
        with pytest.raises(ValueError, match=r"heads has no head for the task 'length'"):
            model.merge_and_unload(task="length")
        assert model(X, task_ids="topic").shape == (4, 4)  # nothing has changed

    def test_a_call_with_no_task_is_refused(self):
        with pytest.raises(ValueError, match=r"No task is known.*heads for genres, stars, topic, sentiment"):
            Own()(X)
        with pytest.raises(ValueError, match=r"No task is known"):
            adapted()(X)


class Turned(Own):
    """A model that computes with its rows elsewhere than in the first dimension."""

    def __init__(self, turn) -> None:
        super().__init__()
        self.turn, self.told = turn, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.turn(torch.tanh(self.enc(x))), task_ids=self.told)


class TestWhereTheRowsAre:
    """`Turned` gets `(4, 4, 8)`: four rows of four tokens, so that no shape tells which is which."""

    @staticmethod
    def made(turn):
        torch.manual_seed(0)
        return peft.get_peft_model(Turned(turn), own()).eval(), torch.randn(4, 4, 8)

    @pytest.mark.parametrize("times", [1, 2])
    def test_rows_in_the_second_dimension_are_followed_there(self, times):
        model, x = self.made(lambda h: h.transpose(0, 1).contiguous())
        want = adapted()(x, task_ids=NAMES)
        for _ in range(times):
            torch.testing.assert_close(model(x, task_ids=NAMES), want.transpose(0, 1))

    def test_several_entries_of_a_row_have_its_task(self):
        model, x = self.made(lambda h: h.reshape(-1, 16))
        torch.testing.assert_close(model(x, task_ids=NAMES), adapted()(x, task_ids=NAMES).reshape(16, -1))

    def test_entries_that_are_no_rows_are_refused_and_may_be_told(self):
        model, x = self.made(lambda h: h[h[..., 0] > -2].view(16, -1)[:4])
        with pytest.raises(ValueError, match=r"TaskHeads has the shape \(4, 16\).*pass these heads `task_ids`"):
            model(x, task_ids=NAMES)
        want = adapted()(x, task_ids="topic").reshape(16, -1)[:4]
        torch.testing.assert_close(model(x, task_ids="topic"), want)
        model.get_base_model().told = ["topic"] * 4
        torch.testing.assert_close(model(x, task_ids=NAMES), want)

    def test_an_adapter_that_comes_later_is_followed_too(self):
        model, x = self.made(lambda h: h.transpose(0, 1).contiguous())
        model(x, task_ids=NAMES)
        model.add_adapter("other", own())
        model.set_adapter("other")
        y = model(x, task_ids=NAMES)
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(y[:, row], model(x, task_ids=name)[:, row])


class TestOutsideOfTheAdaptedModel:
    """What belongs to no adapted model finds the tasks of the block that it is called in."""

    def test_it_has_the_tasks_of_the_block(self):
        outer = Outer()
        want = outer.heads(outer.encoder(X, task_ids=NAMES), task_ids=NAMES)
        with use_task(outer, NAMES):
            assert torch.equal(outer(X), want)
        with pytest.raises(ValueError, match="No task is known for this call of a TaskHeads"):
            outer.heads(torch.randn(4, 16))

    def test_of_two_blocks_it_has_those_of_the_inner_one_even_if_they_end_out_of_turn(self):
        one, two, h = Outer(), Outer(), torch.randn(4, 16)
        first, second = use_task(one, NAMES), use_task(two, NAMES[::-1])
        first.__enter__()
        second.__enter__()
        assert torch.equal(one.heads(h), one.heads(h, task_ids=NAMES[::-1]))
        first.__exit__(None, None, None)
        assert torch.equal(one.heads(h), one.heads(h, task_ids=NAMES[::-1]))
        second.__exit__(None, None, None)
        with use_task(two, NAMES), use_task(one, NAMES[::-1]):
            assert torch.equal(one.heads(h), one.heads(h, task_ids=NAMES[::-1]))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_recomputation_has_them_again(self, reentrant):
        one, two = Outer(), Outer()
        h = torch.randn(4, 16, requires_grad=True)
        for first, second in ((one, two), (two, one)):
            with use_task(first, NAMES), use_task(second, NAMES[::-1]):
                y = checkpoint(one.heads, h, use_reentrant=reentrant)
            (grad,) = torch.autograd.grad(y[:, 0].sum(), h) if not reentrant else (_grad(y[:, 0].sum(), h),)
            (want,) = torch.autograd.grad(one.heads(h, task_ids=NAMES[::-1])[:, 0].sum(), h)
            torch.testing.assert_close(grad, want)


def _grad(loss, h):
    h.grad = None
    loss.backward()
    return h.grad


class Outer(nn.Module):
    """An adapted encoder, and heads outside of it."""

    def __init__(self) -> None:
        super().__init__()
        config = PolyConfig(target_modules=["0"], task_names=NAMES, init_weights=False)
        self.encoder = peft.get_peft_model(nn.Sequential(nn.Linear(8, 16)), config).eval()
        self.heads = TaskHeads(16, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.encoder(x))


def test_compiled_heads_leave_alone_what_no_row_asks_for():
    model = peft.get_peft_model(Own(), own()).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    heads = model.base_model.model.heads.modules_to_save["default"]
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    for _ in range(2):
        compiled(X, task_ids=torch.tensor([0, 1, 0, 1]))[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in heads.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"weight_2", "bias_2", "weight_3", "bias_3"}  # topic and sentiment, in the order of the heads
