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


def test_ids_that_do_not_fit_the_batches_are_an_error(model):
    with pytest.raises(ValueError, match="task_ids has 4 entries but"):
        pipe(model)(TEXTS, task_ids=["rte", "boolq", "rte", "rte"])
    mixed = pipe(model)(TEXTS, task_ids=["rte", "boolq", "rte", "rte"], batch_size=4)
    rows = zip(scores(model, "rte"), scores(model, "boolq"), strict=True)
    assert [row["score"] for row in mixed] == pytest.approx([(a, b)[i == 1] for i, (a, b) in enumerate(rows)], rel=1e-4)


def test_other_models_are_left_alone():
    found = pipe(CASES["bert"].make().eval())(TEXTS)
    assert len(found) == 4
