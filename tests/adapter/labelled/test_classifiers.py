"""Classifiers of transformers: a head per task in place of the last layer, and what comes before it trained."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf
from labelled import (
    ATTENTION,
    LABELS,
    MODELS,
    N_LABELS,
    NAMES,
    TAGS,
    adapted,
    bert,
    config,
    deberta,
    modernbert,
    naive_losses,
    t5,
    targets,
    text,
)
from safetensors.torch import load_file
from tiny import MLP, llama
from torch import nn

from peft_poly import PolyConfig, TaskHeads

every_model = pytest.mark.parametrize("name", list(MODELS))


def fresh(name: str, like: nn.Module) -> nn.Module:
    """The base model loaded once more: the backbone is the same, what it makes anew is not."""
    torch.manual_seed(99)
    base = MODELS[name].make()
    state = {key: value for key, value in like.state_dict().items() if _is_backbone(base, key)}
    assert len(state) < len(base.state_dict())
    base.load_state_dict(state, strict=False)
    return base


def _is_backbone(base: nn.Module, key: str) -> bool:
    return isinstance(getattr(base, key.partition(".")[0]), tf.PreTrainedModel)


class TestEveryClassifier:
    @every_model
    def test_a_mixed_batch_is_each_row_alone(self, name):
        case = MODELS[name]
        model, inputs = adapted(case.make(), target_modules=case.targets), case.inputs()
        y = model(**inputs, task_ids=NAMES).logits
        assert y.shape == (4, 4)
        for row, (task, size) in enumerate(zip(NAMES, N_LABELS, strict=True)):
            alone = model(**{key: x[row : row + 1] for key, x in inputs.items()}, task_ids=task).logits[0]
            torch.testing.assert_close(y[row], alone)
            assert torch.equal(y[row].isinf(), torch.arange(4) >= size)

    @every_model
    def test_the_loss_trains_heads_and_all_that_the_base_makes_anew_and_nothing_else_of_it(self, name):
        case = MODELS[name]
        model = adapted(case.make(), target_modules=case.targets).train()
        out = model(**case.inputs(), task_ids=NAMES, labels=targets())
        want = naive_losses(out.logits, [1, 3, 2.5, [0, 1, 1]], NAMES)
        torch.testing.assert_close(out.loss, torch.stack(want).mean())
        out.loss.backward()
        given = {key for key, p in model.named_parameters() if p.grad is not None and ".poly_" not in key}
        assert all(".modules_to_save.default." in key for key in given)
        heads = next(m for m in model.modules() if isinstance(m, TaskHeads))
        assert all(p.grad is not None for p in heads.parameters())
        layers = {key.replace(".modules_to_save.default", "").removeprefix("base_model.model.") for key in given}
        for layer in case.anew:
            assert any(key.startswith(f"{layer}.") for key in layers), layer
        assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]

    @every_model
    def test_a_saved_adapter_on_the_base_loaded_anew_computes_the_same(self, name, tmp_path):
        case = MODELS[name]
        model, inputs = adapted(case.make(), target_modules=case.targets), case.inputs()
        base = fresh(name, copy.deepcopy(model).unload())
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sorted(key.rpartition(".")[2] for key in saved if ".weight_" in key) == [f"weight_{i}" for i in range(4)]
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(
            loaded(**inputs, task_ids=NAMES).logits, model(**inputs, task_ids=NAMES).logits, rtol=1e-5, atol=1e-6
        )

    @every_model
    @pytest.mark.parametrize("task", ["topic", "stars", "genres"])
    def test_a_merged_model_is_a_plain_one_for_the_task(self, name, task):
        case = MODELS[name]
        model, inputs, place = adapted(case.make(), target_modules=case.targets), case.inputs(), NAMES.index(task)
        want = model(**inputs, task_ids=task).logits[:, : N_LABELS[place]]
        merged = model.merge_and_unload(task=task)
        assert type(merged) is type(case.make())
        assert not [m for m in merged.modules() if isinstance(m, TaskHeads) or "peft" in type(m).__module__]
        torch.testing.assert_close(merged(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        assert merged.config.num_labels == N_LABELS[place]
        assert list(merged.config.id2label.values()) == list(model.peft_config["default"].labels[task].names)

    @every_model
    def test_unloading_gives_the_base_model_back_as_it_came(self, name):
        case = MODELS[name]
        base = case.make()
        state = {key: value.clone() for key, value in base.state_dict().items()}
        n_labels = base.config.num_labels
        back = adapted(base, target_modules=case.targets).unload()
        assert back.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())
        assert back.config.num_labels == n_labels

    @every_model
    def test_without_the_adapter_the_base_model_answers(self, name):
        case = MODELS[name]
        base, inputs = case.make().eval(), case.inputs()
        want = base(**inputs).logits
        model = adapted(base, target_modules=case.targets)
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs, task_ids=NAMES).logits, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(tf.BertForTokenClassification),
        lambda: deberta(tf.DebertaV2ForTokenClassification),
        lambda: modernbert(tf.ModernBertForTokenClassification),
        lambda: t5(tf.T5ForTokenClassification),
        lambda: tf.LlamaForTokenClassification(llama().config),
    ],
    ids=["bert", "deberta", "modernbert", "t5", "llama"],
)
class TestTags:
    def test_each_token_has_the_tags_of_its_row(self, make, tmp_path):
        layers = r".*(value|value_proj|v|Wo|v_proj)"
        model = adapted(make(), task_type="TOKEN_CLS", task_labels=TAGS, target_modules=layers)
        inputs, tasks = text(3), list(TAGS)
        labels = torch.tensor([[0, 3, 1, 2, -100, -100], [1, 0, 1, 0, 1, -100], [2, 2, 2, 2, 2, 2]])
        out = model(**inputs, labels=labels, task_ids=tasks)
        assert out.logits.shape == (3, 6, 4)
        losses = []
        for row, task in enumerate(tasks):
            alone = model(**{key: x[row : row + 1] for key, x in inputs.items()}, task_ids=task).logits[0]
            torch.testing.assert_close(out.logits[row], alone, rtol=1e-4, atol=1e-5)
            known = [index for index, label in enumerate(labels[row].tolist()) if label != -100]
            losses += naive_losses(out.logits[row, known], labels[row, known].tolist(), [task] * len(known), TAGS)
        torch.testing.assert_close(out.loss, torch.stack(losses).mean())
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload(task="part")
        assert merged.config.id2label == {0: "N", 1: "V"}
        torch.testing.assert_close(merged(**inputs).logits[1], out.logits[1, :, :2], rtol=1e-4, atol=1e-5)


class TestAdapters:
    def test_one_that_is_given_the_config_of_another_is_its_copy_with_its_heads(self):
        model = adapted()
        want = model(**text(), task_ids=NAMES).logits
        with pytest.warns(UserWarning, match="starts as a copy of 'default'"):
            model.add_adapter("reference", model.peft_config["default"])
        model.set_adapter("reference")
        model.eval()
        assert torch.equal(model(**text(), task_ids=NAMES).logits, want)

    def test_one_of_gates_has_heads_too(self):
        model = adapted(poly_type="gates", n_skills=None)
        found = model(**text(), task_ids=NAMES).logits
        for row, name in enumerate(NAMES):
            alone = model(**{key: value[row : row + 1] for key, value in text().items()}, task_ids=name).logits
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)

    def test_several_have_heads_of_their_own(self, tmp_path):
        model, inputs = adapted(), text()
        first = model(**inputs, task_ids=NAMES).logits
        model.add_adapter("other", config(task_labels={"tone": 5, "size": 1}, r=2))
        model.set_adapter("other")
        second = model(**inputs, task_ids=["tone", "size"] * 2).logits
        assert second.shape == (4, 5)
        model.save_pretrained(tmp_path)
        model.set_adapter("default")
        torch.testing.assert_close(model(**inputs, task_ids=NAMES).logits, first)
        model.delete_adapter("other")
        torch.testing.assert_close(model(**inputs, task_ids=NAMES).logits, first)
        model.load_adapter(str(tmp_path / "other"), "other")
        model.set_adapter("other")
        torch.testing.assert_close(model.eval()(**inputs, task_ids=["tone", "size"] * 2).logits, second)

    @pytest.mark.parametrize("headed_first", [True, False])
    def test_one_without_heads_has_the_base_models_own_layer(self, headed_first):
        base, inputs = bert(), text()
        plain, headed = config(task_labels=None, task_names=["a", "b"]), config()
        model = peft.get_peft_model(base, headed if headed_first else plain)
        model.add_adapter("other", plain if headed_first else headed)
        names = ("other", "default") if headed_first else ("default", "other")
        for name, width in zip(names, (2, 4), strict=True):
            model.set_adapter(name)
            out = model(**inputs, task_ids=0, labels=torch.tensor([0, 1, 0, 1]))
            assert out.logits.shape == (4, width)
            assert out.loss.isfinite()

    def test_a_loaded_adapter_keeps_the_order_of_its_tasks_not_that_of_its_file(self, tmp_path):
        adapted(task_labels={"b": 3, "a": 2}).save_pretrained(tmp_path)
        loaded = PolyConfig.from_pretrained(tmp_path)
        assert loaded.task_names == ["b", "a"]
        assert [len(found) for found in loaded.labels.values()] == [3, 2]

    def test_a_low_memory_load_computes_the_same(self, tmp_path):
        model, inputs = adapted(), text()
        model.save_pretrained(tmp_path)
        base = fresh("bert", copy.deepcopy(model).unload())
        loaded = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
        torch.testing.assert_close(loaded(**inputs, task_ids=NAMES).logits, model(**inputs, task_ids=NAMES).logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_heads_of_a_base_in_half_precision_are_trained_in_float32_and_merged_in_its_own(self, dtype):
        model = adapted(bert().to(dtype))
        heads = next(m for m in model.modules() if isinstance(m, TaskHeads))
        assert {p.dtype for p in heads.parameters()} == {torch.float32}
        assert model(**text(), task_ids=NAMES, labels=targets()).loss.isfinite()
        assert {p.dtype for p in model.merge_and_unload(task="topic").parameters()} == {dtype}

    def test_all_linear_leaves_the_last_layers_alone(self):
        for name in ("t5", "roberta", "deberta", "llama"):
            model = adapted(MODELS[name].make(), target_modules="all-linear")
            layers = [key for key, m in model.named_modules() if hasattr(m, "poly_lora_A")]
            assert layers
            assert not [key for key in layers if any(part in key for part in ("class", "score", "pooler"))]


class TestRegimes:
    def parts(self, model):
        names = {key for key, p in model.named_parameters() if p.requires_grad}
        return {
            "heads": any(".weight_" in key for key in names),
            "shared": any("dense" in key and "modules_to_save" in key for key in names),
            "skills": any("poly_lora_A" in key for key in names),
            "router": any("poly_router" in key for key in names),
        }

    @pytest.mark.parametrize("name", ["roberta", "deberta"])
    def test_the_router_alone_learns_with_the_heads_and_what_tasks_share_does_not(self, name):
        model = adapted(MODELS[name].make(), target_modules=MODELS[name].targets)
        model.train_router_only()
        only = {"heads": True, "shared": False, "skills": False, "router": True}
        assert self.parts(model) == only
        with model.disable_adapter():
            pass
        model.set_adapter("default")  # PEFT thaws what it saves
        assert self.parts(model.train()) == only
        model.train_all()
        assert self.parts(model) == dict.fromkeys(only, True)

    def test_with_one_skill_the_heads_alone_learn(self):
        model = adapted(MODELS["roberta"].make(), target_modules=ATTENTION, n_skills=1)
        model.train_router_only()
        only = {"heads": True, "shared": False, "skills": False, "router": False}
        assert self.parts(model) == only
        model.set_adapter("default")
        assert self.parts(model.train()) == only
        model.train_all()
        assert self.parts(model) == {"heads": True, "shared": True, "skills": True, "router": False}

    @pytest.mark.parametrize("regime", ["train_router_only", "train_all"])
    def test_heads_of_an_adapter_that_was_loaded_for_inference_learn_when_it_is_told_to(self, tmp_path, regime):
        adapted(MODELS["roberta"].make(), target_modules=ATTENTION).save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(MODELS["roberta"].make(), tmp_path)
        model.add_tasks(["length"], labels={"length": 3})
        assert not any(self.parts(model).values())
        getattr(model, regime)()
        whole = regime == "train_all"
        assert self.parts(model) == {"heads": True, "shared": whole, "skills": whole, "router": True}
        heads = {key: p for key, p in model.named_parameters() if ".weight_" in key or ".bias_" in key}
        assert len(heads) > 2
        model.train()
        model(**text(), task_ids="length", labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in heads.values())
        model.disable_adapter_layers()
        getattr(model, regime)()
        assert not any(self.parts(model).values())

    def test_a_new_task_learned_so_leaves_the_others_bit_equal(self):
        name = "roberta"
        model, inputs = adapted(MODELS[name].make(), target_modules=ATTENTION), text()
        before = model(**inputs, task_ids=NAMES).logits
        model.add_tasks(["length"], labels={"length": 3})
        model.train_router_only()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
        start = model(**inputs, task_ids="length", labels=torch.tensor([0, 1, 2, 0])).loss
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**inputs, task_ids="length", labels=torch.tensor([0, 1, 2, 0])).loss
            loss.backward()
            optimizer.step()
        assert loss < start
        assert torch.equal(model.eval()(**inputs, task_ids=NAMES).logits, before)

    def test_the_mean_of_the_skills_leaves_heads_as_they_are(self):
        model = adapted()
        model.average_skills()
        assert model(**text(), task_ids=NAMES, labels=targets()).loss.isfinite()


class TestErrors:
    @pytest.mark.parametrize(
        "make",
        [lambda: tf.BertModel(bert().config), lambda: tf.BertForMaskedLM(bert().config), llama, MLP],
        ids=["backbone", "masked", "causal", "own"],
    )
    def test_a_model_without_a_last_layer_of_labels_is_refused_and_left_as_it_was(self, make):
        base = make()
        before = {name: p.requires_grad for name, p in base.named_parameters()}
        message = r"has no last layer of labels.*AutoModelForSequenceClassification.*TaskHeads"
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base, config(target_modules="all-linear"))
        assert {name: p.requires_grad for name, p in base.named_parameters()} == before
        assert not [m for m in base.modules() if hasattr(m, "poly_lora_A")]

    def test_two_last_layers_are_refused(self):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
        base = tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**sizes, image_size=8, patch_size=4))
        with pytest.raises(ValueError, match=r"several last layers of labels, cls_classifier, distillation_classifier"):
            peft.get_peft_model(base, config(target_modules=ATTENTION))

    def test_another_adapter_in_the_layers_that_are_trained_whole_is_refused(self):
        plain = PolyConfig(target_modules=["q", "dense"], n_tasks=2)
        model = peft.get_peft_model(t5(), plain)
        with pytest.raises(ValueError, match=r"classification_head.dense has an adapter.*exclude_modules"):
            model.add_adapter("other", config(target_modules=["q"]))

    @pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
    def test_another_task_type_is_refused(self, task_type):
        with pytest.raises(ValueError, match=r"needs a `task_type` of SEQ_CLS or TOKEN_CLS, got.*TaskHeads"):
            config(task_type=task_type)

    def test_a_task_without_labels_and_labels_of_no_task_are_refused(self):
        with pytest.raises(ValueError, match=r"The task 'length' has no labels"):
            config(task_names=[*NAMES, "length"])
        with pytest.raises(ValueError, match=r"`task_labels` has 'genres', which is no task"):
            config(task_names=NAMES[:3])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ({**LABELS, "sentiment": ["good", "bad"]}, "'sentiment' has one of bad, good there, and one of good, bad"),
            ({**LABELS, "topic": 5}, "task 'topic' has one of LABEL_0"),
            (None, "task 'sentiment' has one of bad, good there, and no head"),
        ],
    )  # fmt: skip
    def test_a_checkpoint_of_other_labels_is_refused(self, labels, message, tmp_path):
        adapted().save_pretrained(tmp_path)
        model = adapted(task_labels=labels, task_names=NAMES)
        before = model(**text(), task_ids=0).logits
        with pytest.raises(ValueError, match=f"task_labels of the checkpoint.*{message}"):
            model.load_adapter(str(tmp_path), "default")
        torch.testing.assert_close(model.eval()(**text(), task_ids=0).logits, before)

    def test_a_label_outside_of_its_tasks_head_names_row_task_value_and_what_is_allowed(self):
        message = r"Row 2 .*'sentiment', has the label 2. Allowed are the classes 0 \(bad\), 1 \(good\)"
        with pytest.raises(ValueError, match=message):
            adapted()(**text(), task_ids="sentiment", labels=torch.tensor([0, 1, 2, 0]))

    @pytest.mark.parametrize("shape", [(3,), (4, 6), (4, 2, 2)])
    def test_labels_of_another_shape_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"`labels` must have the shape \(4,\), or \(4, 4\)"):
            adapted()(**text(), task_ids="sentiment", labels=torch.zeros(shape))

    def test_new_tasks_need_labels_and_only_those_with_heads_take_them(self):
        model = adapted()
        with pytest.raises(ValueError, match=r"new ones need names and labels"):
            model.add_tasks(["length"])
        with pytest.raises(ValueError, match=r"The task 'length' has no labels"):
            model.add_tasks(["length", "size"], labels={"size": 2})
        assert model.task_names == NAMES
        plain = adapted(task_labels=None, task_names=["a"])
        with pytest.raises(ValueError, match=r"have no heads, so `labels` cannot be given"):
            plain.add_tasks(["b"], labels={"b": 2})
