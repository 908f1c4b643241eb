"""A file of a saved adapter or model: of a folder, or of a repository on the Hub, which is asked once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

__all__ = ["MissingError", "find_file"]

REASONS = {  # what the Hub's errors mean, the special before the general
    GatedRepoError: "it is gated; ask for access on its page, and log in with `hf auth login`",
    RepositoryNotFoundError: "there is none, or it is private and you are not logged in (`hf auth login`)",
    RevisionNotFoundError: "it has no such revision",
    OfflineModeIsEnabled: "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub",
    LocalEntryNotFoundError: "it is not in the cache, and the Hub was not asked",
}


BUSY = (429, 500, 502, 503, 504)  # a Hub that is worth asking again
SECONDS = 10.0  # that it has to answer


class MissingError(FileNotFoundError, ValueError):
    """There is no such folder or repository, or it lacks a file. A `ValueError` too, for that is what PEFT raises."""


def find_file(source: Union[str, Path], names: Iterable[str], **hub_kwargs: Any) -> Path:
    """The first of the named files that a folder or a repository on the Hub has.

    Args:
        source: the folder, or the id of the repository.
        names: of the files, the preferred one first.
        hub_kwargs: `revision`, `token`, `subfolder` and the like of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it has none of the files (a `MissingError`).
    """
    names, folder = tuple(names), Path(source, hub_kwargs.get("subfolder") or "")
    if folder.is_dir():
        return _in_folder(folder, names)
    if folder.exists():
        raise MissingError(f"{folder} is a file. Name the folder that it is in: {folder.parent}")
    for name in names:
        if (found := _on_hub(str(source), name, hub_kwargs)) is not None:
            return found
    raise MissingError(f"The repository {source} on the Hub has no {' or '.join(names)}.")


def _in_folder(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    inner = sorted({path.parent.name for name in names for path in folder.glob(f"*/{name}")})
    hint = f" Its folder(s) {', '.join(inner[:5])} hold one: name that." if inner else ""
    raise MissingError(f"There is no {' or '.join(names)} in {folder if folder.name else folder.resolve()}.{hint}")


def _on_hub(repo: str, name: str, hub_kwargs: dict[str, Any]) -> Optional[Path]:
    """The file, downloaded; None if the repository is there and does not have it."""
    try:
        if not hub_kwargs.get("local_files_only"):
            _ask(repo, name, **hub_kwargs)
        return Path(hf_hub_download(repo, name, **hub_kwargs))
    except HFValidationError as error:
        raise MissingError(
            f"{repo!r} is no folder, and no id of a repository on the Hub (OWNER/NAME) either."
        ) from error
    except Exception as error:  # where there is no network: of requests, httpx or httpx2, by the client's version
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        if not isinstance(error, HfHubHTTPError) and (cached := _in_cache(repo, name, **hub_kwargs)):
            return cached
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        unreached = f"the Hub cannot be asked: {said}"
        reason = next((why for kind, why in REASONS.items() if isinstance(error, kind)), unreached)
        raise MissingError(
            f"{repo!r} is no folder, and no repository of that id could be had from the Hub: {reason}."
        ) from error


def _ask(
    repo: str,
    name: str,
    *,
    endpoint: Optional[str] = None,
    revision: Optional[str] = None,
    subfolder: Optional[str] = None,
    token: Any = None,
    **kwargs: Any,
) -> None:
    """Raises what the Hub says to one request. The download repeats one that fails, for half a minute."""
    url = hf_hub_url(repo, name, subfolder=subfolder, revision=revision, endpoint=endpoint)
    response = get_session().head(url, headers=build_hf_headers(token=token), timeout=SECONDS)
    if response.status_code >= 400 and response.status_code not in BUSY:
        hf_raise_for_status(response)


def _in_cache(
    repo: str,
    name: str,
    *,
    cache_dir: Any = None,
    revision: Optional[str] = None,
    subfolder: Optional[str] = None,
    **kwargs: Any,
) -> Optional[Path]:
    path = f"{subfolder}/{name}" if subfolder else name
    found = try_to_load_from_cache(repo, path, cache_dir=cache_dir, revision=revision)
    return Path(found) if isinstance(found, str) else None
