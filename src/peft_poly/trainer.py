"""What transformers' `Trainer` learns about tasks: columns it must keep, and the ids of the rows it evaluates.

The lessons are wrappers of its methods, put on by `registration.py`; for a model that is not task-routed they pass
straight through. They spare the base model a `forward` with another signature, which copying, compiling, unloading,
replicas on other devices and the checks of `generate` would all meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, cast

import torch

from .collator import TASK_COLUMNS, DataCollatorWithTaskIds
from .config import PolyConfig
from .metrics import PerTaskMetrics
from .model import PolyModel, tuner_of

__all__ = ["LESSONS"]


def _tuner_of(trainer: Any) -> Optional[PolyModel]:
    return tuner_of(trainer.accelerator.unwrap_model(trainer.model))  # FSDP puts its wrapper there


def _keeping_columns(method: Callable) -> Callable:
    """`task_ids` stays, and `task` where our collator is there to read it; TRL's trainers, too, come by here."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        tuner = _tuner_of(self)
        if tuner is not None:
            _check_rows_have_one_task(self, tuner)
            if self.args.remove_unused_columns:
                self._set_signature_columns_if_needed()
                ours = isinstance(self.data_collator, DataCollatorWithTaskIds)
                wanted = TASK_COLUMNS if ours else ("task_ids",)
                self._signature_columns += [name for name in wanted if name not in self._signature_columns]
        return method(self, *args, **kwargs)

    return wrapper


def _check_rows_have_one_task(trainer: Any, tuner: PolyModel) -> None:
    args, context = trainer.args, tuner.task_context
    packs = [f"`{name}=True`" for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, False)]
    several = [name for name in tuner.active_adapters if cast(PolyConfig, tuner.peft_config[name]).n_tasks > 1]
    if packs and several and context.default is None and context.current() is None:
        raise ValueError(
            f"{' and '.join(packs)} of {type(args).__name__} would put examples of several tasks into one row, and "
            "lose their tasks; a row has one task. Set it to False, or choose one task for the whole run with "
            "`model.set_task(...)`."
        )


def _handing_ids(method: Callable) -> Callable:
    """Evaluation hands the rows' ids to `PerTaskMetrics`, gathered from all processes as the predictions are."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.compute_metrics, PerTaskMetrics) or _tuner_of(self) is None:
            return method(self, *args, **kwargs)
        self.compute_metrics.check_arguments(self.args)
        with _collecting_ids(self):
            return method(self, *args, **kwargs)

    return wrapper


@contextmanager
def _collecting_ids(trainer: Any) -> Iterator[None]:
    metrics, step, ids = trainer.compute_metrics, trainer.prediction_step, []

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs.get("task_ids"), torch.Tensor):
            raise ValueError(
                "PerTaskMetrics needs `task_ids` in each batch, one id per row. Give the rows a column `task_ids`, or "
                "`task` and the trainer a `DataCollatorWithTaskIds`."
            )
        ids.append(trainer.gather_function(trainer._prepare_input(inputs["task_ids"].reshape(-1))).cpu())
        return step(model, inputs, *args, **kwargs)

    # On the instance for the time of the loop: it wins over the class, whichever trainer that is.
    own = vars(trainer).get("prediction_step")
    trainer.prediction_step = prediction_step
    trainer.compute_metrics = lambda prediction: metrics(prediction, task_ids=torch.cat(ids).numpy())
    try:
        yield
    finally:
        trainer.compute_metrics = metrics
        if own is None:
            del trainer.prediction_step
        else:
            trainer.prediction_step = own


LESSONS: dict[str, Callable[[Callable], Callable]] = {
    "_remove_unused_columns": _keeping_columns,
    "_get_collator_with_removed_columns": _keeping_columns,
    "evaluation_loop": _handing_ids,
}
