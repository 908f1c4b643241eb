"""Saving an adapter: all or nothing, with a model card that says how to load it, on disk and on the Hub."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.peft_model import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel

from ..adapter.labelled.classifiers import named_heads
from ..adapter.labelled.described import described
from ..compute.kinds import KINDS
from ..compute.onloading import onloaded
from ..config import PolyConfig
from .reading import HEADS
from .sharding import check_given, check_whole

__all__ = ["create_or_update_model_card", "push_to_hub", "save_pretrained"]

CARD = "README.md"
BEGIN, END = "<!-- peft-poly: begin, written anew at each save -->", "<!-- peft-poly: end -->"
TAGS = ("multi-task", "peft-poly")
OTHER_FORMAT = {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}
MOST_TASKS = 50  # tasks listed in a card


def save_pretrained(original: Callable, model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`, by way of a staging folder: a save that fails leaves the one before as it was.

    Raises:
        RuntimeError: `state_dict` lacks a part of the adapter.
        ValueError: the adapter is sharded over processes.
    """
    call = inspect.signature(original).bind(save_directory, *args, **kwargs)
    call.apply_defaults()
    state_dict = call.arguments["kwargs"].get("state_dict")
    _check_tensors(model, call.arguments["selected_adapters"], state_dict)
    if state_dict is not None and not state_dict:  # PEFT would replace what rank 0 has saved by an empty file
        if call.arguments["is_main_process"]:
            warnings.warn(
                "`state_dict` is empty, so that nothing is saved. Tensors that were gathered are on rank 0: call "
                "`save_pretrained` there, or pass `is_main_process=rank == 0`."
            )
        return
    target = Path(save_directory)
    if not call.arguments["is_main_process"] or target.is_file():
        return original(save_directory, *args, **kwargs)
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        if (target / CARD).exists():
            shutil.copy(target / CARD, staging / CARD)
        with onloaded(model):
            original(str(staging), *args, **kwargs)
        for name in call.arguments["selected_adapters"] or model.peft_config:
            _describe_heads(model, name, staging if name == "default" else staging / name)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe_heads(model: PeftModel, adapter_name: str, folder: Path) -> None:
    heads = described(dict(named_heads(model.get_base_model(), adapter_name)))
    if heads and folder.is_dir():
        (folder / HEADS).write_text(json.dumps(heads, indent=2, ensure_ascii=False), encoding="utf-8")


def _check_tensors(model: PeftModel, adapter_names: Any, state_dict: Optional[dict[str, Any]]) -> None:
    """Raise unless the tensors to be saved, those of the model or the given ones, are all there and whole."""
    names = [name for name in adapter_names or model.peft_config if name in model.peft_config]
    if state_dict is None:
        check_whole(model, names)
    elif state_dict:
        for name in names:
            check_given(model, name, state_dict)


def _publish(staging: Path, target: Path) -> None:
    """Move the new files into place; if one of them cannot be moved, all that was there is put back."""
    files = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
    before = Path(tempfile.mkdtemp(dir=staging))
    begun: list[Path] = []
    try:
        for file in files:
            for folder in (before, target):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if (target / file).exists():
                _link(target / file, before / file)
            begun.append(file)
            os.replace(staging / file, target / file)
    except BaseException:
        for file in begun:
            if (before / file).exists():
                os.replace(before / file, target / file)
            else:
                (target / file).unlink(missing_ok=True)
        raise
    for file in files:
        if file.name in OTHER_FORMAT:  # PEFT would load the old safetensors file rather than the new one beside it
            (target / file).with_name(OTHER_FORMAT[file.name]).unlink(missing_ok=True)


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, place)


def push_to_hub(
    original: Callable,
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    commit_description: Optional[str] = None,
    private: Optional[bool] = None,
    token: Optional[str | bool] = None,
    revision: Optional[str] = None,
    create_pr: bool = False,
    tags: Optional[list[str]] = None,
    max_shard_size: Any = None,
    **save_kwargs: Any,
) -> Any:
    """`PeftModel.push_to_hub`, keeping PEFT's card where transformers would put its generic one in its place.

    The text of a card that the repository already has is kept.

    Returns:
        The `huggingface_hub.CommitInfo` of the upload.

    Raises:
        RuntimeError, ValueError: as `save_pretrained`.
    """
    _check_tensors(model, save_kwargs.get("selected_adapters"), save_kwargs.get("state_dict"))
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            shutil.copy(api.hf_hub_download(repo_id, CARD, revision=revision), Path(folder) / CARD)
        except LocalEntryNotFoundError:  # no connection, which says nothing about the card
            raise
        except EntryNotFoundError:
            pass
        model.save_pretrained(folder, **save_kwargs)
        if tags:
            card = ModelCard.load(Path(folder) / CARD)
            card.data.tags = sorted({*(card.data.tags or []), *tags})
            card.save(Path(folder) / CARD)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def create_or_update_model_card(original: Callable, model: PeftModel, output_dir: str) -> None:
    """PEFT's card, with the tasks and the lines that load the adapter; text that users wrote around them is kept."""
    path = Path(output_dir) / CARD
    config = model.active_peft_config
    if not path.exists():
        path.write_text(f"---\nlibrary_name: peft\n---\n\n# Task-routed adapter\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    tags = set(ModelCard.load(path).data.tags or [])  # the next line drops them
    original(output_dir)
    card = ModelCard.load(path)
    base_model = config.base_model_name_or_path or card.data.get("base_model") or None
    card.data["base_model"] = base_model  # None, for a base model made from a config, leaves the line out
    tags = {
        tag
        for tag in {*tags, *(card.data.tags or []), *TAGS, *KINDS[config.poly_type].tags}
        if not tag.startswith("base_model:adapter:")
    }
    card.data.tags = sorted(tags | ({f"base_model:adapter:{base_model}"} if base_model else set()))
    section = f"{BEGIN}\n{_section(model, config, base_model)}\n{END}"
    before, begin, rest = card.text.partition(BEGIN)
    card.text = f"{before}{section}{rest.partition(END)[2]}" if begin else f"{card.text}\n\n{section}\n"
    card.save(path)


def _section(model: PeftModel, config: PolyConfig, base_model: Optional[str]) -> str:
    names = config.task_names or [str(task) for task in range(config.n_tasks)]
    labels, head, line = config.labels, "| id | task |", "|---|---|"
    cells = [f"| {task} | {_cell(name)} |" for task, name in enumerate(names)]
    if labels is not None:
        head, line = f"{head} labels |", f"{line}---|"
        cells = [f"{row} {_cell(str(found))} |" for row, found in zip(cells, labels.values(), strict=True)]
    rows = "\n".join(cells[:MOST_TASKS])
    more = f"\n\n... and {len(names) - MOST_TASKS} more." if len(names) > MOST_TASKS else ""
    example = repr(names[0]) if config.task_names else "0"
    return f"""\
{KINDS[config.poly_type].described(config)}

## Tasks

{head}
{line}
{rows}{more}

## How to load it

It needs the Python package `peft-poly`. Importing it registers the method with PEFT; without it PEFT stops with \
`KeyError: 'PEFT_POLY'`.

```python
{_loading_lines(model, base_model)}
outputs = model(**inputs, task_ids={example})  # one task for all rows, or a list with one per row
```"""


def _cell(name: str) -> str:
    return " ".join(name.split()).replace("|", "\\|")


def _loading_lines(model: PeftModel, base_model: Optional[str]) -> str:
    base = model.get_base_model()
    lines = ["import peft_poly  # registers the adapter type", "from peft import PeftModel"]
    name, adapter = type(base).__name__, model.active_adapter
    if type(base).__module__.startswith("transformers.") and isinstance(base, PreTrainedModel) and base_model:
        lines += [f"from transformers import {name}", "", f'base = {name}.from_pretrained("{base_model}")']
    else:
        lines += ["", f"base = ...  # the {name} that the adapter was trained on"]
    place = '"..."' if adapter == "default" else f'"...", subfolder="{adapter}"'
    lines += [f"model = PeftModel.from_pretrained(base, {place})  # this folder, or the id of this repository"]
    return "\n".join(lines)
