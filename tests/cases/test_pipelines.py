"""`task_ids` given to a pipeline of transformers, which would hand them to its tokenizer."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import adapt, poly
from rows import tokenizer
from tiny import CASES, TASKS

from peft_poly import use_task

TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14"]


@pytest.fixture(params=["typed", "set task"])
def model(request):
    torch.manual_seed(0)
    found = adapt(CASES["bert"].make(), poly("bert", task_names=TASKS, n_tasks=None))
    if request.param == "set task":
        found.set_task("sst2")  # what the call says goes before it
    return found


def pipe(model, **kwargs):
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu", **kwargs)


def scores(model, task) -> list[float]:
    found, tokenize = [], tokenizer()
    for text in TEXTS:
        inputs = tokenize(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            found.append(model(**inputs, task_ids=task).logits.softmax(-1).max().item())
    return found


def test_one_task_for_all_texts_is_heard(model):
    want = pytest.approx(scores(model, "boolq"), rel=1e-4)
    found = pipe(model)
    for size in (1, 2):
        assert [row["score"] for row in found(TEXTS, task_ids="boolq", batch_size=size)] == want
    assert [row["score"] for row in pipe(model, task_ids="boolq")(TEXTS)] == want
    assert [found(text, task_ids="boolq")[0]["score"] for text in TEXTS] == want
    with use_task(model, "boolq"):
        assert [row["score"] for row in found(TEXTS)] == want


def test_what_is_computed_later_has_its_task_too(model):
    later = pipe(model)((text for text in TEXTS), task_ids="boolq")
    assert [row["score"] for row in later] == pytest.approx(scores(model, "boolq"), rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_list_of_tasks_goes_with_the_texts_whatever_their_batches(model, size):
    mixed = pipe(model)(TEXTS, task_ids=["rte", "boolq", "rte", "rte"], batch_size=size)
    rows = zip(scores(model, "rte"), scores(model, "boolq"), strict=True)
    assert [row["score"] for row in mixed] == pytest.approx([(a, b)[i == 1] for i, (a, b) in enumerate(rows)], rel=1e-4)
    with pytest.raises(ValueError, match="`task_ids` has 3 entries and the pipeline was given 4"):
        pipe(model)(TEXTS, task_ids=["rte", "boolq", "rte"], batch_size=size)


def test_ids_that_do_not_fit_the_batches_are_an_error_where_they_do_not_go_with_the_inputs():
    model = adapt(CASES["llama"].make(), poly("llama", task_names=TASKS, n_tasks=None))
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    settings = {"task_ids": ["rte", "boolq", "rte", "rte"], "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(ValueError, match="computes 1 of its 4 rows"):
        write(TEXTS, **settings)
    assert len(write(["w5 w6"] * 4, batch_size=4, **settings)) == 4


@pytest.mark.transformers_door
@pytest.mark.parametrize("tasks", ["boolq", ["boolq"] * 4])
def test_a_model_that_was_given_its_adapter_by_transformers_takes_them_too(tasks):
    torch.manual_seed(0)
    model = CASES["bert"].make().eval()
    model.add_adapter(poly("bert", task_names=TASKS, n_tasks=None))
    model.eval()
    found = [row["score"] for row in pipe(model)(TEXTS, task_ids=tasks)]
    with use_task(model, "boolq"):
        assert [row["score"] for row in pipe(model)(TEXTS)] == pytest.approx(found, rel=1e-4)


def test_other_models_are_left_alone():
    found = pipe(CASES["bert"].make().eval())(TEXTS)
    assert len(found) == 4
