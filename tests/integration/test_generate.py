"""`generate` of a mixed batch equals, row by row, `generate` of the dense model of the row's task, in every mode."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import tiny
import torch
from adapters import GATES, adapt, poly, spread
from peft import inject_adapter_in_model
from tiny import CASES, TASKS, VOCAB, naive_merge
from torch import nn

from peft_poly import PolyConfig, PolyLayer, use_task

MIXED = [2, 0, 1]
MODELS = ["t5", "llama", "gpt2"]
LENGTH = {"max_new_tokens": 6, "do_sample": False}
MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 3, "num_return_sequences": 3},
    "beams that stop early": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}  # fmt: skip
RANDOM = {
    "sampling": {"num_beams": 1},
    "several samples": {"num_return_sequences": 3},
    "sampling with beams": {"num_beams": 3},
    "several samples with beams": {"num_beams": 4, "num_return_sequences": 2, "top_k": 10, "temperature": 1.5},
}


def sharpen(base: nn.Module) -> nn.Module:
    """Larger weights: the logits of a fresh tiny model are almost equal, and so would be its tokens for all tasks."""
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.6)
    return base.eval()


def config(case: str, **settings) -> PolyConfig:
    """A large scale, for the tasks' tokens to differ."""
    return poly(case, task_names=TASKS, r=4, lora_alpha=40, **{"n_splits": 2, **settings})


def adapted(case: str, **settings) -> peft.PeftModel:
    return adapt(sharpen(CASES[case].make()), config(case, **settings))


KINDS = {**{case: (case, {}) for case in MODELS}, "llama with gates": ("llama", GATES), "t5 with gates": ("t5", GATES)}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request) -> peft.PeftModel:
    torch.manual_seed(0)
    case, settings = request.param
    return adapted(case, **settings)


@pytest.fixture(scope="module")
def llama() -> peft.PeftModel:
    torch.manual_seed(0)
    return adapted("llama")


def prompt(model: nn.Module, rows: int = 3) -> dict[str, torch.Tensor]:
    """The same words in every row: what differs between rows is their task alone."""
    ids = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(7)).repeat(rows, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def case_of(model: nn.Module) -> str:
    return base_of(model).config.model_type


@functools.lru_cache(maxsize=16)
def dense(model: nn.Module, task: int) -> nn.Module:
    merged = naive_merge(base_of(model), task)
    assert not any(isinstance(module, PolyLayer) for module in merged.modules())
    return merged


def row_by_row(model: nn.Module, inputs: dict, tasks: list[int], **kwargs) -> list[torch.Tensor]:
    """What the dense model of each row's task generates for that row by itself: `n` sequences a row."""
    rows = []
    for row, task in enumerate(tasks):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        rows.extend(dense(model, task).generate(**one, **LENGTH | kwargs))
    return rows


def same_tokens(got: torch.Tensor, wanted: list[torch.Tensor], pad: int = 0) -> None:
    """Equal but for the padding of rows that ended early."""
    assert len(got) == len(wanted)
    for one, other in zip(got.tolist(), (row.tolist() for row in wanted), strict=True):
        shared = min(len(one), len(other))
        assert one[:shared] == other[:shared]
        assert set(one[shared:] + other[shared:]) <= {pad}


def distinct(rows: list[torch.Tensor]) -> int:
    return len({tuple(row.tolist()) for row in rows})


# -------------------------------------------------------------------------------------------------- deterministic
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_mixed_batch_generates_what_each_task_generates_alone(model, mode):
    inputs = prompt(model)
    wanted = row_by_row(model, inputs, MIXED, **mode)
    assert distinct(wanted) >= 3  # the tasks say different things
    for task_ids in (MIXED, [TASKS[task] for task in MIXED], torch.tensor(MIXED)):
        same_tokens(model.generate(**inputs, **LENGTH, **mode, task_ids=task_ids), wanted)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_one_task_for_the_batch_and_the_used_and_the_set_task(model, mode):
    inputs, mode = prompt(model), MODES[mode]
    wanted = row_by_row(model, inputs, [1, 1, 1], **mode)
    same_tokens(model.generate(**inputs, **LENGTH, **mode, task_ids="sst2"), wanted)
    with model.use_task(1):
        same_tokens(model.generate(**inputs, **LENGTH, **mode), wanted)
    model.set_task("sst2")
    same_tokens(model.generate(**inputs, **LENGTH, **mode), wanted)
    mixed = row_by_row(model, inputs, MIXED, **mode)
    same_tokens(model.generate(**inputs, **LENGTH, **mode, task_ids=MIXED), mixed)
    with model.use_task(MIXED):
        same_tokens(model.generate(**inputs, **LENGTH, **mode), mixed)
    model.set_task(None)


def test_the_prompt_can_be_positional_or_named_inputs(model):
    inputs = prompt(model)
    wanted = row_by_row(model, inputs, MIXED)
    same_tokens(model.generate(inputs=inputs["input_ids"], **LENGTH, task_ids=MIXED), wanted)
    if case_of(model) != "t5":  # PEFT's generate for T5 takes no positional arguments
        same_tokens(model.generate(inputs["input_ids"], **LENGTH, task_ids=MIXED), wanted)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_plain_peft_model_generates_too(case, mode):
    base = sharpen(CASES[case].make())
    settings = config(case)
    settings.task_type = None
    model = adapt(base, settings)
    assert type(model) is peft.PeftModel
    inputs = prompt(model)
    wanted = row_by_row(model, inputs, MIXED, **MODES[mode])
    same_tokens(model.generate(**inputs, **LENGTH, **MODES[mode], task_ids=MIXED), wanted)


ADDED = pytest.param("added by transformers", marks=pytest.mark.transformers_door)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("mode", ["greedy", "several returned"])
@pytest.mark.parametrize("how", ["injected", ADDED])
def test_a_model_without_a_peft_model_generates_inside_use_task(case, mode, how):
    base = sharpen(CASES[case].make())
    if how == "injected":
        inject_adapter_in_model(config(case), base)
    else:
        base.add_adapter(config(case))
    spread(base.eval())
    inputs = prompt(base)
    wanted = row_by_row(base, inputs, MIXED, **MODES[mode])
    with use_task(base, MIXED):
        same_tokens(base.generate(**inputs, **LENGTH, **MODES[mode]), wanted)
    with pytest.raises(ValueError, match="No task is known"):
        base.generate(**inputs, **LENGTH)


def test_the_wrapped_model_generates_inside_use_task(model):
    inputs = prompt(model)
    wanted = row_by_row(model, inputs, MIXED, num_beams=2)
    with model.use_task(MIXED):
        same_tokens(model.get_base_model().generate(**inputs, **LENGTH, num_beams=2), wanted)
    same_tokens(model.base_model.generate(**inputs, **LENGTH, num_beams=2, task_ids=MIXED), wanted)


# ------------------------------------------------------------------------------------------------------- sampling
class DenseRows(nn.Module):
    """A linear layer with a weight for each row of the batch; where rows are repeated, their weights are."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.weight = layers[0].weight  # T5 looks at its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = x.shape[0] // len(self.layers)
        assert times * len(self.layers) == x.shape[0]
        return torch.stack([self.layers[row // times](x[row]) for row in range(x.shape[0])])


def dense_batch(model: nn.Module, tasks: list[int]) -> nn.Module:
    """One model that serves the whole batch, so that it draws the same random numbers."""
    merged = [dense(model, task) for task in tasks]
    whole = copy.deepcopy(merged[0])
    for name, layer in base_of(model).named_modules():
        if isinstance(layer, PolyLayer):
            rows = DenseRows([one.get_submodule(name) for one in merged])
            setattr(whole.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], rows)
    return whole


def seeded(generate, **kwargs) -> torch.Tensor:
    torch.manual_seed(11)
    return generate(**kwargs, max_new_tokens=6, do_sample=True)


@pytest.mark.parametrize("mode", RANDOM.values(), ids=RANDOM.keys())
def test_with_one_seed_a_mixed_batch_samples_what_dense_layers_sample(model, mode):
    inputs = prompt(model)
    reference = dense_batch(model, MIXED)
    wanted = seeded(reference.generate, **inputs, **mode)
    assert len(wanted) == 3 * mode.get("num_return_sequences", 1)
    assert torch.equal(seeded(model.generate, **inputs, **mode, task_ids=MIXED), wanted)
    with model.use_task(MIXED):
        assert torch.equal(seeded(model.generate, **inputs, **mode), wanted)


def test_the_reference_of_the_sampling_tests_is_the_one_of_the_others(model):
    inputs = prompt(model)
    got = dense_batch(model, MIXED).generate(**inputs, **LENGTH, num_beams=3)
    same_tokens(got, row_by_row(model, inputs, MIXED, num_beams=3))


# --------------------------------------------------------------------------------------------- prompts and caches
@pytest.mark.parametrize("mode", ["greedy", "several returned", "static cache"])
def test_left_padded_prompts(llama, mode):
    lengths = [5, 2, 4]
    inputs = prompt(llama)
    mask = torch.stack([torch.cat([torch.zeros(5 - n), torch.ones(n)]) for n in lengths]).long()
    padded = {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
    got = llama.generate(**padded, **LENGTH, **MODES[mode], task_ids=MIXED)
    n = MODES[mode].get("num_return_sequences", 1)
    for row, (length, task) in enumerate(zip(lengths, MIXED, strict=True)):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, 5 - length :]}
        wanted = dense(llama, task).generate(**alone, **LENGTH, **MODES[mode])
        same_tokens(got[n * row : n * (row + 1), 5 - length :], list(wanted))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_embeddings_as_the_prompt(llama, mode):
    inputs = prompt(llama)
    embeddings = llama.get_base_model().get_input_embeddings()(inputs["input_ids"]).detach()
    wanted = [row[5:] for row in row_by_row(llama, inputs, MIXED, **MODES[mode])]
    got = llama.generate(inputs_embeds=embeddings, **LENGTH, **MODES[mode], task_ids=MIXED)
    same_tokens(got, wanted)
    with pytest.raises(ValueError, match="task_ids has 2 entries but the batch has 3 rows"):
        llama.generate(inputs_embeds=embeddings, **LENGTH, task_ids=[0, 1])


@pytest.mark.parametrize("task", [0, 2])
def test_tokens_looked_up_in_the_prompt(llama, task):
    ids = prompt(llama, 1)["input_ids"].repeat(1, 3)
    wanted = row_by_row(llama, {"input_ids": ids}, [task])
    same_tokens(llama.generate(input_ids=ids, **LENGTH, prompt_lookup_num_tokens=3, task_ids=[task]), wanted)


@pytest.mark.parametrize("task", [0, 2])
@pytest.mark.parametrize("assistant", ["another model", "the base model", "an adapted model"])
def test_an_assistant_proposes_tokens(llama, task, assistant):
    inputs = prompt(llama, 1)
    wanted = row_by_row(llama, inputs, [task])
    helper = {
        "another model": lambda: sharpen(tiny.llama()),
        "the base model": lambda: copy.deepcopy(llama).unload(),
        "an adapted model": lambda: copy.deepcopy(llama),
    }[assistant]()
    if assistant == "an adapted model":
        helper.set_task(1)
        helper = helper.get_base_model()
    got = llama.generate(**inputs, **LENGTH, assistant_model=helper, task_ids=[task])
    same_tokens(got, wanted)


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 2, 0, 1, 2]])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generate_refuses_as_many_ids_as_there_are_no_rows(model, bad, mode):
    inputs = prompt(model)
    with pytest.raises(ValueError, match=f"task_ids has {len(bad)} entries but the batch has 3 rows"):
        model.generate(**inputs, **LENGTH, **MODES[mode], task_ids=bad)
    with pytest.raises(ValueError, match="No task is known"):
        model.generate(**inputs, **LENGTH, **MODES[mode])


def test_rows_are_not_repeated_outside_of_generation(model):
    inputs = CASES[case_of(model)].inputs(rows=6)
    model.generate(**prompt(model), **LENGTH, num_beams=2, task_ids=MIXED)
    with pytest.raises(ValueError, match="task_ids has 3 entries but the batch has 6 rows"):
        model(**inputs, task_ids=MIXED)
    with (
        model.use_task(MIXED),
        pytest.raises(ValueError, match=r"task_ids has 3 entries but the input of .* has 6 rows"),
    ):
        model(**inputs)


def test_a_failed_generation_leaves_nothing_behind(model):
    inputs = prompt(model)

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(**inputs, **LENGTH, num_beams=2, task_ids=MIXED, logits_processor=[fail])
    with pytest.raises(ValueError, match="No task is known"):
        model.generate(**inputs, **LENGTH)
    inputs = CASES[case_of(model)].inputs(rows=6)
    with model.use_task(MIXED), pytest.raises(ValueError, match=r"3 entries but the input of .* has 6 rows"):
        model(**inputs)
