"""A folder is written whole or not at all, and what was there is kept unless it may be replaced."""

import os

import pytest

from peft_poly.checkpoints.staging import staged


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def saved(folder, name="adapter_config.json"):
    folder.mkdir(parents=True)
    (folder / name).write_text("old")
    return folder


def test_the_folder_appears_under_its_name_at_the_end(tmp_path):
    target = tmp_path / "a" / "b"
    with staged(target) as folder:
        (folder / "file").write_text("new")
        assert folder.parent == target.parent
        assert not target.exists()
    assert tree(tmp_path) == ["a", "a/b", "a/b/file"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with staged(tmp_path / "new") as folder:
            (folder / "file").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(tmp_path, overwrite):
    (tmp_path / "new").mkdir()
    with staged(tmp_path / "new", overwrite) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == ["new", "new/file"]


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path):
    saved(tmp_path / "old")
    with pytest.raises(FileExistsError, match=r"not empty.*overwrite=True.*--force"), staged(tmp_path / "old"):
        pytest.fail("the block ran")
    assert tree(tmp_path) == ["old", "old/adapter_config.json"]


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "task/adapter_config.json"])
def test_a_saved_adapter_or_model_is_replaced_as_a_whole(tmp_path, name):
    saved(tmp_path / "old" / os.path.dirname(name), os.path.basename(name))
    with staged(tmp_path / "old", overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (tmp_path / "old" / name).read_text() == "old"
    assert tree(tmp_path) == ["old", "old/new"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    saved(tmp_path / "home", "thesis.tex")
    refused = pytest.raises(FileExistsError, match="holds no saved model or adapter")
    with refused, staged(tmp_path / "home", overwrite=True):
        pytest.fail("the block ran")
    assert tree(tmp_path) == ["home", "home/thesis.tex"]


def test_a_failure_keeps_what_was_to_be_replaced(tmp_path):
    saved(tmp_path / "old")
    with pytest.raises(RuntimeError, match="half way"), staged(tmp_path / "old", overwrite=True):
        raise RuntimeError("half way")
    assert (tmp_path / "old/adapter_config.json").read_text() == "old"
    assert tree(tmp_path) == ["old", "old/adapter_config.json"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path):
    saved(tmp_path / "old")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "old", overwrite=True) as folder:
        folder.rmdir()
    assert tree(tmp_path) == ["old", "old/adapter_config.json"]


def test_a_folder_that_was_filled_in_the_meantime_is_kept(tmp_path):
    with pytest.raises(FileExistsError, match="not empty"), staged(tmp_path / "new"):
        saved(tmp_path / "new")
    assert tree(tmp_path) == ["new", "new/adapter_config.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path, overwrite):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"), staged(tmp_path / "file", overwrite):
        pytest.fail("the block ran")
    assert (tmp_path / "file").read_text() == "old"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/file").read_text() == "new"
