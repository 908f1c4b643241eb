"""Pushing to the Hub and loading from it, through the real client and a Hub on the loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny import TASKS, llama

from peft_poly.checkpoints import saving

STEPS = Path(__file__).with_name("hub_steps.py")
ADAPTER, BASE, LORA = "user/adapter", "user/base", "user/lora"


class Story(NamedTuple):
    """The Hub after the steps, and the folder with their results."""

    hub: HubServer
    folder: Path

    def card(self, repo: str = ADAPTER, revision: str = "main") -> ModelCard:
        return ModelCard(self.hub.files(repo, revision)["README.md"].decode(), ignore_metadata_errors=False)


def run(step: str, hub: HubServer, folder: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_" + "x" * 34,
    }
    done = subprocess.run([sys.executable, STEPS, step, folder], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    with HubServer() as hub:
        hub.seed(BASE, {path.name: path.read_bytes() for path in (folder / "base").iterdir()})
        run("push", hub, folder)
        story = Story(hub, folder)
        (lines,) = re.findall(r"```python\n(.*?)```", story.card().text, flags=re.DOTALL)
        (folder / "loading_lines.py").write_text(lines)
        run("load", hub, folder)
        run("without", hub, folder)
        yield story


def test_a_push_carries_the_adapter_its_config_and_our_card(story):
    _, first, *_ = story.hub.commits(ADAPTER)
    assert first.message == "Upload adapter"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} == first.files.keys()
    card = ModelCard(first.files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", BASE)
    assert set(card.data.tags) >= {"finance", "peft-poly", "polytropon", "multi-task", f"base_model:adapter:{BASE}"}
    assert all(f"| {task} | {name} |" in card.text for task, name in enumerate(TASKS))
    assert "import peft_poly" in card.text
    assert "without it PEFT stops with `KeyError: 'PEFT_POLY'`" in card.text


def test_the_repository_is_made_as_asked(story):
    assert story.hub.private == {ADAPTER}


def test_a_second_push_keeps_what_users_wrote_in_the_card(story):
    _, first, edit, second = story.hub.commits(ADAPTER)  # and the third, of unchanged files, made no commit
    assert second.message == "Trained on"
    changed = {name for name in second.files if second.files[name] != edit.files[name]}
    assert changed == {"adapter_model.safetensors"}
    assert "Sorts letters." in edit.files["README.md"].decode()
    assert "Sorts letters." not in first.files["README.md"].decode()
    card = story.card()
    assert card.text.strip().startswith("# Bank letters\n\nSorts letters.")
    assert card.text.count(saving.BEGIN) == 1
    assert {"bank", "finance", "peft-poly"} <= set(card.data.tags)


def test_a_branch_can_be_pushed_to(story):
    branch, main = story.hub.files(ADAPTER, "dev"), story.hub.files(ADAPTER)
    assert branch["adapter_model.safetensors"] != main["adapter_model.safetensors"]
    assert branch["README.md"] == main["README.md"]
    assert len(story.hub.branches[ADAPTER, "dev"]) == len(story.hub.commits(ADAPTER)) + 1


def test_every_way_of_loading_gives_the_outputs_that_were_pushed(story):
    pushed, loaded = torch.load(story.folder / "pushed.pt"), torch.load(story.folder / "loaded.pt")
    sha = story.hub.commits(ADAPTER)[1].sha
    assert pushed.keys() == {sha, "main", "dev"}
    assert not torch.equal(pushed[sha], pushed["main"])
    for revision, outputs in pushed.items():
        assert torch.equal(loaded[revision], outputs)
    for way in ("no revision", "auto"):
        assert torch.equal(loaded[way], pushed["main"])


def test_the_loading_lines_of_the_card_on_the_hub_run(story):
    pushed, loaded = torch.load(story.folder / "pushed.pt"), torch.load(story.folder / "loaded.pt")
    torch.testing.assert_close(loaded["card"][0], pushed["main"][0])  # the first row is of the task that it shows


def test_the_config_loads_by_itself(story):
    wanted = {"r": 2, "n_splits": 2, "task_names": TASKS, "base_model_name_or_path": BASE}
    assert json.loads((story.folder / "config.json").read_text()) == wanted


def test_a_process_without_the_import_gets_the_error_that_the_card_names(story):
    assert (story.folder / "error.txt").read_text() == "KeyError('PEFT_POLY')"


def test_other_methods_are_pushed_as_without_this_package(story):
    with_it, without_it = story.hub.files(LORA), story.hub.files(f"{LORA}-before")
    assert with_it == without_it
    assert "adapter_model.safetensors" in with_it
