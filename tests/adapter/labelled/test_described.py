"""Heads in a module of one's own are loaded for the tasks that they were saved for, or refused."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from peft_poly import PolyConfig, TaskHeads

LABELS = {"acme": ["x", "y"], "bolt": ["x", "y"], "tags": {"labels": ["a", "b"], "kind": "multi_label"}, "price": 1}
X = torch.ones(1, 8)


class Own(nn.Module):
    def __init__(self, labels: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.part = nn.Linear(8, 16), nn.Sequential(TaskHeads(16, labels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(torch.tanh(self.body(x)))


def adapted(labels: dict, saves: str = "part") -> peft.PeftModel:
    config = PolyConfig(target_modules=["body"], modules_to_save=[saves], task_names=[*LABELS], init_weights=False)
    model = peft.get_peft_model(Own(labels), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def without(*tasks: str) -> dict:
    return {task: labels for task, labels in LABELS.items() if task not in tasks}


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("saves", ["part", "part.0"])
def test_the_same_heads_are_loaded(tmp_path, name, saves):
    model = adapted(LABELS, saves)
    model.save_pretrained(tmp_path)
    base = Own(LABELS)
    base.body.load_state_dict(model.base_model.model.body.base_layer.state_dict())
    again = peft.PeftModel.from_pretrained(base, tmp_path, adapter_name=name).eval()
    for task in LABELS:
        torch.testing.assert_close(again(X, task_ids=task), model(X, task_ids=task))


@pytest.mark.parametrize(
    ("labels", "there", "here"),
    [
        ({"bolt": ["x", "y"], **LABELS}, r"head 0 is that of 'acme' \(x, y\) there", r"of 'bolt' \(x, y\) here"),
        ({**LABELS, "bolt": ["y", "x"]}, r"head 1 is that of 'bolt' \(x, y\) there", r"of 'bolt' \(y, x\) here"),
        ({**LABELS, "tags": ["a", "b"]}, r"head 2 is that of 'tags' \(a, b\) there", "of 'tags'"),
        (without("price"), r"head 3 is that of 'price' \(a number\) there", "of no task here"),
        ({**LABELS, "more": 2}, "head 4 is that of no task there", r"of 'more' \(LABEL_0, LABEL_1\) here"),
    ],
    ids=["order of tasks", "order of labels", "kind", "fewer", "more"],
)
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter", "a second adapter"])
def test_other_heads_are_refused_with_what_to_make(tmp_path, labels, there, here, door):
    adapted(LABELS).save_pretrained(tmp_path)
    made = (
        r"Make the module with `TaskHeads\(..., \{'acme': \['x', 'y'\], 'bolt': \['x', 'y'\], 'tags': \{.*'price': 1\}"
    )
    doors = {
        "from_pretrained": lambda: peft.PeftModel.from_pretrained(Own(labels), tmp_path),
        "load_adapter": lambda: adapted(labels).load_adapter(tmp_path, "default"),
        "a second adapter": lambda: adapted(labels).load_adapter(tmp_path, "second"),
    }
    with pytest.raises(ValueError, match=f"The heads of part.0 in .*{there}, and {here}.*{made}"):
        doors[door]()


def test_heads_that_have_grown_are_saved_as_they_are_by_now(tmp_path):
    model = adapted(LABELS)
    model.add_tasks(["new"], labels={"new": ["p", "q"]})
    model.remove_tasks("acme")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head 0 is that of 'bolt' .*\{'bolt': .*'new': \['p', 'q'\]\}"):
        peft.PeftModel.from_pretrained(Own(LABELS), tmp_path)
    again = peft.PeftModel.from_pretrained(Own({**without("acme"), "new": ["p", "q"]}), tmp_path)
    for key, value in again.state_dict().items():
        if "modules_to_save" in key:
            assert torch.equal(model.state_dict()[key], value)


def test_a_folder_of_before_is_loaded_as_before(tmp_path):
    adapted(LABELS).save_pretrained(tmp_path)
    (tmp_path / "task_heads.json").unlink()
    peft.PeftModel.from_pretrained(Own({"bolt": ["x", "y"], **LABELS}), tmp_path)


def test_heads_that_the_adapter_does_not_train_may_differ(tmp_path):
    config = PolyConfig(target_modules=["body"], task_names=[*LABELS])
    peft.get_peft_model(Own(LABELS), config).save_pretrained(tmp_path)
    assert not (tmp_path / "task_heads.json").exists()
    peft.PeftModel.from_pretrained(Own({**LABELS, "more": 2}), tmp_path)


def test_an_adapter_without_heads_of_ones_own_has_no_such_file(tmp_path):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 2)), PolyConfig(target_modules=["0"], n_tasks=2))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "task_heads.json").exists()
