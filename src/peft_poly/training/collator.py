"""Which task a row of a data set has, and the collator that carries it into the batch as `task_ids`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)

from ..labels import TaskLabels, read_task_labels
from ..tasks.ids import nearest_name, rows_of_call
from .labels import LABEL_COLUMNS, label_tensor, plain_label_tensor

__all__ = ["DataCollatorWithTaskIds", "tasks_of"]

PAIRING = {"DataCollatorForPreference", "DataCollatorForVisionPreference"}  # of DPO and of reward models
TASK_COLUMNS = ("task_ids", "task")  # an id, a name; where a data set has both, the id is used


class DataCollatorWithTaskIds:
    """Puts `task_ids`, a LongTensor `(b,)`, into the batches of any data collator.

    Each row says its task in the column `task`, a name, or in the column `task_ids`, an id (or a name). The columns are
    taken out before the wrapped collator sees the rows, so it may be any: padding, language modelling, seq2seq,
    multiple choice. The stock `Trainer` keeps both columns for this collator. Its other attributes, such as the
    `tokenizer` that a `Trainer` saves, are those of the wrapped collator.

    Where tasks have heads of their own (`PolyConfig.task_labels`) it builds `labels` itself, from classes, lists of
    them and numbers in one batch, and checks them. A `Trainer` tells it the labels of its model.

    Args:
        collator: makes a batch, a mapping, of a list of rows. None: `transformers.default_data_collator`.
        task_names: the adapter's `task_names`, by id, to look names up in and to check ids against; None if the rows
            carry ids.
        task_labels: the adapter's `task_labels`, where tasks have heads; rows may then name their labels.

    Raises:
        ValueError: a row has no task, an unknown one (the message has the row, and the nearest name), two that differ,
            or another column than the rows before it; or the batch has not one row for each row of the data set, as
            after packing, and not one task for all of them (of TRL's pairs of answers both have the row's task); or a
            label is none of its task's.
        TypeError: the collator cannot be called; rows or the batch are no mappings.

    Example:

    ```py
    >>> from peft_poly import DataCollatorWithTaskIds
    >>> collate = DataCollatorWithTaskIds(task_names=["rte", "sst2"])
    >>> batch = collate([{"input_ids": [5, 6], "task": "sst2"}, {"input_ids": [7, 8], "task": "rte"}])
    >>> batch["task_ids"]
    tensor([1, 0])

    ```
    """

    def __init__(
        self,
        collator: Optional[Callable[[list], Any]] = None,
        task_names: Optional[Sequence[str]] = None,
        task_labels: Optional[Mapping[str, Any]] = None,
    ) -> None:
        if isinstance(collator, DataCollatorWithTaskIds):
            raise ValueError("The collator is a DataCollatorWithTaskIds already. Pass the one inside of it.")
        if collator is not None and not callable(collator):
            raise TypeError(
                f"The collator must be a function or object that makes a batch of a list of rows, got {collator!r}. "
                "Names go into `task_names`: `DataCollatorWithTaskIds(task_names=model.task_names)`."
            )
        if isinstance(task_names, str):
            raise ValueError(f"task_names must be a list of names, got the one string {task_names!r}.")
        self.collator = default_data_collator if collator is None else collator
        self.task_names = None if task_names is None else list(task_names)
        self.labels: Optional[dict[str, TaskLabels]] = None
        self.per_token = isinstance(self.collator, DataCollatorForTokenClassification)
        if task_labels is not None:
            self.describe_labels(task_labels, self.per_token)

    def describe_labels(self, task_labels: Mapping[str, Any], per_token: bool) -> None:
        """Say what the labels of tasks are, as a `Trainer` does.

        Args:
            task_labels: as in `PolyConfig.task_labels`.
            per_token: whether rows have a label for each token.

        Raises:
            ValueError: they are not those of the tasks.
        """
        self.task_names = list(task_labels) if self.task_names is None else self.task_names
        self.labels, self.per_token = read_task_labels(task_labels, self.task_names), per_token

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of the wrapped collator, with `task_ids`."""
        rows = [_as_mapping(row, index) for index, row in enumerate(features)]
        columns = [_columns_of(row, f"Row {index} of the batch") for index, row in enumerate(rows)]
        for index, found in enumerate(columns):
            if found != columns[0]:
                raise ValueError(
                    f"All rows of a batch must say their task in the same way, but row 0 has "
                    f"{_listed(columns[0])} and row {index} has {_listed(found)}."
                )
        ids = torch.tensor([self._task_id_of(row, index) for index, row in enumerate(rows)], dtype=torch.long)
        labels = self._labels(rows)
        taken = TASK_COLUMNS if labels is None else (*TASK_COLUMNS, *LABEL_COLUMNS)
        batch: Any = self.collator([{k: v for k, v in row.items() if k not in taken} for row in rows])
        if not isinstance(batch, Mapping):
            raise TypeError(f"The collator must return a mapping, such as a dict, got {type(batch).__name__}.")
        if isinstance(labels, torch.Tensor):
            batch["labels"] = labels  # type: ignore[index]
        elif labels is not None:
            batch["labels"] = self._described(labels, ids.tolist(), batch)  # type: ignore[index]
        batch["task_ids"] = self._fitted(ids, batch)  # type: ignore[index]
        return batch

    def _labels(self, rows: list[Mapping[str, Any]]) -> Union[torch.Tensor, list[Any], None]:
        """The rows' labels, where they are ours to put together; as a tensor if nothing has described them."""
        columns = [next((name for name in LABEL_COLUMNS if name in row), None) for row in rows]
        if not any(columns):
            return None
        values = [None if name is None else _as_list(row[name]) for row, name in zip(rows, columns, strict=True)]
        if self.labels is not None:
            return values
        leaves_labels = isinstance(self.collator, (DataCollatorWithPadding, DefaultDataCollator))
        ours = self.collator is default_data_collator or leaves_labels
        return plain_label_tensor(values) if ours else None

    def _described(self, values: list[Any], ids: list[int], batch: Mapping[str, Any]) -> torch.Tensor:
        length = batch["input_ids"].shape[1] if self.per_token else None
        left = getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right") == "left"
        return label_tensor(values, ids, self.labels or {}, length, left)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in vars(self):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def _task_id_of(self, row: Mapping[str, Any], index: int) -> int:
        try:
            return self._task_id(row, index)
        except ValueError as error:  # rows were shuffled, so the number alone finds none
            raise ValueError(f"{error} {_preview(row)}") from None

    def _task_id(self, row: Mapping[str, Any], index: int) -> int:
        if row.get("task_ids") is None:
            if not isinstance(row["task"], str):
                raise ValueError(
                    f"Row {index} of the batch has the task {row['task']!r}, but the column `task` is for names. Put "
                    "ids into the column `task_ids`."
                )
            return self._id_of_name(row["task"], index)
        task_id = self._id(row["task_ids"], index)
        if row.get("task") is not None and self.task_names is not None and row["task"] != self.task_names[task_id]:
            raise ValueError(
                f"Row {index} of the batch has task={row['task']!r} but task_ids={row['task_ids']!r}, which is "
                f"{self.task_names[task_id]!r}. Keep one of the two columns."
            )
        return task_id

    def _id(self, given: Any, index: int) -> int:
        if isinstance(given, str):
            return self._id_of_name(given, index)
        if getattr(given, "ndim", 0) == 1 and len(given) == 1:
            given = given[0]
        value = given.item() if getattr(given, "ndim", None) == 0 else given
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"Row {index} of the batch has task_ids={given!r}. It must be one integer or one name.")
        if value < 0 or (self.task_names is not None and value >= len(self.task_names)):
            end = "" if self.task_names is None else f" and below {len(self.task_names)}, the number of task_names"
            raise ValueError(f"Row {index} of the batch has task_ids={value}. Ids must be 0 or more{end}.")
        return value

    def _id_of_name(self, name: str, index: int) -> int:
        if self.task_names is None:
            raise ValueError(
                f"Row {index} of the batch has the task {name!r} by name, but this collator knows no names. Make it "
                "with `DataCollatorWithTaskIds(collator, task_names=model.task_names)`."
            )
        if name not in self.task_names:
            raise ValueError(
                f"Row {index} of the batch has the unknown task {name!r}.{nearest_name(name, self.task_names)} Known "
                f"are: {', '.join(self.task_names)}."
            )
        return self.task_names.index(name)

    def _fitted(self, ids: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """One id for each row of the batch, `(b,)`."""
        n_rows = rows_of_call((), dict(batch))[0]
        if n_rows is None or n_rows == len(ids):
            return ids
        if (ids == ids[0]).all():
            return ids[:1].repeat(n_rows)
        if n_rows == 2 * len(ids) and _makes_pairs(self.collator):
            return ids.repeat(2)
        name = type(self.collator).__name__
        if n_rows < len(ids):
            raise ValueError(
                f"The collator made {n_rows} row(s) of {len(ids)} rows with different tasks. A row has one task: "
                "switch packing or padding-free batches off, or let each batch have one task only."
            )
        raise ValueError(
            f"{name} made {n_rows} rows of {len(ids)} rows with different tasks, and nothing says which of them are "
            "whose. Let each batch have one task only, or put `task_ids`, one for each row that is made, into the "
            "batch in a collator of your own."
        )


def tasks_of(dataset: Any) -> list[Union[int, str]]:
    """The task of each row of a data set, from its column `task_ids` or `task`.

    Args:
        dataset: a `datasets.Dataset`, or a map-style data set whose rows are mappings; all rows of it are read.

    Raises:
        ValueError: a row has neither column, or None in it.
    """
    rows: list[Mapping[str, Any]]
    if getattr(dataset, "column_names", None) is not None:
        check_columns(dataset.column_names)
        columns = {column: list(dataset[column]) for column in TASK_COLUMNS if column in dataset.column_names}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    else:
        rows = [_as_mapping(dataset[index], index) for index in range(len(dataset))]
    tasks = []
    for index, row in enumerate(rows):
        task = row[_columns_of(row, f"Row {index} of the data set")[0]]
        tasks.append(task.item() if hasattr(task, "item") else task)
    return tasks


def check_columns(names: Sequence[str]) -> None:
    """Raise `ValueError` if there is no task column among the names of a data set's columns."""
    if not set(TASK_COLUMNS) & set(names):
        raise ValueError(f"The data set {_without_task(names)}")


def _as_mapping(row: Any, index: int) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if hasattr(row, "__dict__"):  # transformers' InputFeatures and the like
        return vars(row)
    raise TypeError(f"Rows must be mappings of columns, such as dicts, but row {index} is a {type(row).__name__}.")


def _columns_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = tuple(column for column in TASK_COLUMNS if row.get(column) is not None)
    if not found:
        empty = tuple(column for column in TASK_COLUMNS if column in row)
        if empty:
            raise ValueError(f"{where} has no task: None stands in {_listed(empty)}. {_preview(row)}")
        raise ValueError(f"{where} {_without_task(list(map(str, row)))} {_preview(row)}")
    return found


def _without_task(names: Sequence[str]) -> str:
    near = [name for name in names if "task" in name.casefold()]
    hint = f" Is it in `{near[0]}`? Rename that column to `task` (names) or `task_ids` (ids)." if near else ""
    return f"has neither a column `task`, which is a name, nor `task_ids`, an id. It has: {', '.join(names)}.{hint}"


def _makes_pairs(collator: Any) -> bool:
    """Whether it is one of TRL's that put all chosen answers first, then all rejected ones, in the same order."""
    names = {kind.__name__ for kind in type(collator).__mro__ if kind.__module__.startswith("trl.")}
    return bool(names & PAIRING)


def _preview(row: Mapping[str, Any]) -> str:
    """The row, cut short, to find it by in a data set."""
    cells = [f"{name}={_cut(' '.join(repr(value).split()), 24)}" for name, value in row.items()]
    return f"The row: {_cut(', '.join(cells), 80)}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _listed(columns: tuple[str, ...]) -> str:
    return " and ".join(f"`{column}`" for column in columns)
