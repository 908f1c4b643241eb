"""A base model that takes `task_ids` itself, a head per task say, gets what the caller passed."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from adapters import spread
from tiny import CASES, llama
from torch import nn

from peft_poly import PolyConfig, use_task

IDS = {"tensor": torch.tensor([0, 1, 0]), "list": [1, 0, 1], "all one": torch.tensor([1, 1, 1])}
each_form = pytest.mark.parametrize("ids", list(IDS.values()), ids=list(IDS))


class Heads(nn.Module):
    """A shared encoder and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Linear(8, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(2))
        self.got = None

    def forward(self, x, task_ids=None):
        self.got, h = task_ids, torch.tanh(self.enc(x))
        ids = [0] * len(x) if task_ids is None else task_ids
        return torch.stack([self.heads[int(task)](row) for task, row in zip(ids, h, strict=True)])


class Causal(transformers.LlamaForCausalLM):
    """A transformers model whose forward takes `task_ids`, and shifts the logits of its rows by them."""

    def forward(self, input_ids=None, attention_mask=None, task_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if task_ids is not None:
            out.logits = out.logits + 5 * torch.as_tensor(task_ids)[:, None, None] * torch.arange(61)
        return out


def causal() -> nn.Module:
    torch.manual_seed(0)
    return Causal(llama().config).eval()


def adapted(base: nn.Module, fresh: bool = False, **settings) -> peft.PeftModel:
    config = PolyConfig(n_tasks=2, init_weights=fresh, **settings)
    return spread(peft.get_peft_model(base, config)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8)


@each_form
@pytest.mark.parametrize("passed", ["by name", "by place"])
@pytest.mark.parametrize("door", ["PeftModel", "PolyModel", "disabled"])
def test_it_gets_them_through_every_door(ids, passed, door, x):
    model = adapted(Heads(), fresh=True, target_modules=["enc"])
    call = model.base_model if door == "PolyModel" else model
    args, kwargs = ((x, ids), {}) if passed == "by place" else ((x,), {"task_ids": ids})
    if door == "disabled":
        with model.disable_adapter():
            got = call(*args, **kwargs)
    else:
        got = call(*args, **kwargs)
    assert torch.equal(got, Heads()(x, task_ids=ids))
    assert model.get_base_model().got is ids


@each_form
def test_the_adapter_routes_by_them_too(ids, x):
    model = adapted(Heads(), target_modules=["enc"])
    for call in (model, model.base_model):
        rows = [call(x[i : i + 1], task_ids=[int(task)]) for i, task in enumerate(ids)]
        torch.testing.assert_close(call(x, task_ids=ids), torch.cat(rows))
        torch.testing.assert_close(call(x, ids), torch.cat(rows))


def test_what_a_call_passes_goes_before_what_was_entered(x):
    model = adapted(Heads(), target_modules=["enc"])
    with use_task(model, 0):
        torch.testing.assert_close(model(x, task_ids=[1, 0, 1]), model(x, [1, 0, 1]))
        model(x)
    assert model.get_base_model().got is None  # who passes nothing to the model passes nothing on
    base = peft.inject_adapter_in_model(PolyConfig(target_modules=["enc"], n_tasks=2), Heads()).eval()
    with use_task(base, [1, 0, 1]):
        assert torch.equal(base(x, task_ids=[1, 0, 1]), Heads()(x, task_ids=[1, 0, 1]))


def test_a_typed_model_hands_them_on_and_generates_with_them():
    inputs, ids = CASES["llama"].inputs(), torch.tensor([0, 1, 0])
    model = adapted(causal(), fresh=True, task_type="CAUSAL_LM")
    with torch.no_grad():
        want = causal()(**inputs, task_ids=ids).logits
        assert torch.equal(model(**inputs, task_ids=ids).logits, want)
        assert torch.equal(model.base_model(**inputs, task_ids=ids).logits, want)
        assert not torch.equal(want, causal()(**inputs).logits)
    prompt = {"input_ids": inputs["input_ids"], "max_new_tokens": 3, "do_sample": False}
    for beams in (1, 2):
        want = causal().generate(**prompt, task_ids=ids, num_beams=beams)
        assert torch.equal(model.generate(**prompt, task_ids=ids, num_beams=beams), want)


def test_a_model_that_does_not_take_them_does_not_get_them():
    model = adapted(llama(), task_type="CAUSAL_LM")
    assert model(**CASES["llama"].inputs(), task_ids=[0, 1, 0]).logits.shape == (3, 5, 61)
