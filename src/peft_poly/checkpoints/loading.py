"""Loading weights into an adapter that is there: they must be of its tasks, in its order."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Union

import torch
from peft.config import PeftConfig
from peft.peft_model import PeftModel
from torch import nn

from ..adapter.labelled.classifiers import named_heads
from ..adapter.labelled.described import check_described, described, heads_of_base
from ..compute.onloading import onloaded
from ..labels import TaskLabels
from ..layer import PolyLayer
from .finding import find_file
from .reading import HEADS, read_config

__all__ = ["check_heads", "check_task_names", "difference", "load_adapter"]


def load_adapter(original: Callable, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.load_adapter`; of an adapter that is there it takes the weights alone, whatever its tasks are called.

    Raises:
        ValueError: the adapter has other tasks than the saved one, or others at an id.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    name, source = call.arguments["adapter_name"], call.arguments["model_id"]
    hub_kwargs, _ = model._split_kwargs(call.arguments.get("kwargs", {}))
    if name in model.peft_config:
        check_task_names(source, model.peft_config[name], name, **hub_kwargs)
    check_heads(source, model.get_base_model(), name, **hub_kwargs)
    with torch.inference_mode(False), onloaded(model, changed=True):
        result = original(*args, **kwargs)
    _warn_of_what_has_no_place(result.unexpected_keys, name)
    return result


def _warn_of_what_has_no_place(unexpected: Sequence[str], adapter_name: str) -> None:
    """PEFT warns of tensors that a checkpoint lacks, and says nothing of those that it drops."""
    dropped = [key for key in unexpected if f".{PolyLayer.prefix}" in key]
    if dropped:
        warnings.warn(
            f"Adapter {adapter_name!r} is loaded without {len(dropped)} of its tensors, such as {min(dropped)}: no "
            "layer of that name is adapted here. Load it on the base model that it was trained on."
        )


def check_task_names(source: Union[str, Path], config: PeftConfig, adapter_name: str, **hub_kwargs: Any) -> None:
    """Raise if the named tasks of a saved adapter, or their labels, are not those of `config`.

    Weights without a config say nothing.
    """
    try:
        found = read_config(source, **hub_kwargs)
    except FileNotFoundError:  # weights alone, which PEFT takes, too
        return
    saved, names = getattr(found, "task_names", None), getattr(config, "task_names", None)
    if saved and names and saved != names:
        place = str(Path(source, hub_kwargs["subfolder"])) if hub_kwargs.get("subfolder") else str(source)
        raise ValueError(
            f"The task_names of the checkpoint {place!r} are not those of the model: {difference(saved, names)} in "
            f"adapter {adapter_name!r}, so tasks would get the weights of other tasks. Make the model with the "
            "checkpoint's task_names, in their order; for other tasks, load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)` and use `add_tasks`."
        )
    _check_labels(source, getattr(found, "labels", None) or {}, getattr(config, "labels", None) or {}, adapter_name)


def check_heads(source: Union[str, Path], model: nn.Module, adapter_name: str, **hub_kwargs: Any) -> None:
    """Raise if the heads of modules of one's own are not those whose weights were saved. Old checkpoints do not say.

    Raises:
        ValueError: they are for other tasks or labels, or in another order.
    """
    here = described(dict(named_heads(model, adapter_name)) or heads_of_base(model))
    if here:
        try:
            file = find_file(source, (HEADS,), **hub_kwargs)
        except FileNotFoundError:
            return
        check_described(json.loads(file.read_text(encoding="utf-8")), here, str(source))


def _check_labels(
    source: Union[str, Path], saved: dict[str, TaskLabels], labels: dict[str, TaskLabels], adapter_name: str
) -> None:
    for task in {**saved, **labels}:
        there, here = saved.get(task), labels.get(task)
        if there is None or here is None or (there.kind, there.names) != (here.kind, here.names):
            raise ValueError(
                f"The task_labels of the checkpoint {str(source)!r} are not those of the model: task {task!r} has "
                f"{there or 'no head'} there, and {here or 'no head'} in adapter {adapter_name!r}. Make the model with "
                "the checkpoint's task_labels, or load it with `PeftModel.from_pretrained`, which does."
            )


def difference(given: Sequence[str], of_model: Sequence[str]) -> str:
    """Where two different lists of names part."""
    pairs = enumerate(zip_longest(given, of_model))
    index, (one, other) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    named = ["no task" if name is None else repr(name) for name in (one, other)]
    return f"id {index} is {named[0]} there, and {named[1]}"
