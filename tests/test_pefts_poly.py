"""What a guide's table says that PEFT's own Poly cannot do is so, in the PEFT version that it names."""

from __future__ import annotations

import re
import tempfile
import threading
from pathlib import Path

import datasets
import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from rows import QUIET, TorchRows, arguments, rows, tokenizer, with_ids
from tiny import MLP, bert, gpt2, llama, t5
from transformers import Trainer

from peft_poly import DataCollatorWithTaskIds

GUIDE = (Path(__file__).parent.parent / "docs/guides/from-pefts-poly.md").read_text(encoding="utf-8")
NAMED = Version(re.search(r"PEFT's Poly \(peft ([\d.]+)\)", GUIDE)[1])

pytestmark = pytest.mark.skipif(Version(peft.__version__) != NAMED, reason=f"the guide's table is about peft {NAMED}")

IDS = torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([0, 1, 2])


def poly(base, task_type="CAUSAL_LM", targets=("q_proj", "v_proj"), **settings):
    settings = {"r": 4, "n_tasks": 3, "n_splits": 2, "init_weights": False, **settings}
    return get_peft_model(base, peft.PolyConfig(task_type=task_type, target_modules=list(targets), **settings)).eval()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize(
    ("base", "task_type", "targets"), [(llama, "CAUSAL_LM", ("q_proj",)), (t5, "SEQ_2_SEQ_LM", "q")]
)
def test_rows_that_generation_repeats_lose_their_task(base, task_type, targets, options):
    with pytest.raises(RuntimeError, match="size"):
        poly(base(), task_type, targets).generate(input_ids=IDS, task_ids=TASKS, max_new_tokens=2, **options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_loses_its_task(reentrant):
    model = poly(llama()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(input_ids=IDS, labels=IDS, task_ids=TASKS).loss
    with pytest.raises(ValueError, match="task_ids should not be None"):
        loss.backward()


def test_the_stock_trainer_drops_its_ids(tmp_path):
    data = TorchRows(with_ids(rows(4)))
    with pytest.raises(ValueError, match="task_ids should not be None"):
        Trainer(poly(llama()), arguments(tmp_path), train_dataset=data).train()


def test_sft_fails_in_its_checkpointing_even_with_a_collator_that_keeps_the_ids(tmp_path):
    trl = pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    def train(**settings):
        trl.SFTTrainer(
            poly(llama()),
            trl.SFTConfig(str(tmp_path), **{**QUIET, "bf16": False, "remove_unused_columns": False, **settings}),
            train_dataset=datasets.Dataset.from_list(with_ids(rows(4))),
            processing_class=tokenizer(),
            data_collator=DataCollatorWithTaskIds(DataCollatorForLanguageModeling(pad_token_id=0)),
        ).train()

    with pytest.raises(ValueError, match="task_ids should not be None"):
        train()
    train(gradient_checkpointing=False)


def test_it_is_more_than_one_graph():
    compiled = torch.compile(poly(llama()), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(input_ids=IDS, task_ids=TASKS)


def test_a_thread_computes_the_task_of_another():
    model = poly(llama(), init_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("module_logits"):
                parameter.normal_(std=5)
        right = model(input_ids=IDS, task_ids=torch.zeros(3, dtype=torch.long)).logits
    other_is_inside, first_is_done = threading.Event(), threading.Event()
    other = threading.Thread(target=model, kwargs={"input_ids": IDS, "task_ids": TASKS.fill_(2)})

    def meet(*_):
        if threading.current_thread() is other:
            other_is_inside.set()
            first_is_done.wait(30)
        elif not other.ident:
            other.start()
            other_is_inside.wait(30)

    model.get_input_embeddings().register_forward_hook(meet)
    with torch.no_grad():
        wrong = model(input_ids=IDS, task_ids=torch.zeros(3, dtype=torch.long)).logits
    first_is_done.set()
    other.join()
    assert not torch.allclose(wrong, right, atol=1e-3)


@pytest.mark.parametrize("task_ids", [1, "a", [0, 1, 2], torch.tensor([1])])
def test_ids_are_one_tensor_with_an_entry_per_row(task_ids):
    with pytest.raises((AttributeError, RuntimeError)):
        poly(llama())(input_ids=IDS, task_ids=task_ids)


def test_a_negative_id_is_the_last_task():
    model = poly(llama())
    last, negative = torch.full((3,), 2), torch.full((3,), -1)
    assert torch.equal(model(input_ids=IDS, task_ids=negative).logits, model(input_ids=IDS, task_ids=last).logits)


def test_tasks_have_no_names():
    with pytest.raises(TypeError, match="task_names"):
        peft.PolyConfig(task_names=["a", "b"])


def test_a_plain_peft_model_takes_no_ids():
    with pytest.raises(TypeError, match="task_ids"):
        poly(MLP(), None, ["lin0"])(torch.randn(3, 2, 16), task_ids=TASKS)


def test_an_injected_model_takes_no_ids():
    model = llama()
    peft.inject_adapter_in_model(peft.PolyConfig(target_modules=["q_proj"], n_tasks=3), model)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(input_ids=IDS, task_ids=TASKS)


def test_conv1d_and_inputs_of_two_dimensions_are_not_taken():
    with pytest.raises(TypeError, match="Conv1D"):
        poly(gpt2(), targets=["c_attn"])
    with pytest.raises(RuntimeError, match="3D"):
        poly(bert(), "SEQ_CLS", ["query", "dense"])(input_ids=IDS, task_ids=TASKS)  # the pooler


def test_splits_that_do_not_divide_are_found_in_the_first_call_only():
    model = poly(llama(), n_splits=3)
    with pytest.raises(RuntimeError, match="shape"):
        model(input_ids=IDS, task_ids=TASKS)


def test_nothing_can_be_merged():
    with pytest.raises(NotImplementedError):
        poly(llama()).merge_and_unload()


def test_loaded_for_inference_on_a_half_precision_base_it_is_trainable():
    with tempfile.TemporaryDirectory() as folder:
        poly(llama().bfloat16()).save_pretrained(folder)
        model = PeftModel.from_pretrained(llama().bfloat16(), folder)
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "poly_lora" in name)
