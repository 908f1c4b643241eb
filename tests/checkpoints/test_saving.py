"""Saving is all or nothing, and leaves alone what is not ours. (The card is in checkpoints/test_model_card.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import peft
import pytest
import torch
from adapters import adapt, poly
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import CASES, MLP
from torch import nn

from peft_poly import PolyConfig
from peft_poly.checkpoints import saving

INPUTS = CASES["mlp"].inputs()
IDS = [2, 0, 1]
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def adapter(seed: int = 1, **settings) -> peft.PeftModel:
    """An adapter of the one base model; another seed, other weights."""
    model = base()
    torch.manual_seed(seed)
    return adapt(model, poly("mlp", **settings))


def loaded_output(folder: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(base(), folder)(**INPUTS, task_ids=IDS)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ all or nothing
def die_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict, path: str, metadata: dict | None = None) -> None:
        Path(path).write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{half")
        raise OSError("disk full")

    monkeypatch.setattr("peft.peft_model.safe_save_file", half)


def die_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: PolyConfig, folder: str, **kwargs: object) -> None:
        (Path(folder) / CONFIG).write_text('{"peft_type": "PE')
        raise OSError("disk full")

    monkeypatch.setattr(PolyConfig, "save_pretrained", half)


def die_in_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: ModelCard, path: str, **kwargs: object) -> None:
        Path(path).write_text("---\nlib")
        raise OSError("disk full")

    monkeypatch.setattr(ModelCard, "save", half)


def die_between_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    calls: list[str] = []

    def second_fails(source: str, target: str) -> None:
        calls.append(str(target))
        if len(calls) == 2:
            raise PermissionError("another process has the file open")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)


CRASHES = [die_in_the_weights, die_in_the_config, die_in_the_card, die_between_two_files]


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_while_saving_leaves_the_adapter_that_was_there(tmp_path, monkeypatch, crash):
    adapter(1).save_pretrained(tmp_path)
    before, wanted = tree(tmp_path), loaded_output(tmp_path)
    other = adapter(2, r=3, n_tasks=5)  # of another size, so that no mixture of the two folders would load
    with monkeypatch.context() as patch:
        crash(patch)
        with pytest.raises(OSError, match=r"disk full|another process"):
            other.save_pretrained(tmp_path)
    assert tree(tmp_path) == before  # no staging folder either
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert torch.equal(loaded_output(tmp_path), wanted)

    other.save_pretrained(tmp_path)
    assert torch.equal(loaded_output(tmp_path), other(**INPUTS, task_ids=IDS))


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_of_the_first_save_leaves_no_file(tmp_path, monkeypatch, crash):
    crash(monkeypatch)
    with pytest.raises(OSError, match=r"disk full|another process"):
        adapter().save_pretrained(tmp_path / "new")
    assert tree(tmp_path) == {}


def test_saving_again_replaces_the_adapter_and_keeps_foreign_files(tmp_path):
    foreign = {"trainer_state.json": b"{}", "notes/ideas.md": b"none yet", "optimizer.pt": b"\x00\x01"}
    for name, content in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for seed in (1, 2):
        model = adapter(seed)
        model.save_pretrained(tmp_path)
        assert torch.equal(loaded_output(tmp_path), model(**INPUTS, task_ids=IDS))
        files = tree(tmp_path)
        assert files.keys() == {*foreign, WEIGHTS, CONFIG, CARD}
        assert {name: files[name] for name in foreign} == foreign


def test_named_adapters_lie_in_folders_of_their_own(tmp_path):
    model = adapter(1)
    model.add_adapter("more", poly("mlp", r=2, n_tasks=6))
    model.save_pretrained(str(tmp_path))
    assert tree(tmp_path).keys() == {WEIGHTS, CONFIG, CARD, f"more/{WEIGHTS}", f"more/{CONFIG}"}
    assert torch.equal(loaded_output(tmp_path), model(**INPUTS, task_ids=IDS))
    model.set_adapter("more")
    assert torch.equal(loaded_output(tmp_path / "more"), model(**INPUTS, task_ids=IDS))


def test_only_the_selected_adapters_are_saved(tmp_path):
    model = adapter(1)
    model.add_adapter("more", poly("mlp"))
    model.save_pretrained(tmp_path, selected_adapters=["more"])
    assert tree(tmp_path).keys() == {CARD, f"more/{WEIGHTS}", f"more/{CONFIG}"}
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["missing"])
    assert not tree(tmp_path / "none")


@pytest.mark.parametrize("safe_first", [False, True])
def test_the_last_save_is_the_one_that_loads_whatever_its_format(tmp_path, safe_first):
    for seed, safe in ((1, safe_first), (2, not safe_first)):
        model = adapter(seed)
        model.save_pretrained(tmp_path, safe_serialization=safe)
        assert torch.equal(loaded_output(tmp_path), model(**INPUTS, task_ids=IDS))
        assert tree(tmp_path).keys() == {WEIGHTS if safe else "adapter_model.bin", CONFIG, CARD}


def test_other_processes_write_no_file(tmp_path):
    adapter().save_pretrained(tmp_path / "new", is_main_process=False)
    assert tree(tmp_path) == {}


def test_a_file_in_place_of_the_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        adapter().save_pretrained(tmp_path / "file")
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_state_dict_that_is_passed_is_the_one_that_is_saved(tmp_path):
    model = adapter(1)
    state_dict = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert torch.equal(loaded_output(tmp_path), base()(**INPUTS))


def test_files_and_folders_have_the_rights_that_pefts_own_save_gives_them(tmp_path):
    model, lora = adapter(), peft.get_peft_model(base(), peft.LoraConfig(target_modules=["lin0"]))
    model.add_adapter("more", poly("mlp"))
    lora.add_adapter("more", peft.LoraConfig(target_modules=["lin0"]))
    rights = []
    for saved, folder in ((model, tmp_path / "ours"), (lora, tmp_path / "theirs")):
        saved.save_pretrained(folder)
        rights.append({str(path.relative_to(folder)): path.stat().st_mode for path in folder.rglob("*")})
    assert rights[0] == rights[1]


# ------------------------------------------------------------------------------------------------------ other methods
def test_models_of_other_methods_are_saved_as_before(tmp_path):
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    assert tree(tmp_path).keys() == {WEIGHTS, CONFIG, CARD}
    assert "peft-poly" not in (tmp_path / CARD).read_text()


def test_a_push_that_cannot_read_the_card_of_the_repository_stops_before_it_overwrites_it(monkeypatch):
    class BrokenHub:
        def __init__(self, token: object) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            return type("Url", (), {"repo_id": repo_id})

        def hf_hub_download(self, *args: object, **kwargs: object) -> str:
            raise LocalEntryNotFoundError("the connection was lost")

        def upload_folder(self, **kwargs: object) -> None:
            pytest.fail("the card of the repository would be lost")

    monkeypatch.setattr(saving, "HfApi", BrokenHub)
    with pytest.raises(LocalEntryNotFoundError, match="connection was lost"):
        adapter().push_to_hub("user/adapter")
