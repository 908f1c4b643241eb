"""What a caller may pass as task ids, and the checks that turn it into a LongTensor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch

from ..config import PolyConfig
from .transforms import is_symbolic, is_traced, readable

__all__ = [
    "ROW_ARGUMENTS",
    "TaskIds",
    "nearest_name",
    "no_task_message",
    "resolve_task",
    "resolve_tasks",
    "rows_of_call",
    "unknown_message",
    "unknown_name",
]

TaskIds = Union[torch.Tensor, Sequence[Union[int, str]], int, str]

# Arguments that tell how many rows a batch has, in the order of trust: texts, before images, of which a row may have
# several, before what a decoder starts with.
TEXTS = ("input_ids", "inputs_embeds", "inputs")
FEATURES = ("input_features", "input_values", "pixel_values")
DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
ROW_ARGUMENTS = (*TEXTS, *FEATURES, *DECODED)


def rows_of_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Optional[int], Union[str, int, None]]:
    """How many rows the batch of a call has, and which argument tells it: its name or its position.

    Both are None if no argument tells.
    """
    told: list[tuple[Union[str, int], Any]] = [(name, kwargs.get(name)) for name in TEXTS]
    told += list(enumerate(args[:1]))
    told += [(name, kwargs.get(name)) for name in FEATURES]
    encoded = kwargs.get("encoder_outputs")
    if encoded is not None and len(encoded):  # `generate` has encoded the rows before
        told.append(("encoder_outputs", encoded[0]))
    told += [(name, kwargs.get(name)) for name in DECODED]
    for name, value in told:
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[0], name
    return None, None


def resolve_tasks(
    task_ids: TaskIds, config: PolyConfig, adapter_name: str = "default", n_rows: Optional[int] = None
) -> tuple[torch.Tensor, bool]:
    """Task ids as a LongTensor, checked.

    Args:
        task_ids: a tensor `(b,)`, `(b, 1)` or `()` of any integer dtype on any device, a sequence of ids and names, or
            one id or name for all rows.
        config: the adapter's config, which knows its tasks.
        adapter_name: its name, for messages.
        n_rows: number of rows of the batch, where known.

    Returns:
        The ids, `(b,)`, and whether all rows are known to have the same task; the ids are then `(1,)`. A name that
        `unknown_task="mean"` lets in has the id `n_tasks`, behind all others. Ids on an accelerator (and ids seen by
        the compiler) are not read by the host: they are checked there, by an assertion.

    Raises:
        ValueError: unknown name (with the nearest one), negative or too large id, not integers, wrong number of rows.
    """
    if unknown_name(task_ids, config) is not None:
        return _with_unknown(task_ids, config, adapter_name, n_rows)
    if isinstance(task_ids, (int, str)) and not isinstance(task_ids, bool):
        return torch.full((1,), resolve_task(task_ids, config, adapter_name), dtype=torch.long), True
    ids = _integer_ids(task_ids if isinstance(task_ids, torch.Tensor) else _listed(task_ids, config, adapter_name))
    if ids.dim() == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.numel() == 0 and n_rows:
        raise ValueError(f"task_ids has 0 entries but the batch has {n_rows} rows. Pass one id per row.")
    if ids.dim() > 1 or ids.numel() == 0:
        raise ValueError(f"task_ids must have the shape (batch,) or (batch, 1), got {tuple(ids.shape)}.")
    one_for_all = ids.dim() == 0
    ids = readable(ids.reshape(-1))
    if n_rows is not None and not one_for_all and ids.shape[0] != n_rows:
        raise ValueError(
            f"task_ids has {ids.shape[0]} entries but the batch has {n_rows} rows. Pass one id per row, or one id or "
            "name for all rows."
        )
    if is_symbolic(ids):  # torch.func has many at once, a trace has no numbers; the look-up in the router checks them
        traced = is_traced()  # which may be called with more rows than one
        return ids, one_for_all or (ids.shape[0] == 1 and not traced)
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        torch._assert_async(
            ((ids >= 0) & (ids < config.n_tasks)).all(), f"task ids must lie in [0, {config.n_tasks - 1}]"
        )
        return ids, one_for_all
    listed = ids.tolist()
    for task in (min(listed), max(listed)):
        resolve_task(task, config, adapter_name)
    uniform = min(listed) == max(listed)
    return (ids[:1] if uniform else ids), uniform


def resolve_task(task: Union[int, str], config: PolyConfig, adapter_name: str = "default") -> int:
    """The id of one task given by id or name.

    Raises:
        ValueError: unknown name (with the nearest one), negative or too large id, no integer.
    """
    if isinstance(task, str):
        return _id_of_name(task, config, adapter_name)
    if isinstance(task, bool) or not (isinstance(task, int) or hasattr(task, "__index__")):  # the compiler knows ints
        raise ValueError(f"A task must be an integer id or a name, got {task!r}.")
    if not 0 <= task < config.n_tasks:
        named = f": {', '.join(config.task_names)}" if config.task_names else ""
        raise ValueError(
            f"Task ids of adapter {adapter_name!r} must lie in [0, {config.n_tasks - 1}], got {task}. "
            f"It has {config.n_tasks} task{'s' if config.n_tasks > 1 else ''}{named}."
        )
    return int(task)


def unknown_name(task_ids: Any, config: PolyConfig) -> Optional[str]:
    """The first name in `task_ids` that the adapter does not have, where `unknown_task="mean"` lets it in."""
    if config.unknown_task == "error" or not config.task_names:
        return None
    return next((task for task in _flat(task_ids) if _is_unknown(task, config)), None)


def unknown_message(name: str, config: PolyConfig, adapter_name: str) -> str:
    """The message for a name that the adapter does not have."""
    names = config.task_names or []
    hint = nearest_name(name, names)
    return f"Unknown task {name!r}.{hint} Adapter {adapter_name!r} knows: {_enumerated(names)}."


def no_task_message(config: PolyConfig, adapter_name: str) -> str:
    """The message for a call whose tasks nobody said."""
    known = _enumerated(config.task_names) if config.task_names else f"ids 0 to {config.n_tasks - 1}"
    return (
        f"No task is known for this call, and adapter {adapter_name!r} has {config.n_tasks} of them ({known}). Pass "
        "`task_ids=` (an id or name per row, or one for all), or choose one with `model.set_task(...)` or "
        "`with peft_poly.use_task(model, ...)`. In a Trainer, the rows' `task` reaches the model through "
        "`DataCollatorWithTaskIds`."
    )


def _enumerated(names: Sequence[str], most: int = 30) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def nearest_name(name: str, known: Sequence[str]) -> str:
    """A hint for the message about an unknown name, with a space before it; empty if no known name is near."""
    folded = {_folded(other): other for other in known}
    near = difflib.get_close_matches(_folded(name), folded, n=1, cutoff=0.5)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def _folded(name: str) -> str:
    """A name without what is easily written otherwise: capitals, zeros before a number."""
    return re.sub(r"0+(?=\d)", "", name.casefold())


def _flat(task_ids: Any) -> Sequence[Any]:
    if getattr(getattr(task_ids, "dtype", None), "kind", None) in ("O", "U"):  # a numpy array of names
        task_ids = task_ids.tolist()
    return task_ids if isinstance(task_ids, (list, tuple)) else [task_ids]


def _is_unknown(task: Any, config: PolyConfig) -> bool:
    return isinstance(task, str) and task not in (config.task_names or ())


def _with_unknown(
    task_ids: Any, config: PolyConfig, adapter_name: str, n_rows: Optional[int]
) -> tuple[torch.Tensor, bool]:
    """`resolve_tasks` of what has names to let in: the others are checked as if these were the first task."""
    if isinstance(task_ids, str):
        return torch.full((1,), config.n_tasks, dtype=torch.long), True
    tasks = _flat(task_ids)
    unknown = torch.tensor([_is_unknown(task, config) for task in tasks])
    ids, _ = resolve_tasks([0 if _is_unknown(task, config) else task for task in tasks], config, adapter_name, n_rows)
    ids = torch.where(unknown, config.n_tasks, ids)
    return (ids[:1], True) if all(_is_unknown(task, config) for task in tasks) else (ids, False)


def _integer_ids(ids: torch.Tensor) -> torch.Tensor:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"task_ids must be integers or task names, got a tensor of dtype {ids.dtype}.")
    return ids.long()


def _listed(task_ids: Any, config: PolyConfig, adapter_name: str) -> torch.Tensor:
    if getattr(getattr(task_ids, "dtype", None), "kind", None) in ("O", "U"):
        task_ids = _flat(task_ids)
    if isinstance(task_ids, (bool, float)):
        raise ValueError(f"task_ids must be integers or task names, got {task_ids!r}.")
    if isinstance(task_ids, (list, tuple)):
        for task in task_ids:
            if task is None or isinstance(task, (bool, float, bytes)):
                raise ValueError(f"task_ids must be integers or task names, got {task!r} in {list(task_ids)!r}.")
        task_ids = [
            resolve_task(task, config, adapter_name) if isinstance(task, (int, str)) else task for task in task_ids
        ]
        if not task_ids:
            return torch.empty(0, dtype=torch.long)
    try:
        return torch.as_tensor(task_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "task_ids must be a tensor, a list of ids or names, one id or one name, got "
            f"{type(task_ids).__name__}: {task_ids!r}."
        ) from error


def _id_of_name(name: str, config: PolyConfig, adapter_name: str) -> int:
    if not config.task_names:
        raise ValueError(
            f"Task {name!r} was given by name, but adapter {adapter_name!r} has no names for its {config.n_tasks} "
            f"task(s). Pass an id in [0, {config.n_tasks - 1}], or set `task_names` in its PolyConfig."
        )
    if name in config.task_names:
        return config.task_names.index(name)
    raise ValueError(unknown_message(name, config, adapter_name))
