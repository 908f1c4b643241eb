"""Which columns of the rows a `Trainer` keeps: those that say the task, for a model that takes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ..model import PolyModel
from .collator import TASK_COLUMNS, DataCollatorWithTaskIds, check_columns

__all__ = ["keep_task_columns", "watched"]


def keep_task_columns(trainer: Any, tuner: Optional[PolyModel], data: Any) -> None:
    """Let a `Trainer` keep `task_ids`, and `task` where our collator is there to read it.

    Args:
        trainer (`Trainer`): It trains a model with task-routed layers, and is about to drop columns.
        tuner (`PolyModel`, *optional*): That of the model; None if it is no `PeftModel` but has one, or layers, inside.
            Such a model must list `task_ids` in its `forward`, or a warning says what is dropped.
        data: The data set, with all of its columns, or a collator.

    Raises:
        `ValueError`: If the collator is ours and the data set of a `PeftModel` has neither column.
    """
    if not trainer.args.remove_unused_columns:
        return
    trainer._set_signature_columns_if_needed()
    kept, names = trainer._signature_columns, getattr(data, "column_names", None) or ()
    if tuner is None and "task_ids" not in kept:
        _warn_of_what_is_dropped(type(trainer.model).__name__, names)
        return
    ours = isinstance(trainer.data_collator, DataCollatorWithTaskIds)
    transformed = getattr(data, "format", {}).get("type") == "custom"  # a transform may make the column
    if tuner is not None and type(trainer.data_collator) is DataCollatorWithTaskIds and names and not transformed:
        check_columns(names)  # while the data set has all of them: a batch would show only those that the model takes
    kept += [name for name in (TASK_COLUMNS if ours else ("task_ids",)) if name not in kept]


def watched(trainer: Any, collator: Any) -> Any:
    """What a `Trainer` puts around its collator to drop columns; it warns as `keep_task_columns`, of the first rows.

    Only so are the columns of a list of rows known.

    Args:
        trainer (`Trainer`): Its model has task-routed layers, and is no `PeftModel`.
        collator: Takes rows with all of their columns.
    """
    dropping = trainer.args.remove_unused_columns and "task_ids" not in trainer._signature_columns
    return _Watched(collator, type(trainer.model).__name__) if dropping else collator


@dataclass
class _Watched:
    collator: Any
    model_name: str
    seen: bool = False

    def __call__(self, rows: Any) -> Any:
        if not self.seen and len(rows) and isinstance(rows[0], Mapping):
            _warn_of_what_is_dropped(self.model_name, rows[0])
        self.seen = True
        return self.collator(rows)


def _warn_of_what_is_dropped(name: str, columns: Iterable[str]) -> None:
    dropped = [column for column in TASK_COLUMNS if column in columns]
    if dropped:
        warnings.warn(
            f"The Trainer drops the column {' and '.join(map(repr, dropped))} of the rows, for `{name}.forward` takes "
            f"no `task_ids`, and the task-routed layers inside {name} then know no task. Let `{name}.forward` take "
            "`task_ids` and hand it to the model inside, or to `use_task` around it."
        )
