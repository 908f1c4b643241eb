"""How often each task is seen: proportional, uniform and temperature sampling over the tasks of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback

from ..config import PolyConfig
from ..model import tuner_of
from ..tasks.ids import resolve_task
from .collator import DataCollatorWithTaskIds, tasks_of

__all__ = ["Balance", "TaskSampler", "TaskSamplingMixin", "task_probabilities"]

Balance = Union[Literal["proportional", "uniform"], float]

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


def task_probabilities(sizes: Sequence[int], balance: Balance = "proportional") -> list[float]:
    """The share of each task: `p ~ n^(1/T)` for a task of `n` rows.

    For `datasets.interleave_datasets(parts, probabilities=...)`, which mixes streams; `TaskSampler` uses it too.

    Args:
        sizes: rows of each task, 1 or more.
        balance: the temperature T, more than 0. `"proportional"` is T = 1; `"uniform"` is T = inf.

    Raises:
        ValueError: a size is not positive, or there is none; `balance` is something else.

    ```py
    >>> for balance in ("proportional", 2, "uniform"):
    ...     [round(share, 3) for share in task_probabilities([900, 100], balance)]
    [0.9, 0.1]
    [0.75, 0.25]
    [0.5, 0.5]

    ```
    """
    temperature = 1.0 if balance == "proportional" else math.inf if balance == "uniform" else balance
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        hint = ", a string; a temperature is a number" if isinstance(balance, str) else ""
        raise ValueError(
            f'The balance must be "proportional", "uniform" or a temperature above 0, got {balance!r}{hint}. '
            "1 is proportional; the higher, the more uniform."
        )
    if not len(sizes) or min(sizes) < 1:
        raise ValueError(f"Each task needs one row at least, got the sizes {list(sizes)!r}.")
    shares = [(size / max(sizes)) ** (1 / temperature) for size in sizes]  # no overflow, however low the temperature
    return [share / math.fsum(shares) for share in shares]


class TaskSampler(Sampler[int]):
    """Draws the rows of an epoch so that the tasks have the shares of `task_probabilities`.

    How many rows a task gets is its share of the epoch, rounded up or down at random (in the mean it is exact). A task
    that gets fewer rows than it has gives a random part of them, one that gets more gives all of them again and again:
    no row comes twice as long as another of its task has not come. `"proportional"` thus is each row once, shuffled.

    Order and choice depend on the seed and the epoch alone, so that all processes see the same; accelerate, and so the
    `Trainer`, gives each its part of the batches. In a loop of your own call `set_epoch` before each epoch, as for the
    `DistributedSampler` of torch; of accelerate, only newer releases do it, and not for a loader that skips batches.

    Args:
        tasks: the task of each row of the data set, id or name, such as a column of it.
        balance: `"proportional"`, `"uniform"`, or a temperature; see `task_probabilities`.
        num_samples: rows of an epoch. Default: as many as the data set has.
        seed: of the draws.

    Raises:
        ValueError: there is no row; `balance` or `num_samples` is not fit.

    Example:

    ```py
    >>> from peft_poly import TaskSampler
    >>> tasks = ["rte"] * 90 + ["sst2"] * 10
    >>> sampler = TaskSampler(tasks, balance="uniform", seed=0)
    >>> [tasks[row] for row in sampler].count("sst2")
    50

    ```
    """

    def __init__(
        self,
        tasks: Sequence[Union[int, str]],
        balance: Balance = "proportional",
        *,
        num_samples: Optional[int] = None,
        seed: int = 0,
    ) -> None:
        listed = tasks.tolist() if hasattr(tasks, "tolist") else list(tasks)
        rows: dict[Union[int, str], list[int]] = {}
        for row, task in enumerate(listed):
            rows.setdefault(task, []).append(row)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}.")
        # In the order of their first rows: numbers and names may both be used, and those cannot be sorted together.
        self.rows = {task: torch.tensor(found) for task, found in rows.items()}
        shares = task_probabilities([len(found) for found in rows.values()], balance)
        self.probabilities = dict(zip(rows, shares, strict=True))
        self.num_samples = len(listed) if num_samples is None else num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; each has draws of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        drawn = []
        for rows, count in zip(self.rows.values(), self._counts(generator), strict=True):
            passes, rest = divmod(count, len(rows))
            some = torch.randperm(len(rows), generator=generator)[:rest]
            drawn += [*[rows] * passes, rows[some]]
        epoch = torch.cat(drawn)
        yield from epoch[torch.randperm(len(epoch), generator=generator)].tolist()

    def _counts(self, generator: torch.Generator) -> list[int]:
        """Rows of each task: its share, and the fractions that are left given out by systematic sampling."""
        expected = torch.tensor(list(self.probabilities.values()), dtype=torch.float64) * self.num_samples
        counts = (expected + 1e-9).floor()  # a share that is a whole number stays one, whatever its last digit
        left = self.num_samples - int(counts.sum())
        if left:
            fractions = (expected - counts).clamp(min=0).cumsum(0)
            ticks = torch.arange(left) + torch.rand(1, generator=generator, dtype=torch.float64)
            chosen = torch.searchsorted(fractions * (left / fractions[-1]), ticks, right=True)
            counts += torch.bincount(chosen.clamp(max=len(counts) - 1), minlength=len(counts))
        return [int(count) for count in counts]


class TaskSamplingMixin(_Trainer):
    """Mixin for any `Trainer` class: an epoch is drawn by a `TaskSampler`.

    The tasks come from the column `task_ids` or `task` of the training data, the seed from `args.data_seed`, or else
    `args.seed`. Runs that are stopped and resumed see the same rows as runs that are not.

    Args:
        args: of the trainer.
        task_balance: `"proportional"`, `"uniform"`, or a temperature; see `task_probabilities`.
        kwargs: of the trainer.

    Raises:
        ValueError: `task_balance` is not fit; the training data is a stream, or has no task column; the trainer is
            told to order rows itself (`group_by_length` and the like); (in training) a row's task is unknown to the
            model.
        TypeError: the trainer class stands before the mixin.

    Example:

    ```py
    >>> from peft_poly import TaskSamplingMixin
    >>> from transformers import Trainer
    >>> class BalancedTrainer(TaskSamplingMixin, Trainer):
    ...     pass
    >>> # BalancedTrainer(model, arguments, train_dataset=rows, task_balance=2.0).train()

    ```
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mixin = cls.__mro__.index(TaskSamplingMixin)
        before = [base.__name__ for base in cls.__mro__[1:mixin] if _is_plain_trainer(base)]
        if before:
            raise TypeError(
                f"TaskSamplingMixin must come before {before[0]}: `class {cls.__name__}(TaskSamplingMixin, "
                f"{before[0]})`."
            )

    def __init__(self, *args: Any, task_balance: Balance = "proportional", **kwargs: Any) -> None:
        task_probabilities([1], task_balance)
        self.task_balance = task_balance
        super().__init__(*args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset) or hasattr(self.train_dataset, "_ex_iterable"):
            raise ValueError(
                "A stream of rows cannot be sampled by task. Make a stream for each task, and mix them with "
                "`datasets.interleave_datasets(parts, probabilities=peft_poly.training.task_probabilities(...))`."
            )
        order = _order_of_rows(self.args)
        if order is not None:
            raise ValueError(f"`task_balance` and {order} both say the order of the rows. Leave the latter out.")
        self.add_callback(_Epochs(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Optional[Sampler]:
        rows = self.train_dataset  # not the argument, whose task column may be gone
        if rows is None:
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tasks = tasks_of(rows)
        self._check_known(tasks)
        self._task_sampler = _TrainersSampler(tasks, self.task_balance, seed=seed)
        return self._task_sampler

    def _check_known(self, tasks: Sequence[Union[int, str]]) -> None:
        """Names are read by our collator only; without it the column may be there for the sampling alone."""
        tuner = tuner_of(self.accelerator.unwrap_model(self.model))
        if tuner is None:
            return
        named = isinstance(self.data_collator, DataCollatorWithTaskIds)
        first = {task: row for row, task in reversed(list(enumerate(tasks)))}
        for adapter in tuner.active_adapters:
            config = cast(PolyConfig, tuner.peft_config[adapter])
            for task, row in first.items():
                if isinstance(task, int) or (named and config.task_names):
                    try:
                        resolve_task(task, config, adapter)
                    except ValueError as error:
                        raise ValueError(f"Row {row} of the training data: {error}") from None


def _is_plain_trainer(cls: type) -> bool:
    from transformers import Trainer  # brings much with it, and is there when a class is made of it

    return issubclass(cls, Trainer) and not issubclass(cls, TaskSamplingMixin)


def _order_of_rows(args: Any) -> Optional[str]:
    strategy = getattr(args, "train_sampling_strategy", "random")
    if str(strategy) != "random":
        return f"`train_sampling_strategy={str(strategy)!r}`"
    return "`group_by_length=True`" if getattr(args, "group_by_length", False) else None


class _TrainersSampler(TaskSampler):
    """Takes its epoch from the `Trainer` alone: loaders of accelerate begin at 0 again where a run is resumed."""

    def set_epoch(self, epoch: int) -> None:
        pass


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch, which accelerate does not where a run with several processes is resumed."""

    def __init__(self, trainer: TaskSamplingMixin) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._task_sampler.epoch = int((state.epoch or 0) + 1e-6)
