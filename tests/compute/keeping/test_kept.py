"""What is kept in a `generate`: each layer mixes once, nothing outlives the call, and nothing that is kept is stale."""

from __future__ import annotations

import gc
import threading
import weakref

import peft
import pytest
import torch
import transformers as tf
from adapters import adapt, poly, spread
from tiny import CASES, TASKS
from torch import nn

import peft_poly
from peft_poly import PolyLayer
from peft_poly.compute.keeping.kept import Kept, Shortcut
from peft_poly.compute.kinds import mixture
from peft_poly.tasks.batch import kept_in_generation

NEW = 5
MODES = {
    "greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"}, "no cache": {"use_cache": False},
}  # fmt: skip
IDS = {"one task": "sst2", "runs": [2, 0, 1], "any order": [2, 0, 2]}


def make_model(case: str, **settings) -> peft.PeftModel:
    """With logits large enough for tasks to differ in their tokens."""
    base = CASES[case].make()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.6)
    return adapt(base.eval(), poly(case, task_names=TASKS, r=4, n_splits=2, lora_alpha=40, **settings))


def layers_of(model: nn.Module) -> list[PolyLayer]:
    return [module for module in model.modules() if isinstance(module, PolyLayer)]


def prompt(case: str, rows: int = 3) -> dict[str, torch.Tensor]:
    inputs = CASES[case].inputs(rows=rows)
    inputs.pop("decoder_input_ids", None)
    return inputs


def generate(model, case, ids, **settings):
    rows = settings.pop("rows", 3)
    return model.generate(
        **prompt(case, rows), task_ids=ids, **{"max_new_tokens": NEW, "min_new_tokens": NEW, **settings}
    )


@pytest.fixture
def mixes(monkeypatch):
    """The sizes `(g, h, k)` of the mixing weights of each time that skills of A were mixed."""
    sizes = []

    def counting(mix):
        return lambda w, *rest, **more: (sizes.append(tuple(w.shape)), mix(w, *rest, **more))[1]

    for module, name in ((mixture, "mix_A"), (mixture, "mix_one")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return sizes


class TestOnce:
    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    @pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
    @pytest.mark.parametrize("case", ["t5", "llama", "gpt2"])
    def test_each_layer_mixes_once_for_each_distinct_task(self, case, ids, mode, mixes):
        model = make_model(case)
        generate(model, case, ids, **mode)
        assert len(mixes) == len(layers_of(model))
        assert {size[0] for size in mixes} == {1 if isinstance(ids, str) else len(set(ids))}

    def test_each_call_mixes_anew(self, mixes):
        model = make_model("llama")
        for _ in range(3):
            generate(model, "llama", [0, 1, 2])
        assert len(mixes) == 3 * len(layers_of(model))

    def test_forwards_outside_of_generation_keep_nothing(self, mixes):
        model = make_model("llama")
        with torch.no_grad():
            for _ in range(3):
                model(**prompt("llama"), task_ids=[0, 1, 2])
        assert len(mixes) == 3 * len(layers_of(model))
        assert kept_in_generation() is None

    def test_two_active_adapters_are_each_mixed_once(self, mixes):
        model = make_model("llama")
        model.add_adapter("other", poly("llama", task_names=TASKS, r=2))
        model.base_model.set_adapter(["default", "other"])
        generate(model, "llama", [2, 0, 1])
        assert len(mixes) == 2 * len(layers_of(model))

    def test_a_generate_inside_a_generate(self, mixes):
        model, inner = make_model("llama"), []

        def nested(ids, scores):
            if not inner:
                inner.append(generate(model, "llama", [1, 1, 0]))
            return scores

        out = generate(model, "llama", [2, 0, 1], logits_processor=[nested])
        assert torch.equal(inner[0], generate(model, "llama", [1, 1, 0]))
        assert torch.equal(out, generate(model, "llama", [2, 0, 1]))


def half(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "poly_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


class TestHalfPrecision:
    """A base model in bfloat16, an adapter in float32: what PEFT makes of most models."""

    @pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_tokens_go_the_short_way_and_come_out_as_from_forwards(self, ids, use_cache, monkeypatch):
        model, gone, go = make_model("llama"), [], Shortcut.go
        half(model)
        monkeypatch.setattr(Shortcut, "go", lambda *args: (gone.append(args[2].shape), go(*args))[1])
        settings = {"use_cache": use_cache, "return_dict_in_generate": True, "output_logits": True}
        out = generate(model, "llama", ids, **settings)
        assert len(gone) == (NEW - 2) * len(layers_of(model))
        with torch.no_grad():
            logits = model(input_ids=out.sequences[:, :-1], task_ids=ids).logits[:, -NEW:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1), logits.float(), rtol=0.05, atol=0.5)

    def test_who_wants_no_cast_gets_none_from_the_next_token_on(self):
        model = half(make_model("llama"))

        def forbid(ids, scores):
            if ids.shape[1] > prompt("llama")["input_ids"].shape[1] + 2:
                for adapted in layers_of(model):
                    adapted.cast_input_dtype_enabled = False
            return scores

        with pytest.raises(RuntimeError, match=r"BFloat16|same dtype"):
            generate(model, "llama", "sst2", logits_processor=[forbid])


class TestNothingStays:
    def test_the_mixed_pairs_go_with_the_call(self, monkeypatch):
        made, mix = [], mixture.mix_A

        def noting(*args, **more):
            pair = mix(*args, **more)
            made.append(weakref.ref(pair))
            return pair

        monkeypatch.setattr(mixture, "mix_A", noting)
        generate(make_model("llama"), "llama", [2, 0, 1])
        gc.collect()
        assert made
        assert not any(ref() is not None for ref in made)
        assert kept_in_generation() is None

    def test_also_when_it_fails(self):
        def refuse(ids, scores):
            raise KeyError("no")

        with pytest.raises(KeyError, match="no"):
            generate(make_model("llama"), "llama", [2, 0, 1], logits_processor=[refuse])
        assert kept_in_generation() is None

    @pytest.mark.parametrize("rows", [3, 48])
    def test_memory_is_bounded_by_distinct_tasks_not_rows(self, rows):
        model, sizes = make_model("llama"), []

        def look(ids, scores):
            entries = [entry for entry in kept_in_generation().values() if isinstance(entry, Kept)]
            sizes.append({tuple(map(len, entry.values)) for entry in entries})
            sizes.append(len(entries))
            return scores

        generate(model, "llama", [2, 0, 2] * (rows // 3), rows=rows, num_beams=2, logits_processor=[look])
        assert sizes == [{(2, 2)}, len(layers_of(model))] * NEW

    def test_threads_do_not_share(self):
        model, seen = make_model("llama"), []

        def look(ids, scores):
            seen.append(id(kept_in_generation()))
            barrier.wait(timeout=60)
            return scores

        barrier = threading.Barrier(2)
        threads = [
            threading.Thread(target=generate, args=(model, "llama", task), kwargs={"logits_processor": [look]})
            for task in ("rte", "sst2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 2 * NEW
        assert len(set(seen)) == 2


# ---------------------------------------------------------------------------------------------------- never stale
def with_optimizer(model):
    parameters = [
        p for each in layers_of(model) for p in (each.poly_lora_B["default"], each.poly_router["default"].module_logits)
    ]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
    torch.optim.AdamW(parameters, lr=0.5).step()


def in_place(model):
    for each in layers_of(model):
        with torch.no_grad():
            each.poly_lora_A["default"].mul_(-1.5)


def the_router_in_place(model):
    for each in layers_of(model):
        with torch.no_grad():
            each.poly_router["default"].module_logits.neg_()


def by_data(model):
    for each in layers_of(model):
        each.poly_lora_B["default"].data = -each.poly_lora_B["default"].data


def by_data_twice(model):
    """The second tensor would get the memory of the first, were it free."""
    for each in layers_of(model):
        parameter = each.poly_lora_B["default"]
        for factor in (2.0, -1.0):
            parameter.data = parameter.data * factor


def by_a_state_dict(model):
    state = {name: -tensor if "lora_B" in name else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def by_a_state_dict_that_is_assigned(model):
    state = {name: -tensor if "lora_B" in name else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def with_a_new_parameter(model):
    for each in layers_of(model):
        each.poly_lora_B["default"] = nn.Parameter(-each.poly_lora_B["default"].detach())


def with_another_router(model):
    for each in layers_of(model):
        each.poly_router["default"] = each.poly_router["other"]


def to_another_adapter(model):
    model.set_adapter("other")


def disabled(model):
    model.base_model.disable_adapter_layers()


def scaled(model):
    for each in layers_of(model):
        each.scale_layer(-0.5)


def merged(model):
    model.merge_adapter(task="rte")


def to_double(model):
    model.double()


CHANGES = [
    with_optimizer, in_place, the_router_in_place, by_data, by_data_twice, by_a_state_dict,
    by_a_state_dict_that_is_assigned, with_a_new_parameter, with_another_router, to_another_adapter, disabled, scaled,
]  # fmt: skip
STEP = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def two_adapters() -> peft.PeftModel:
    torch.manual_seed(2)
    model = make_model("llama")
    model.add_adapter("other", poly("llama", task_names=TASKS, r=4, n_splits=2, lora_alpha=40))
    spread(model.eval(), seed=5)
    model.set_adapter("default")
    return model


class LastLogits(tf.LogitsProcessor):
    """Keeps the logits of every token, and changes the model before the third."""

    def __init__(self, model, change):
        self.model, self.change, self.logits, self.tokens = model, change, [], []

    def __call__(self, ids, scores):
        self.logits.append(scores.clone())
        self.tokens.append(ids.clone())
        if len(self.logits) == 2 and self.change is not None:
            self.change(self.model)
        return scores


def close(scores: torch.Tensor, logits: torch.Tensor) -> None:
    """Where no processor ruled a token out."""
    assert scores.isfinite().sum() > scores.numel() / 2
    torch.testing.assert_close(scores.to(logits)[scores.isfinite()], logits[scores.isfinite()], rtol=1e-4, atol=1e-3)


@STEP
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_change_between_two_calls_is_seen(change, ids):
    model, fresh = two_adapters(), two_adapters()
    before = generate(model, "llama", ids)
    change(model)
    change(fresh)
    after = generate(model, "llama", ids)
    assert torch.equal(after, generate(fresh, "llama", ids))
    assert not torch.equal(after, before)


@STEP
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_change_inside_a_call_is_seen_by_the_next_token(change, ids):
    model, fresh = two_adapters(), two_adapters()
    if isinstance(ids, str):
        model.set_task(ids)
        fresh.set_task(ids)
    processor = LastLogits(model, change)
    generate(model, "llama", ids, logits_processor=[processor], use_cache=False)
    change(fresh)
    with torch.no_grad():
        expected = fresh(processor.tokens[2], task_ids=ids).logits[:, -1]
    close(processor.logits[2], expected)
    with torch.no_grad():
        old = two_adapters()(processor.tokens[2], task_ids=ids).logits[:, -1]
    assert (old - expected).abs().max() > 0.1


@pytest.mark.parametrize("change", [merged, to_double], ids=lambda change: change.__name__)
def test_a_merge_or_a_move_inside_a_call_is_seen_by_the_next_token(change):
    model, fresh = two_adapters(), two_adapters()
    processor = LastLogits(model, change)
    generate(model, "llama", "rte", logits_processor=[processor], use_cache=False)
    change(fresh)
    with torch.no_grad():
        expected = fresh(processor.tokens[2], task_ids="rte").logits[:, -1]
    close(processor.logits[2], expected)


def test_a_stopping_criterion_that_edits_is_seen_too():
    model, fresh = two_adapters(), two_adapters()

    class Editing(tf.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            if ids.shape[1] == 5 + 2:
                in_place(model)
            return torch.zeros(len(ids), dtype=torch.bool)

    processor = LastLogits(model, None)
    criteria = tf.StoppingCriteriaList([Editing()])
    generate(model, "llama", [2, 0, 1], logits_processor=[processor], stopping_criteria=criteria, use_cache=False)
    in_place(fresh)
    with torch.no_grad():
        expected = fresh(processor.tokens[2], task_ids=[2, 0, 1]).logits[:, -1]
    close(processor.logits[2], expected)


def test_parameters_made_in_inference_mode_whose_edits_leave_no_trace_are_mixed_for_every_token(mixes):
    with torch.inference_mode():
        model = make_model("llama")
        for layer in layers_of(model):
            layer.poly_lora_A._parameters["default"] = nn.Parameter(layer.poly_lora_A["default"].clone())
        generate(model, "llama", [2, 0, 1], use_cache=False)
    assert len(mixes) == NEW * len(layers_of(model))


def test_a_forward_for_other_tasks_inside_a_call_gets_its_own_pairs():
    model, results = make_model("llama"), []

    def look(ids, scores):
        with torch.no_grad():
            results.append(model(**prompt("llama"), task_ids=[1, 1, 0]).logits)
        return scores

    out = generate(model, "llama", [2, 0, 1], logits_processor=[look])
    with torch.no_grad():
        expected = model(**prompt("llama"), task_ids=[1, 1, 0]).logits
    assert torch.equal(out, generate(model, "llama", [2, 0, 1]))
    for result in results:
        torch.testing.assert_close(result, expected)


def test_a_hook_put_on_a_base_layer_inside_a_call_sees_the_next_tokens():
    model, seen = make_model("llama"), []
    base = layers_of(model)[0].base_layer

    def put(ids, scores):
        if ids.shape[1] == 5 + 1:
            base.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
        return scores

    generate(model, "llama", [2, 0, 1], logits_processor=[put])
    assert len(seen) == NEW - 2
    assert all(torch.equal(*pair) for pair in seen)


def test_generation_inside_use_task_keeps_too(mixes):
    model = make_model("llama")
    with peft_poly.use_task(model, "sst2"):
        model.base_model.model.generate(**prompt("llama"), max_new_tokens=NEW, min_new_tokens=NEW)
    assert len(mixes) == len(layers_of(model))
