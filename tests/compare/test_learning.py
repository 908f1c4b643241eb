"""How the methods are made and trained: sizes, what each of them can tell apart, answers against each row alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from labelled_folder import WORDS, write_encoder, write_rows, write_tasks, write_tokenizer
from tiny import VOCAB, bert_config, t5
from torch import nn

from peft_poly import PolyConfig
from peft_poly.compare.data import load_tasks
from peft_poly.compare.learning.blocks import Blocks
from peft_poly.compare.learning.encoder import fingerprint, load_encoder
from peft_poly.compare.learning.methods import METHODS, adapt, n_trainable, optimizer_of
from peft_poly.compare.learning.texts import Texts
from peft_poly.compare.learning.training import Classifier, answers, train

PER_RANK = 2 * (4 * (16 + 16) + 2 * (16 + 32))  # in + out of all layers of the two blocks of the tiny BERT
LAYERS = 12
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def tasks(tmp_path):
    return load_tasks(write_tasks(tmp_path / "data"))


@pytest.fixture
def made(folder):
    """An encoder, its tokenizer, and what reads texts for it."""
    encoder, tokenizer = load_encoder(str(folder))
    return encoder, tokenizer, Texts(tokenizer, Blocks(encoder), 32)


# ------------------------------------------------------------------------------------------------------------ methods
def test_sizes_are_about_those_of_the_recommended_adapter(made, tasks):
    encoder, _, texts = made
    sizes = {}
    for method in METHODS:
        model = adapt(method, encoder, texts.blocks.targets, tasks.names)
        sizes[method.name] = n_trainable(model)
        model.unload()
    recommended = PolyConfig.recommended(task_names=tasks.names)
    skills = recommended.r * recommended.n_skills
    assert sizes["Poly, head per task"] == skills * PER_RANK + LAYERS * 3 * recommended.n_skills
    assert sizes["gates, head per task"] == 24 * (PER_RANK + LAYERS * 3)
    assert sizes["one shared LoRA"] == round(sizes["Poly, head per task"] / PER_RANK) * PER_RANK
    assert sizes["a LoRA per task"] == 3 * round(sizes["one shared LoRA"] / PER_RANK / 3) * PER_RANK


def test_an_encoder_is_given_back_as_it_was(made, tasks):
    encoder, _, texts = made
    before, names = copy.deepcopy(encoder.state_dict()), [name for name, _ in encoder.named_modules()]
    for method in METHODS:
        train(method, encoder, texts, tasks, lr=0.01, steps=4, batch_size=8, seed=0)
    assert [name for name, _ in encoder.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_lora_per_task_has_no_part_in_other_tasks(made, tasks):
    encoder, _, texts = made
    torch.manual_seed(0)
    model = Classifier(BY_NAME["a LoRA per task"], encoder, texts, tasks)
    rows = [row for row in tasks.train if row.task == "near"]
    nn.functional.cross_entropy(*model(rows)).backward()
    moved = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.dim() == 4}
    near = tasks.names.index("near")
    for name, gradient in moved.items():
        others = torch.cat([gradient[:, :near], gradient[:, near + 1 :]], dim=1)
        assert others.abs().max() < 1e-12, name
    assert any(gradient[:, near].abs().max() > 1e-6 for gradient in moved.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_tells_tasks_apart_learns_labels_that_contradict_each_other(made, tmp_path, method):
    encoder, _, texts = made
    tasks = load_tasks(write_tasks(tmp_path, ("near", "far")))  # the same texts, their labels exchanged
    found = train(method, encoder, texts, tasks, lr=0.01, steps=60, batch_size=16, seed=0)
    share = sum(found.right) / len(found.right)
    if method.own_biases:  # one order of the texts for both tasks, so that one of them is mostly wrong
        assert share < 0.75
    else:
        assert share == 0.5 if method.name == "one shared LoRA" else share > 0.8


def test_biases_of_tasks_start_at_zero_and_learn_at_ten_times_the_rate(made, tasks):
    encoder, _, texts = made
    method = BY_NAME["shared LoRA, bias per task"]
    model = Classifier(method, encoder, texts, tasks)
    assert not model.biases.any()
    groups = optimizer_of(method, model, 0.01, model.biases).param_groups
    assert [group["lr"] for group in groups] == [0.01, pytest.approx(0.1)]
    assert [p is model.biases for p in groups[1]["params"]] == [True]
    model.encoder.unload()
    found = train(method, encoder, texts, tasks, lr=0.01, steps=4, batch_size=8, seed=0)
    shared = train(BY_NAME["one shared LoRA"], encoder, texts, tasks, lr=0.01, steps=4, batch_size=8, seed=0)
    assert found.parameters == shared.parameters + sum(map(len, tasks.labels.values()))  # of 2 and of 3 labels


def test_a_bias_per_task_learns_where_a_tasks_good_begins_and_no_more(made, tmp_path):
    """Two tasks whose labels have nothing to do with the texts: one says mostly red, the other mostly blue."""
    encoder, _, texts = made
    words = ["big", "small", "new", "old"]
    for task, common in (("near", "red"), ("far", "blue")):
        other = "blue" if common == "red" else "red"
        rows = [
            {"task": task, "input": f"is {word}", "output": common if n % 4 else other, "split": split}
            for split in ("train", "validation", "test") for word in words for n in range(4)
        ]  # fmt: skip
        write_rows(tmp_path, rows, f"{task}.jsonl")
    tasks = load_tasks(tmp_path)
    found = {
        name: train(BY_NAME[name], encoder, texts, tasks, lr=0.01, steps=60, batch_size=16, seed=0)
        for name in ("one shared LoRA", "shared LoRA, bias per task")
    }
    right = {name: sum(of.right) / len(of.right) for name, of in found.items()}
    assert right == {"one shared LoRA": 0.5, "shared LoRA, bias per task": 0.75}
    sizes = {name: of.parameters for name, of in found.items()}
    assert sizes["shared LoRA, bias per task"] == sizes["one shared LoRA"] + 4  # two tasks of two labels


# ----------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_answers_are_those_of_each_row_alone(made, tasks, method):
    encoder, tokenizer, texts = made
    torch.manual_seed(0)
    model = Classifier(method, encoder, texts, tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    right, loss = answers(model, tasks.test)
    losses = []
    for row, hit in zip(tasks.test, right, strict=True):
        text = f"{row.task}: {row.text}" if method.told else row.text
        call = {} if method.kind == "lora" else {"task_ids": row.task}
        states = model.encoder(**tokenizer(text, return_tensors="pt"), **call).last_hidden_state[0]
        vector = nn.functional.normalize(states.mean(0), dim=0) * 4
        order = list(dict.fromkeys(("" if not method.own_heads else t, label)
                                   for t in tasks.names for label in tasks.labels[t]))  # fmt: skip
        places = [order.index((row.task if method.own_heads else "", label)) for label in tasks.labels[row.task]]
        logits = (model.weight @ vector + model.bias)[places]
        if method.own_biases:
            logits = logits + model.biases[tasks.names.index(row.task), : len(places)]
        assert hit == (tasks.labels[row.task][int(logits.argmax())] == row.label)
        losses.append(-logits.log_softmax(0)[tasks.labels[row.task].index(row.label)].item())
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_class_starts_as_the_vector_of_its_label(made, tasks):
    encoder, tokenizer, texts = made
    states = encoder(**tokenizer("red", return_tensors="pt")).last_hidden_state[0]
    model = Classifier(METHODS[0], encoder, texts, tasks)
    labels = list(dict.fromkeys(label for task in tasks.names for label in tasks.labels[task]))
    torch.testing.assert_close(model.weight[labels.index("red")], nn.functional.normalize(states.mean(0), dim=0))


def test_one_seed_gives_one_result_and_another_seed_another(made, tasks):
    encoder, _, texts = made
    runs = [train(METHODS[-1], encoder, texts, tasks, lr=0.01, steps=8, batch_size=8, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].loss != runs[2].loss


def test_a_rate_that_diverges_is_no_success(made, tasks):
    encoder, _, texts = made
    found = train(METHODS[0], encoder, texts, tasks, lr=1e30, steps=4, batch_size=8, seed=0)
    assert found.validation == 0


# -------------------------------------------------------------------------------------- blocks that stay as they are
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_kept_states_change_no_training(folder, tasks, method):
    found = []
    for keeps in (True, False):
        encoder, tokenizer = load_encoder(str(folder))
        texts = Texts(tokenizer, Blocks(encoder, 1), 32)
        if keeps:
            rows = tasks.train + tasks.validation + tasks.test
            texts.keep(encoder, [text for row in rows for text in (row.text, f"{row.task}: {row.text}")])
            assert len(texts._kept) > 0
        found.append(train(method, encoder, texts, tasks, lr=0.01, steps=8, batch_size=8, seed=0))
    assert found[0].right == found[1].right
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-3)
    assert found[0].parameters == found[1].parameters


def test_kept_states_spare_the_blocks_under_them(folder, tasks):
    encoder, tokenizer = load_encoder(str(folder))
    blocks, calls = Blocks(encoder, 1), []
    texts = Texts(tokenizer, blocks, 32)
    texts.keep(encoder, [row.text for row in tasks.train])
    blocks.lower[0].attention.register_forward_hook(lambda *args: calls.append(1))
    texts.vectors(encoder, [tasks.train[0].text, tasks.train[1].text])
    assert not calls
    texts.vectors(encoder, ["is it big"])
    assert calls


def test_an_encoder_whose_blocks_hand_on_more_is_run_whole():
    encoder = t5().get_encoder().eval()  # its first block makes the position bias of all others
    blocks = Blocks(encoder, 1)
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    wanted = encoder(**inputs).last_hidden_state
    assert not blocks.can_be_given(encoder, inputs)
    torch.testing.assert_close(encoder(**inputs).last_hidden_state, wanted)


def test_states_that_memory_cannot_hold_are_not_kept(folder, tasks, monkeypatch):
    from peft_poly.compare.learning import texts as module

    monkeypatch.setattr(module, "MOST_BYTES", 100)
    encoder, tokenizer = load_encoder(str(folder))
    texts = Texts(tokenizer, Blocks(encoder, 1), 32)
    texts.keep(encoder, [row.text for row in tasks.train])
    assert not texts._kept


def test_only_the_last_blocks_are_adapted(folder):
    encoder, _ = load_encoder(str(folder))
    assert {name.split(".")[2] for name in Blocks(encoder, 1).targets} == {"1"}
    assert len(Blocks(encoder).targets) == LAYERS  # and not the pooler, which nothing here reads
    with pytest.raises(ValueError, match="The encoder has 2 blocks, so 3 of them cannot be adapted"):
        Blocks(encoder, 3)


# ------------------------------------------------------------------------------------------------------------ encoders
@pytest.mark.parametrize("kind", ["t5", "gpt2", "distilbert", "modernbert"])
def test_other_encoders_serve(kind, tmp_path, tasks):
    sizes = {
        "t5": lambda: t5(),
        "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)),
        "distilbert": lambda: tf.DistilBertModel(
            tf.DistilBertConfig(vocab_size=VOCAB, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
        ),
        "modernbert": lambda: tf.ModernBertModel(
            tf.ModernBertConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                pad_token_id=0, global_attn_every_n_layers=2,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    sizes[kind]().save_pretrained(tmp_path / "encoder")
    write_tokenizer(tmp_path / "encoder", eos_token="the")
    encoder, tokenizer = load_encoder(str(tmp_path / "encoder"))
    texts = Texts(tokenizer, Blocks(encoder, 1), 32)
    rows = tasks.train + tasks.validation + tasks.test
    texts.keep(encoder, [row.text for row in rows])
    for method in METHODS[-2:]:
        found = train(method, encoder, texts, tasks, lr=0.01, steps=4, batch_size=8, seed=0)
        assert len(found.right) == len(tasks.test)


def test_the_fingerprint_follows_config_and_weights(made):
    encoder = made[0]
    first = fingerprint(encoder)
    with torch.no_grad():
        first_layer = next(encoder.parameters())
        first_layer.copy_(first_layer.flip(0))  # the same numbers, in other places
        assert fingerprint(encoder) != first
        first_layer.copy_(first_layer.flip(0))
        assert fingerprint(encoder.to(torch.float64)) != first  # another dtype
        assert fingerprint(encoder.to(torch.float32)) == first


def test_encoders_that_lack_what_is_needed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The encoder '.*absent' cannot be loaded"):
        load_encoder(str(tmp_path / "absent"))
    tf.BertModel(bert_config()).save_pretrained(tmp_path / "mute")
    write_tokenizer(tmp_path / "mute", bos_token="is")
    with pytest.raises(ValueError, match="has no token to pad with"):
        load_encoder(str(tmp_path / "mute"))
    tf.BertModel(tf.BertConfig(**{**bert_config().to_dict(), "vocab_size": 5})).save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    with pytest.raises(ValueError, match=f"has {len(WORDS) + 2} tokens, and its encoder embeds 5"):
        load_encoder(str(tmp_path / "small"))


def test_a_model_of_images_is_no_text_encoder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
    tf.ViTModel(tf.ViTConfig(**sizes)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"\(ViTModel\) is no text encoder"):
        load_encoder(str(tmp_path))
