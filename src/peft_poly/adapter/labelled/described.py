"""Which task each head of a module of one's own is for: weights are told apart by their places alone.

With `PolyConfig.task_labels` the config says it. A `TaskHeads` in a module of one's own is made by that module's code,
so what it was made of is saved beside its weights, and compared with what the code makes when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...labels import TaskLabels
from .heads import TaskHeads

__all__ = ["check_described", "described", "heads_of_base"]

Described = dict[str, list[dict[str, Any]]]


def described(heads: Mapping[str, TaskHeads]) -> Described:
    """The tasks and labels of heads in modules of one's own, in their order, by the module's name."""
    own = {name: found for name, found in heads.items() if found.adapter_name is None}  # else they are of a config
    return {name: [_entry(task, labels) for task, labels in found.labels.items()] for name, found in own.items()}


def heads_of_base(model: nn.Module) -> dict[str, TaskHeads]:
    """The heads that an adapter which is still to come will train copies of, by their names in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TaskHeads)}
    inner = ".original_module"  # of a module that another adapter trains a copy of
    return {name.replace(inner, ""): module for name, module in found.items() if ".modules_to_save." not in name}


def _entry(task: str, labels: TaskLabels) -> dict[str, Any]:
    return {"task": task, "kind": labels.kind, "labels": list(labels.names)}


def check_described(saved: Described, here: Described, source: str) -> None:
    """Raise if weights that are to be loaded were those of other heads, or of heads in another order.

    Args:
        saved: what was saved with them.
        here: what they are to be loaded into. Modules that only one of both has are left to who loads.
        source: where they are, for the message.

    Raises:
        ValueError: the first difference, and what the module must be made of.
    """
    for name, entries in saved.items():
        if name in here and here[name] != entries:
            places = range(max(len(entries), len(here[name])))
            place = next(n for n in places if entries[n : n + 1] != here[name][n : n + 1])
            wanted = {entry["task"]: _as_given(entry) for entry in entries}
            raise ValueError(
                f"The heads of {name} in the checkpoint {source!r} are not those of the model: head {place} is that of "
                f"{_shown(entries, place)} there, and of {_shown(here[name], place)} here, so tasks would get the "
                f"weights of other tasks. Make the module with `TaskHeads(..., {wanted})`, and then use `add_tasks` "
                "and `remove_tasks`."
            )


def _as_given(entry: dict[str, Any]) -> Any:
    """Labels as `TaskHeads` takes them."""
    if entry["kind"] == "regression":
        return 1
    return entry["labels"] if entry["kind"] == "single_label" else {"labels": entry["labels"], "kind": entry["kind"]}


def _shown(entries: list[dict[str, Any]], place: int) -> str:
    if place >= len(entries):
        return "no task"
    entry = entries[place]
    what = "a number" if entry["kind"] == "regression" else ", ".join(entry["labels"][:20])
    return f"{entry['task']!r} ({what})"
