"""Every way into a model takes the tasks of the rows: a mixed batch equals, row by row, dense models merged naively."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny
import torch
import transformers as tf
from adapters import GATES, poly, spread
from peft import inject_adapter_in_model
from tiny import CASES, TASKS, VOCAB, first, naive_merge
from torch import nn

import peft_poly
from peft_poly import PolyConfig, PolyModel, use_task

MIXED = [2, 0, 1]
FORMS = {
    "tensor": torch.tensor(MIXED),
    "column": torch.tensor([[2], [0], [1]]),
    "int32": torch.tensor(MIXED, dtype=torch.int32),
    "names": [TASKS[task] for task in MIXED],
}


def bert_as(name: str, num_labels: int = 3):
    def make() -> nn.Module:
        config = tiny.bert_config()
        config.initializer_range, config.num_labels = 0.2, num_labels
        return getattr(tf, name)(config)

    return make


def mpt() -> nn.Module:
    config = tf.MptConfig(d_model=16, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=VOCAB, expansion_ratio=2)
    return tf.MptForCausalLM(config)


BERT = ["query", "key", "value", "dense"]
token_model, qa_model = bert_as("BertForTokenClassification"), bert_as("BertForQuestionAnswering", num_labels=2)
# door: how to make the model, its target modules, PEFT's task type and class
DOORS = {
    "sequence classification": (tiny.bert, BERT, "SEQ_CLS", peft.PeftModelForSequenceClassification),
    "token classification": (token_model, BERT, "TOKEN_CLS", peft.PeftModelForTokenClassification),
    "question answering": (qa_model, BERT, "QUESTION_ANS", peft.PeftModelForQuestionAnswering),
    "feature extraction": (bert_as("BertModel"), BERT, "FEATURE_EXTRACTION", peft.PeftModelForFeatureExtraction),
    "causal": (tiny.llama, CASES["llama"].target_modules, "CAUSAL_LM", peft.PeftModelForCausalLM),
    "causal, Conv1D": (tiny.gpt2, CASES["gpt2"].target_modules, "CAUSAL_LM", peft.PeftModelForCausalLM),
    "causal, MPT": (mpt, ["Wqkv", "out_proj", "up_proj", "down_proj"], "CAUSAL_LM", peft.PeftModelForCausalLM),
    "sequence to sequence": (tiny.t5, CASES["t5"].target_modules, "SEQ_2_SEQ_LM", peft.PeftModelForSeq2SeqLM),
    "plain, encoder": (tiny.bert, BERT, None, peft.PeftModel),
    "plain, decoder": (tiny.llama, CASES["llama"].target_modules, None, peft.PeftModel),
    "plain, custom module": (tiny.MLP, ["lin0", "lin1"], None, peft.PeftModel),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():  # kernels for training round otherwise, and some of these outputs are compared bit by bit
        yield


def config(target_modules: list[str], **settings) -> PolyConfig:
    settings = {"r": 4, "n_skills": 3, "n_splits": 2, "task_names": TASKS, "init_weights": False, **settings}
    return PolyConfig(target_modules=target_modules, **settings)


def inputs_for(model: nn.Module, rows: int = 3) -> dict[str, torch.Tensor]:
    base = getattr(model, "get_base_model", lambda: model)()
    kind = {tiny.MLP: "mlp", tf.T5ForConditionalGeneration: "t5"}.get(type(base), "bert")
    return CASES[kind].inputs(rows)


def tensor(output) -> torch.Tensor:
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.last_hidden_state if hasattr(output, "pooler_output") else first(output)


def dense_rows(model: nn.Module, inputs: dict[str, torch.Tensor], tasks: list[int], **kwargs) -> torch.Tensor:
    """Row by row, the output of a base model into which the row's task was merged by a naive loop."""
    base = getattr(model, "get_base_model", lambda: model)()
    rows = []
    for row, task in enumerate(tasks):
        dense = naive_merge(base, task, **kwargs)
        assert not any(isinstance(module, peft_poly.PolyLayer) for module in dense.modules())
        rows.append(tensor(dense(**{name: value[row : row + 1] for name, value in inputs.items()})))
    return torch.cat(rows)


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def tell_apart(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """The tasks must differ by far more than the tolerance, or equality says nothing."""
    outputs = [dense_rows(model, {name: value[:1] for name, value in inputs.items()}, [task]) for task in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ PeftModels
GATED = ("causal, Conv1D", "sequence to sequence", "plain, custom module")
KINDS = {**{name: (name, {}) for name in DOORS}, **{f"gates: {name}": (name, GATES) for name in GATED}}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def door(request) -> peft.PeftModel:
    name, settings = request.param
    make, target_modules, task_type, peft_class = DOORS[name]
    model = spread(peft.get_peft_model(make(), config(target_modules, task_type=task_type, **settings)).eval())
    assert type(model) is peft_class
    return model


def test_every_peft_model_takes_task_ids(door):
    inputs = inputs_for(door)
    wanted = dense_rows(door, inputs, MIXED)
    tell_apart(door, inputs)
    for task_ids in FORMS.values():
        same(tensor(door(**inputs, task_ids=task_ids)), wanted)
    same(tensor(door.forward(**inputs, task_ids=MIXED)), wanted)  # past the hooks of nn.Module
    same(tensor(door.base_model(**inputs, task_ids=MIXED)), wanted)
    for one in (1, "sst2"):
        same(tensor(door(**inputs, task_ids=one)), dense_rows(door, inputs, [1, 1, 1]))


def test_every_peft_model_takes_the_used_and_the_set_task(door):
    inputs = inputs_for(door)
    wanted = dense_rows(door, inputs, MIXED)
    with door.use_task(MIXED):
        same(tensor(door(**inputs)), wanted)
        same(tensor(door.get_base_model()(**inputs)), wanted)
    door.set_task("boolq")
    same(tensor(door(**inputs)), dense_rows(door, inputs, [2, 2, 2]))
    same(tensor(door(**inputs, task_ids=MIXED)), wanted)


def test_every_peft_model_refuses_what_does_not_fit(door):
    inputs = inputs_for(door)
    with pytest.raises(ValueError, match="No task is known for this call"):
        door(**inputs)
    for bad, message in (
        ([0, 1], "task_ids has 2 entries but the (batch|input of .*) has 3 rows"),
        ([0, 1, 2, 0, 1, 2], "task_ids has 6 entries but the (batch|input of .*) has 3 rows"),
        ([0, 1, 3], r"must lie in \[0, 2\], got 3"),
        (["rte", "rte", "st2"], "Did you mean 'sst2'"),
    ):
        with pytest.raises(ValueError, match=message):
            door(**inputs, task_ids=bad)


def test_a_disabled_adapter_needs_no_task(door):
    inputs = inputs_for(door)
    base = copy.deepcopy(door).unload()
    with door.disable_adapter():
        assert torch.equal(tensor(door(**inputs)), tensor(base(**inputs)))
        assert torch.equal(tensor(door(**inputs, task_ids=MIXED)), tensor(base(**inputs)))


def test_positional_inputs_count_as_rows():
    model = spread(peft.get_peft_model(tiny.MLP(), config(["lin0", "lin1"])).eval())
    x = inputs_for(model)["x"]
    same(model(x, task_ids=MIXED), dense_rows(model, {"x": x}, MIXED))
    with pytest.raises(ValueError, match="task_ids has 2 entries but the batch has 3 rows"):
        model(x, task_ids=[0, 1])


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 5), (3, 2, 2, 5)], ids=str)
def test_inputs_of_two_to_five_dimensions_keep_their_rows(shape):
    model = spread(peft.get_peft_model(tiny.MLP(), config(["lin0", "lin1"])).eval())
    x = torch.randn(*shape, 16)
    same(model(x, task_ids=MIXED), dense_rows(model, {"x": x}, MIXED))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_embeddings_instead_of_ids(task_type):
    model = spread(peft.get_peft_model(tiny.llama(), config(CASES["llama"].target_modules, task_type=task_type)).eval())
    inputs = {"inputs_embeds": torch.randn(3, 5, 16)}
    same(tensor(model(**inputs, task_ids=MIXED)), dense_rows(model, inputs, MIXED))
    with pytest.raises(ValueError, match="task_ids has 2 entries but the batch has 3 rows"):
        model(**inputs, task_ids=[0, 1])


def choices() -> tuple[peft.PeftModel, dict[str, torch.Tensor]]:
    base = bert_as("BertForMultipleChoice")()
    model = spread(peft.get_peft_model(base, config(BERT)).eval())
    return model, {"input_ids": torch.randint(3, VOCAB, (3, 4, 5))}


@pytest.mark.parametrize(("task_ids", "tasks"), [(MIXED, MIXED), (torch.tensor(MIXED), MIXED), (1, [1, 1, 1])])
def test_the_choices_of_a_question_have_its_task(task_ids, tasks):
    model, inputs = choices()
    wanted = dense_rows(model, inputs, tasks)
    same(tensor(model(**inputs, task_ids=task_ids)), wanted)
    with model.use_task(task_ids):
        same(tensor(model(**inputs)), wanted)


def test_the_choices_are_no_rows():
    model, inputs = choices()
    with pytest.raises(ValueError, match="task_ids has 4 entries but the batch has 3 rows"):
        model(**inputs, task_ids=[0, 1, 2, 0])


# ------------------------------------------------------------------------------------------- without a PeftModel
@pytest.mark.parametrize("case", CASES)
def test_the_tuner_by_itself(case):
    settings = config(CASES[case].target_modules)
    model = spread(PolyModel(CASES[case].make(), {"default": settings}, "default").eval())
    inputs = CASES[case].inputs()
    wanted = dense_rows(model.model, inputs, MIXED)
    same(tensor(model(**inputs, task_ids=MIXED)), wanted)
    with model.use_task(MIXED):
        same(tensor(model(**inputs)), wanted)
    with pytest.raises(ValueError, match="No task is known"):
        model(**inputs)


@pytest.mark.parametrize("case", CASES)
def test_an_injected_model(case):
    model = spread(inject_adapter_in_model(config(CASES[case].target_modules), CASES[case].make()).eval())
    inputs = CASES[case].inputs()
    wanted = dense_rows(model, inputs, MIXED)
    for task_ids in FORMS.values():
        with use_task(model, task_ids):
            same(tensor(model(**inputs)), wanted)
    with pytest.raises(ValueError, match="No task is known"):
        model(**inputs)


def test_two_injected_adapters():
    model = inject_adapter_in_model(config(["lin0", "lin1"]), tiny.MLP())
    inject_adapter_in_model(config(["lin1"], r=2, n_tasks=4, task_names=None), model, "other")
    spread(model.eval())
    inputs = inputs_for(model)
    with use_task(model, 3):
        for layer in (model.lin0, model.lin1):
            layer.set_adapter("other")
        same(model(**inputs), dense_rows(model, inputs, [3, 3, 3], adapters=("other",)))
    for layer in (model.lin0, model.lin1):
        layer.set_adapter(["default", "other"])
    with use_task(model, MIXED):
        same(model(**inputs), dense_rows(model, inputs, MIXED, adapters=("default", "other")))
    with pytest.raises(ValueError, match=r"adapter 'default' must lie in \[0, 2\], got 3"), use_task(model, 3):
        pytest.fail("the block was entered")


def test_a_part_of_a_model_that_was_injected_by_itself():
    model = nn.Sequential(tiny.MLP(), nn.Linear(4, 16), tiny.MLP())
    for part in (model[0], model[2]):
        inject_adapter_in_model(config(["lin0", "lin1"]), part)
    spread(model.eval())
    x = torch.randn(3, 5, 16)
    dense = [naive_merge(model, task) for task in range(3)]
    with use_task(model, MIXED):
        same(model(x), torch.cat([dense[task](x[row : row + 1]) for row, task in enumerate(MIXED)]))


# ---------------------------------------------------------------------------------- transformers' own adapter calls
NATIVE = ["t5", "llama", "gpt2", "bert"]


@pytest.mark.transformers_door
@pytest.mark.parametrize("case", NATIVE)
def test_a_model_with_an_adapter_of_transformers(case):
    base = CASES[case].make().eval()
    inputs = CASES[case].inputs()
    plain = tensor(base(**inputs))
    base.add_adapter(poly(case, task_names=TASKS), adapter_name="first")
    spread(base.eval())
    wanted = dense_rows(base, inputs, MIXED, adapters=("first",))
    with use_task(base, MIXED):
        same(tensor(base(**inputs)), wanted)
        base.disable_adapters()
        assert torch.equal(tensor(base(**inputs)), plain)
        base.enable_adapters()
        same(tensor(base(**inputs)), wanted)
    with pytest.raises(ValueError, match="No task is known"):
        base(**inputs)
    base.disable_adapters()
    assert torch.equal(tensor(base(**inputs)), plain)


@pytest.mark.transformers_door
@pytest.mark.parametrize("case", ["t5", "llama"])
def test_transformers_saves_and_loads_the_adapter(case, tmp_path):
    base = CASES[case].make().eval()
    pristine = copy.deepcopy(base)
    base.add_adapter(poly(case, task_names=TASKS))
    spread(base.eval())
    base.save_pretrained(tmp_path)
    inputs = CASES[case].inputs()
    pristine.load_adapter(str(tmp_path), adapter_name="loaded")
    assert isinstance(pristine.peft_config["loaded"], PolyConfig)
    with use_task(pristine.eval(), ["boolq", "rte", "sst2"]):
        same(tensor(pristine(**inputs)), dense_rows(base, inputs, MIXED))


def test_transformers_loads_what_a_peft_model_saved(tmp_path):
    base = tiny.llama()
    pristine = copy.deepcopy(base)
    model = spread(peft.get_peft_model(base, poly("llama", task_names=TASKS)).eval())
    model.save_pretrained(tmp_path)
    pristine.load_adapter(str(tmp_path))
    inputs = inputs_for(pristine)
    with use_task(pristine.eval(), MIXED):
        same(tensor(pristine(**inputs)), dense_rows(model, inputs, MIXED))


@pytest.mark.transformers_door
def test_adapters_of_transformers_are_switched_and_deleted():
    base, inputs = tiny.llama().eval(), inputs_for(tiny.llama())
    plain = tensor(base(**inputs))
    base.add_adapter(poly("llama", n_tasks=2), adapter_name="two")
    base.add_adapter(poly("llama", n_tasks=5, r=2), adapter_name="five")
    spread(base.eval())
    with use_task(base, [4, 0, 3]):
        same(tensor(base(**inputs)), dense_rows(base, inputs, [4, 0, 3], adapters=("five",)))
    base.set_adapter("two")
    with use_task(base, [1, 0, 1]):
        same(tensor(base(**inputs)), dense_rows(base, inputs, [1, 0, 1], adapters=("two",)))
    with pytest.raises(ValueError, match=r"adapter 'two' must lie in \[0, 1\], got 4"), use_task(base, 4):
        pytest.fail("the block was entered")
    base.set_adapter(["two", "five"])
    with use_task(base, [1, 0, 1]):
        same(tensor(base(**inputs)), dense_rows(base, inputs, [1, 0, 1], adapters=("two", "five")))
    base.delete_adapter("two")
    base.set_adapter("five")
    with use_task(base, 4):
        same(tensor(base(**inputs)), dense_rows(base, inputs, [4, 4, 4], adapters=("five",)))
    base.delete_adapter("five")
    assert torch.equal(tensor(base(**inputs)), plain)


@pytest.mark.transformers_door
def test_a_deleted_adapters_name_can_be_used_again_for_other_tasks():
    base, inputs = tiny.llama().eval(), inputs_for(tiny.llama())
    for n_tasks in (2, 3, 5):
        base.add_adapter(poly("llama", n_tasks=n_tasks))
        spread(base.eval())
        last = n_tasks - 1
        with use_task(base, [last, 0, last]):
            same(tensor(base(**inputs)), dense_rows(base, inputs, [last, 0, last]))
        with pytest.raises(ValueError, match=rf"must lie in \[0, {last}\], got {n_tasks}"), use_task(base, n_tasks):
            pytest.fail("the block was entered")
        base.delete_adapter("default")


@pytest.mark.transformers_door
def test_transformers_keeps_lora_beside_it():
    base, inputs = tiny.llama().eval(), inputs_for(tiny.llama())
    base.add_adapter(poly("llama", task_names=TASKS, target_modules=["q_proj", "o_proj"]), adapter_name="tasks")
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    base.add_adapter(lora, adapter_name="lora")
    spread(base.eval())
    base.set_adapter(["tasks", "lora"])
    with use_task(base, MIXED):
        same(tensor(base(**inputs)), dense_rows(base, inputs, MIXED, adapters=("tasks",)))
