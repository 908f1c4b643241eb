"""Heads and their loss through the doors: positions, tuples, injection, checkpoints, compilers, threads, the Hub."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from hub_server import HubServer
from labelled import LABELS, MODELS, N_LABELS, NAMES, adapted, bert, config, targets, text
from safetensors.torch import load_file

from peft_poly import TaskHeads, use_task
from peft_poly.labels import read_task_labels

HERE = Path(__file__).parent
PUSH = """
import sys, peft, torch
from labelled import NAMES, adapted, bert
base_state, state, inputs = torch.load(sys.argv[1])
model, base = adapted(), bert()
model.load_state_dict(state)
base.load_state_dict(base_state)
model.push_to_hub("user/heads")
loaded = peft.PeftModel.from_pretrained(base, "user/heads").eval()
torch.testing.assert_close(loaded(**inputs, task_ids=NAMES).logits, model(**inputs, task_ids=NAMES).logits)
"""


@pytest.fixture(scope="module")
def case():
    model = adapted()
    with torch.no_grad():
        out = model(**text(), task_ids=NAMES, labels=targets())
    return model, out.loss, out.logits


class TestOutputs:
    def test_labels_by_position_and_a_tuple_as_output(self, case):
        model, loss, logits = case
        inputs = text()
        found = model(inputs["input_ids"], inputs["attention_mask"], None, targets(), task_ids=NAMES, return_dict=False)
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], logits)

    def test_the_loss_is_the_first_of_the_output(self, case):
        model, loss, _ = case
        out = model(**text(), task_ids=NAMES, labels=targets())
        torch.testing.assert_close(out[0], loss)
        assert list(out) == ["loss", "logits"]

    def test_without_labels_there_is_no_loss(self, case):
        assert list(case[0](**text(), task_ids=NAMES)) == ["logits"]

    def test_a_failed_call_leaves_nothing_for_the_next(self, case):
        model = case[0]
        with pytest.raises(ValueError, match="task_ids has 3 entries"):
            model(**text(), task_ids=NAMES[:3], labels=targets())
        assert list(model(**text(), task_ids=NAMES)) == ["logits"]

    def test_threads_have_their_own_tasks_and_labels(self, case):
        model, inputs = case[0], text()

        def loss(task):
            labels = targets()[NAMES.index(task)].expand(4, 4)
            return model(**inputs, task_ids=task, labels=labels).loss.item()

        alone = [loss(task) for task in NAMES]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(loss, NAMES * 10)) == pytest.approx(alone * 10)


class TestDoors:
    def test_an_injected_model_has_heads_and_their_loss(self, case):
        model, loss, logits = case
        injected = peft.inject_adapter_in_model(config(), bert()).eval()
        injected.load_state_dict(model.base_model.model.state_dict())
        with use_task(injected, NAMES):
            out = injected(**text(), labels=targets())
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(out.logits, logits)

    @pytest.mark.transformers_door
    def test_transformers_own_add_adapter_has_them_too(self):
        base = bert()
        base.add_adapter(config())
        with use_task(base, NAMES):
            out = base(**text(), labels=targets())
        assert out.logits.isinf().sum(1).tolist() == [4 - size for size in N_LABELS]
        assert out.loss.isfinite()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing_gives_the_same_gradients(self, reentrant):
        gradients = []
        for checkpointed in (True, False):
            torch.manual_seed(0)
            model = adapted(MODELS["deberta"].make(), target_modules=["query_proj", "value_proj"]).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model(**text(), task_ids=NAMES, labels=targets()).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and "poly" in n})
        assert gradients[0].keys() == gradients[1].keys()
        for name, grad in gradients[0].items():
            torch.testing.assert_close(grad, gradients[1][name], msg=name)

    def test_a_compiled_model_computes_the_same_logits_and_loss(self, case):
        model, loss, logits = case
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            out = compiled(**text(), task_ids=torch.arange(4), labels=targets())
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(out.logits, logits)

    def test_autocast_keeps_the_loss_in_float32(self, case):
        model, loss, _ = case
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**text(), task_ids=NAMES, labels=targets())
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, loss, rtol=0.1, atol=0.1)


class TestOut:
    @pytest.mark.parametrize("name", ["bert", "roberta", "t5", "swin"])
    def test_plain_peft_opens_an_exported_task_with_the_lines_of_its_readme(self, name, tmp_path):
        case = MODELS[name]
        case.make().save_pretrained(tmp_path / "base")
        base = type(case.make()).from_pretrained(tmp_path / "base")
        model = adapted(base, target_modules=case.targets)
        inputs = case.inputs()
        with torch.no_grad():
            logits = model(**inputs, task_ids=NAMES).logits
        folders = model.export_lora(None, tmp_path / "all")
        lines = ["import sys, torch"]
        for row, (task, folder) in enumerate(folders.items()):
            code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
            lines += [
                code.replace('"..."', repr(str(folder))),
                f"inputs, want = torch.load({str(tmp_path / 'x.pt')!r})",
            ]
            lines += [f"y = model.eval()(**inputs).logits[{row}]", f"want = want[{row}, :len(y)]"]
            lines += ["torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)"]
            lines += [f"print({task!r}, model.config.num_labels, list(model.config.id2label.values()))"]
        torch.save((inputs, logits), tmp_path / "x.pt")
        lines += ["assert 'peft_poly' not in sys.modules"]
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        labels = read_task_labels(LABELS, NAMES)
        assert done.stdout.splitlines() == [f"{n} {len(k)} {list(k.names)}" for n, k in labels.items()]

    def test_the_warning_counts_the_whole_tensors_that_a_folder_has(self, tmp_path):
        for name, first in (("bert", "classifier"), ("roberta", "classifier.dense")):
            model = adapted(MODELS[name].make(), target_modules=MODELS[name].targets)
            with pytest.warns(UserWarning, match="whole tensor") as caught:
                model.export_lora("genres", tmp_path / name)
            keys = [key for key in load_file(tmp_path / name / "adapter_model.safetensors") if ".lora_" not in key]
            said = next(str(warning.message) for warning in caught if "whole tensor" in str(warning.message))
            assert f"has {len(keys)} whole tensor(s)" in said
            assert f"such as {min(keys)}." in said
            assert f"{first}.bias" in min(keys)

    def test_the_card_lists_the_labels(self, tmp_path):
        adapted().save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "| 0 | sentiment | one of bad, good |" in card
        assert "| 2 | stars | a number |" in card
        assert "| 3 | genres | several of drama, war, love |" in card

    def test_poly_of_peft_has_no_heads_and_says_so(self, tmp_path):
        from peft_poly import convert_checkpoint

        adapted(lora_alpha=1).save_pretrained(tmp_path / "ours")
        with pytest.raises(ValueError, match="POLY has no task_labels"):
            convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="POLY")

    def test_growth_is_saved(self, tmp_path):
        model = adapted()
        before = model(**text(), task_ids=NAMES).logits
        model.add_tasks(["length", "praise"], labels={"praise": ["a", "b"], "length": 6})
        model.add_tasks(["mood"], init="sentiment", labels={"mood": ["bad", "good"]})
        model.remove_tasks("topic")
        model.rename_task("stars", "rating")
        names = ["sentiment", "rating", "genres", "length", "praise", "mood"]
        assert model.task_names == names
        assert list(model.task_labels) == names
        model.save_pretrained(tmp_path)
        base = bert()
        base.load_state_dict(model.unload().state_dict())
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        after = loaded(**text(), task_ids=["sentiment", "rating", "rating", "genres"]).logits
        assert after.shape == (4, 6)
        for row in (0, 2, 3):
            torch.testing.assert_close(after[row, :4], before[row], rtol=1e-5, atol=1e-6)
        mood = loaded(**text(), task_ids="mood").logits[0]
        torch.testing.assert_close(mood, loaded(**text(), task_ids="sentiment").logits[0])

    def test_it_goes_to_a_hub_and_back(self, tmp_path):
        model = adapted()
        base = copy.deepcopy(model).unload()
        torch.save((base.state_dict(), model.state_dict(), text()), tmp_path / "states.pt")
        with HubServer() as hub:
            env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_" + "x" * 34}
            env |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])}
            done = subprocess.run(
                [sys.executable, "-c", PUSH, tmp_path / "states.pt"],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            assert (
                "| 3 | genres | several of drama, war, love |" in hub.files("user/heads", "main")["README.md"].decode()
            )


def test_an_adapter_that_could_not_be_added_leaves_the_model_as_it_was():
    model = adapted()
    before = model(**text(), task_ids=NAMES).logits
    with pytest.raises(ValueError, match="does not divide"):
        model.add_adapter("other", config(n_splits=3, task_labels={"a": 2}))
    torch.testing.assert_close(model(**text(), task_ids=NAMES).logits, before)
    assert sum(isinstance(m, TaskHeads) for m in model.modules()) == 1
