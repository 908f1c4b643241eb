"""Writing a folder, or a file, so that a write that fails leaves nothing behind and never harms what was there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["check_target", "staged", "staged_file"]

SAVED = ("adapter_config.json", "config.json")  # what a folder that we may replace holds, itself or in its subfolders


@contextmanager
def staged(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Write a folder under a temporary name beside `target`, and rename it to `target` at the end.

    If the block raises, the temporary folder is removed and `target` is as it was.

    Args:
        target: the folder to write; missing parents are made. It may exist if it is empty.
        overwrite: replace an existing folder as a whole, if it is one that holds a saved model or adapter.

    Yields:
        The temporary folder to write into.

    Raises:
        FileExistsError: the target is a file, or a folder that is not empty and may not be replaced.
        OSError: nothing can be written there.

    Example:

    ```py
    >>> import tempfile
    >>> from peft_poly.checkpoints.staging import staged
    >>> target = Path(tempfile.mkdtemp()) / "adapter"
    >>> with staged(target) as folder:
    ...     _ = (folder / "adapter_config.json").write_text("{}")
    >>> [path.name for path in target.iterdir()]
    ['adapter_config.json']

    ```
    """
    target = Path(target).resolve()
    check_target(target, overwrite)
    staging = _sibling(target, "writing")
    with _saying(target):
        staging.mkdir(parents=True)
    try:
        yield staging
        _put(staging, target, overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside `path`, with its ending, and rename it to `path` at the end.

    Args:
        path: the file to write; its folder is made if it is not there, and a file that is there is replaced.

    Yields:
        The temporary file to write.

    Raises:
        OSError: nothing can be written there.
    """
    staging = _sibling(path, "writing", path.suffix)
    try:
        with _saying(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.touch()
        yield staging
        os.replace(staging, path)
    finally:
        with suppress(OSError):
            staging.unlink()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `FileExistsError` if `staged` would refuse to write there."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, and a folder was to be written there. Choose another place.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty. Choose another folder, or pass `overwrite=True` (`--force` on the "
            "command line) to replace it as a whole."
        )
    if not any((folder / name).exists() for folder in (target, *target.iterdir()) for name in SAVED):
        raise FileExistsError(
            f"{target} holds no saved model or adapter ({' or '.join(SAVED)}), so it is not replaced, for it may be "
            "something else. Remove it yourself, or choose another folder."
        )


def _put(staging: Path, target: Path, overwrite: bool) -> None:
    """Rename `staging` to `target`; the folder that was there is moved aside first, and back if that fails."""
    check_target(target, overwrite)  # it may have been written in the meantime
    if not target.exists():
        staging.rename(target)
        return
    aside = _sibling(target, "replaced")
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _saying(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = f"{error.strerror}: {error.filename}"
        raise type(error)(f"{target} cannot be written ({said}). Choose another place.") from error


def _sibling(target: Path, word: str, ending: str = "") -> Path:
    return target.parent / f".{target.name}.{word}-{uuid.uuid4().hex[:8]}{ending}"
