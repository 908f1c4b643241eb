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


TASK_OF_TEXT = ["rte", "boolq", "sst2", "rte"]
MISFITS = [
    (TEXTS, ["rte", "boolq"], "`task_ids` has 2 entries and the pipeline was given 4"),
    (TEXTS[0], ["rte", "boolq"], "`task_ids` has 2 entries and the pipeline was given a str"),
    ((text for text in TEXTS), TASK_OF_TEXT, "`task_ids` has 4 entries and the pipeline was given a generator"),
]


def writer():
    model = adapt(CASES["llama"].make(), poly("llama", task_names=TASKS, n_tasks=None))
    found = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    found.tokenizer.padding_side = "left"
    return found, {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_full_text": False}


@pytest.mark.parametrize("size", [None, 1, 2, 3, 8])
def test_a_list_of_tasks_goes_with_the_prompts_that_are_written_on(size):
    write, settings = writer()
    want = [write(text, task_ids=task, **settings) for text, task in zip(TEXTS, TASK_OF_TEXT, strict=True)]
    assert len({str(answer) for answer in want}) > 1
    assert write(TEXTS, task_ids=TASK_OF_TEXT, batch_size=size, **settings) == want
    ids = torch.tensor([write.model.task_id(task) for task in TASK_OF_TEXT])
    assert write(TEXTS, task_ids=ids, batch_size=size, **settings) == want
    assert write(TEXTS[0], task_ids=TASK_OF_TEXT[:1], **settings) == want[0]


@pytest.mark.parametrize(("texts", "tasks", "message"), MISFITS, ids=["few", "text", "generator"])
@pytest.mark.parametrize("size", [2, 4])
def test_as_many_tasks_as_a_batch_has_rows_are_no_task_for_each_text(texts, tasks, message, size):
    write, settings = writer()
    with pytest.raises(ValueError, match=message):
        write(texts, task_ids=tasks, batch_size=size, **settings)


def test_a_chat_is_one_input():
    write, settings = writer()
    write.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    chats = [[{"role": "user", "content": text}] * 2 for text in TEXTS]
    want = [write(chat, task_ids=task, **settings) for chat, task in zip(chats, TASK_OF_TEXT, strict=True)]
    assert write(chats, task_ids=TASK_OF_TEXT, batch_size=2, **settings) == want
    assert write(chats[0], task_ids=["rte"], **settings) == want[0]
    with pytest.raises(ValueError, match="`task_ids` has 2 entries"):
        write(chats[0], task_ids=["rte", "boolq"], **settings)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_features_are_those_of_each_texts_task(size):
    torch.manual_seed(0)
    model = adapt(CASES["bert"].make(), poly("bert", task_names=TASKS, n_tasks=None))
    read = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer(), device="cpu")
    want = [read(text, task_ids=task) for text, task in zip(TEXTS, TASK_OF_TEXT, strict=True)]
    assert want[0] != read(TEXTS[0], task_ids="boolq")
    for row, alone in zip(read(TEXTS, task_ids=TASK_OF_TEXT, batch_size=size), want, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(alone), rtol=1e-4, atol=1e-5)


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
