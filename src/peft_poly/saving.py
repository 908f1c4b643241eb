"""Saving an adapter: all or nothing, with a model card that says how to load it, on disk and on the Hub."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft.peft_model import PeftModel
from transformers import PreTrainedModel

from .config import PolyConfig

__all__ = ["create_or_update_model_card", "push_to_hub", "save_pretrained"]

CARD = "README.md"
BEGIN, END = "<!-- peft-poly: begin, written anew at each save -->", "<!-- peft-poly: end -->"
TAGS = ("multi-task", "peft-poly", "polytropon")
MOST_TASKS = 50  # tasks listed in a card


def save_pretrained(original: Callable, model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`, by way of a staging folder: a save that fails leaves the one before as it was.

    Raises:
        RuntimeError: the parameters are sharded and were not gathered.
    """
    call = inspect.signature(original).bind(save_directory, *args, **kwargs)
    call.apply_defaults()
    target = Path(save_directory)
    if not call.arguments["is_main_process"] or target.is_file():
        return original(save_directory, *args, **kwargs)
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        if (target / CARD).exists():
            shutil.copy(target / CARD, staging / CARD)
        original(str(staging), *args, **kwargs)
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            place = target / file.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(EntryNotFoundError):
            shutil.copy(api.hf_hub_download(repo_id, CARD, revision=revision), Path(folder) / CARD)
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
    original(output_dir)
    card = ModelCard.load(path)
    base_model = config.base_model_name_or_path or card.data.get("base_model") or None
    card.data["base_model"] = base_model  # None, for a base model made from a config, leaves the line out
    card.data.tags = sorted({*(card.data.tags or []), *TAGS} - {"base_model:adapter:"})
    section = f"{BEGIN}\n{_section(model, config, base_model)}\n{END}"
    before, begin, rest = card.text.partition(BEGIN)
    card.text = f"{before}{section}{rest.partition(END)[2]}" if begin else f"{card.text}\n\n{section}\n"
    card.save(path)


def _section(model: PeftModel, config: PolyConfig, base_model: Optional[str]) -> str:
    names = config.task_names or [str(task) for task in range(config.n_tasks)]
    rows = "\n".join(f"| {task} | {name} |" for task, name in enumerate(names[:MOST_TASKS]))
    more = f"\n\n... and {len(names) - MOST_TASKS} more." if len(names) > MOST_TASKS else ""
    example = repr(names[0]) if config.task_names else "0"
    method = "Multi-Head Routing (arXiv 2211.03831)" if config.n_splits > 1 else "Polytropon (arXiv 2202.13914)"
    return f"""\
This adapter serves {config.n_tasks} task(s) with one inventory of {config.n_skills} LoRA skills of rank {config.r}, \
mixed per task in {config.n_splits} split(s): {method}.

## Tasks

| id | task |
|---|---|
{rows}{more}

## How to load it

It needs `pip install peft-poly`. The import registers the method with PEFT; without it PEFT stops with \
`KeyError: 'PEFT_POLY'`.

```python
{_loading_lines(model, base_model)}
outputs = model(**inputs, task_ids={example})  # one task for all rows, or a list with one per row
```"""


def _loading_lines(model: PeftModel, base_model: Optional[str]) -> str:
    base = model.get_base_model()
    lines = ["import peft_poly  # registers the adapter type", "from peft import PeftModel"]
    if isinstance(base, PreTrainedModel) and base_model:
        name = type(base).__name__
        lines += [f"from transformers import {name}", "", f'base = {name}.from_pretrained("{base_model}")']
    else:
        lines += ["", f"base = ...  # the {type(base).__name__} that the adapter was trained on"]
    lines += ['model = PeftModel.from_pretrained(base, "...")  # this folder, or the id of this repository']
    return "\n".join(lines)
