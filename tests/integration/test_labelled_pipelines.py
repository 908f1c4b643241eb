"""transformers' pipelines take `task_ids=` and answer with the labels of each input's own task."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from labelled import ATTENTION, LABELS, MODELS, NAMES, TAGS, adapted, bert
from rows import tokenizer
from transformers import pipeline

from peft_poly.labels import read_task_labels

READ = read_task_labels(LABELS, NAMES)
TEXTS = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w3"]


def texts(model, **settings):
    return pipeline("text-classification", model=model, tokenizer=tokenizer(), **settings)


def want(model, text, task, top_k=1):
    """By hand, from the task's own logits."""
    with torch.no_grad():
        logits = model(**tokenizer()(text, return_tensors="pt"), task_ids=task).logits[0, : len(READ[task])]
    kind = READ[task].kind
    scores = logits if kind == "regression" else logits.sigmoid() if kind == "multi_label" else logits.softmax(0)
    found = sorted(zip(READ[task].names, scores.tolist(), strict=True), key=lambda pair: -pair[1])
    return [{"label": name, "score": pytest.approx(score, rel=1e-4)} for name, score in found[:top_k]]


@pytest.mark.parametrize("task", NAMES)
def test_one_task_for_all_inputs(task):
    model = adapted()
    pipe = texts(model)
    assert pipe(TEXTS[0], task_ids=task) == want(model, TEXTS[0], task)
    assert pipe(TEXTS[:2], task_ids=NAMES.index(task)) == [want(model, text, task)[0] for text in TEXTS[:2]]
    assert pipe(TEXTS[0], task_ids=task, top_k=None) == want(model, TEXTS[0], task, top_k=None)
    assert texts(model, task_ids=task)(TEXTS[0]) == want(model, TEXTS[0], task)  # said when it is made


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task_ids", [NAMES, [0, 1, 2, 3], torch.arange(4)], ids=["names", "ids", "tensor"])
def test_a_task_for_each_input(batch_size, task_ids):
    model = adapted()
    found = texts(model)(TEXTS, task_ids=task_ids, batch_size=batch_size)
    assert found == [want(model, text, task)[0] for text, task in zip(TEXTS, NAMES, strict=True)]


def test_the_set_task_and_that_of_a_block_count():
    model = adapted()
    pipe = texts(model)
    model.set_task("genres")
    assert pipe(TEXTS[0]) == want(model, TEXTS[0], "genres")
    with model.use_task("topic"):
        assert pipe(TEXTS[0]) == want(model, TEXTS[0], "topic")


def test_pairs_of_texts_are_one_input():
    model = adapted()
    pairs = [{"text": "w4", "text_pair": "w5"}, {"text": "w6", "text_pair": "w7"}]
    found = texts(model)(pairs, task_ids=["topic", "stars"])
    assert [one["label"] for one in found] == [found[0]["label"], "LABEL_0"]


@pytest.mark.parametrize("task", NAMES)
def test_a_merged_model_says_the_same_in_a_plain_pipeline(task):
    model = adapted()
    expected = want(model, TEXTS[0], task, top_k=None)
    assert texts(model.merge_and_unload(task=task))(TEXTS[0], top_k=None) == expected


def test_tags_have_the_names_of_their_task():
    model = adapted(bert(tf.BertForTokenClassification), task_type="TOKEN_CLS", task_labels=TAGS)
    pipe = pipeline("token-classification", model=model, tokenizer=tokenizer())
    found = pipe(TEXTS[:2], task_ids=["entity", "part"])
    for text, task, one in zip(TEXTS, ["entity", "part"], found, strict=False):
        with torch.no_grad():
            logits = model(**tokenizer()(text, return_tensors="pt"), task_ids=task).logits[0, :, : len(TAGS[task])]
        tags = [TAGS[task][index] for index in logits.argmax(-1).tolist()]
        assert [part["entity"] for part in one] == [tag for tag in tags if tag != "O"]


def test_images_and_sound_have_pipelines_too():
    case = MODELS["vit"]
    model = adapted(case.make(), target_modules="all-linear")
    size = {"height": 8, "width": 8}
    pipe = pipeline("image-classification", model=model, image_processor=tf.ViTImageProcessor(size=size))
    from PIL import Image

    picture = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    assert {one["label"] for one in pipe(picture, task_ids="genres")} == {"drama", "war", "love"}
    sound = adapted(MODELS["wav2vec2"].make(), target_modules=["q_proj", "v_proj"])
    listen = pipeline("audio-classification", model=sound, feature_extractor=tf.Wav2Vec2FeatureExtractor())
    assert {one["label"] for one in listen(np.zeros(200, dtype=np.float32), task_ids="genres", top_k=3)} == {
        "drama", "war", "love",
    }  # fmt: skip


def test_tasks_of_an_adapter_without_heads_go_through_as_well():
    model = adapted(task_labels=None, task_names=["a", "b"])
    found = texts(model)(TEXTS[:2], task_ids=["a", "b"])
    for text, task, one in zip(TEXTS, ["a", "b"], found, strict=False):
        with torch.no_grad():
            scores = model(**tokenizer()(text, return_tensors="pt"), task_ids=task).logits.softmax(-1)
        assert one["score"] == pytest.approx(scores.max().item(), rel=1e-4)


class TestErrors:
    def test_an_unknown_task_is_refused(self):
        with pytest.raises(ValueError, match=r"Unknown task 'topik'. Did you mean 'topic'"):
            texts(adapted())(TEXTS[0], task_ids="topik")

    @pytest.mark.parametrize("given", ["w3", TEXTS[:3]])
    def test_as_many_tasks_as_inputs_are_needed(self, given):
        with pytest.raises(ValueError, match="`task_ids` has 4 entries and the pipeline was given"):
            texts(adapted())(given, task_ids=NAMES)

    def test_no_task_is_refused(self):
        with pytest.raises(ValueError, match="No task is known"):
            texts(adapted())(TEXTS[0])

    def test_a_model_without_tasks_takes_none(self):
        with pytest.raises(ValueError, match="is for models with a task-routed adapter, not BertFor"):
            texts(bert())(TEXTS[0], task_ids="topic")
        lora = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=ATTENTION))
        assert len(texts(lora)(TEXTS[0])) == 1  # and passes through without
