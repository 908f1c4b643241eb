"""Where a saved adapter is: a folder, or a repository on a Hub of this machine, which is asked once."""

from __future__ import annotations

import time

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from peft_poly.checkpoints.finding import MissingError, find_file

NO_HUB = "http://127.0.0.1:9"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """`find_file` with a Hub of its own, and a cache of its own; it may not wait and ask again."""
    forget = getattr(
        huggingface_hub, "configure_http_backend", lambda: None
    )  # before 1.0, sessions stay offline, or on
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    forget()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("It waits, to ask again."))

    def call(endpoint, source, names, **kwargs):
        return find_file(source, names, endpoint=endpoint, cache_dir=tmp_path / "cache", **kwargs).read_text()

    yield call
    forget()


class TestFolders:
    def test_the_first_of_the_names_that_is_there_is_found(self, tmp_path):
        (tmp_path / "b").write_text("")
        assert find_file(tmp_path, ("a", "b")) == tmp_path / "b"
        (tmp_path / "a").write_text("")
        assert find_file(str(tmp_path), ("a", "b")) == tmp_path / "a"

    def test_a_folder_without_it_says_which_of_its_folders_have_it(self, tmp_path):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "b").write_text("")
        with pytest.raises(FileNotFoundError, match=r"no a or b in .*\. Its folder\(s\) inner hold one: name that"):
            find_file(tmp_path, ("a", "b"))

    def test_of_a_file_its_folder_is_named(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(FileNotFoundError, match=rf"is a file\. Name the folder that it is in: {tmp_path}"):
            find_file(tmp_path / "a", ("a",))

    def test_the_folder_that_one_is_in_is_named_in_full(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"There is no a in {tmp_path}"):
            find_file(".", ("a",))

    def test_who_catches_what_peft_raises_catches_this(self, tmp_path):
        with pytest.raises(ValueError, match="There is no a in"):
            find_file(tmp_path, ("a",))
        assert issubclass(MissingError, FileNotFoundError)


class TestHub:
    def test_what_a_repository_has_is_found(self, find):
        with HubServer() as hub:
            hub.seed("user/there", {"b": b"of b", "inner/c": b"of c"})
            assert find(hub.url, "user/there", ("a", "b")) == "of b"
            assert find(hub.url, "user/there", ("c",), subfolder="inner") == "of c"

    @pytest.mark.parametrize(
        ("source", "kwargs", "message"),
        [
            ("user/there", {}, "The repository user/there on the Hub has no a"),
            ("user/not", {}, "'user/not' is no folder, .* there is none, or it is private"),
            ("user/there", {"revision": "gone"}, "'user/there' is no folder, .* it has no such revision"),
        ],
    )
    def test_what_it_has_not_is_asked_for_once(self, find, source, kwargs, message):
        with HubServer() as hub:
            hub.seed("user/there", {"b": b"of b"})
            with pytest.raises(FileNotFoundError, match=message):
                find(hub.url, source, ("a",), **kwargs)
        assert len(hub.requests) == 1

    @pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
    @pytest.mark.parametrize("source", ["any", "user/any"])
    def test_where_there_is_no_network_it_is_said_at_once(self, find, source, names):
        with pytest.raises(FileNotFoundError, match=f"'{source}' is no folder, .* the Hub cannot be asked"):
            find(NO_HUB, source, names)

    def test_what_is_in_the_cache_is_found_without_a_network(self, find):
        with HubServer() as hub:
            hub.seed("user/there", {"b": b"of b"})
            find(hub.url, "user/there", ("b",))
        assert find(NO_HUB, "user/there", ("b",)) == "of b"

    @pytest.mark.parametrize("source", ["./not", "/not", "a/b/c", "-x"])
    def test_what_can_be_no_id_is_not_asked_for(self, source):
        with pytest.raises(FileNotFoundError, match=f"'{source}' is no folder, and no id"):
            find_file(source, ("a",))

    def test_where_the_hub_may_not_be_asked_it_says_so(self):
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids"):
            find_file("user/any", ("a",))
