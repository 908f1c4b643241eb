"""What transformers' `Trainer` learns: columns it keeps, names of checkpoints, ids of evaluated rows, two rates.

The lessons are wrappers of its methods, put on by `registration.py`; for a model that is not task-routed they pass
straight through. They spare the base model a `forward` with another signature, which copying, compiling, unloading,
replicas on other devices and the checks of `generate` would all meet.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, cast

import torch

from ..checkpoints.loading import check_heads, check_task_names, difference
from ..config import PolyConfig
from ..layer import PolyLayer
from ..model import PolyModel, tuner_of
from ..tasks.choosing import routed_layers
from ..tasks.ids import resolve_task
from .collator import TASK_COLUMNS, DataCollatorWithTaskIds, tasks_of
from .columns import keep_task_columns, watched
from .labelled import counting_places, headed_config, smoothing_by_head, tell_labels
from .metrics import PerTaskMetrics
from .optimizer import poly_parameter_groups, warn_of_untrained

__all__ = ["LESSONS"]

# Trainers of TRL: those that compare the model with a reference or with itself, and those that make its inputs.
COMPARING = {"DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"}
GENERATING = {"GRPOTrainer", "RLOOTrainer"}
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")  # names in `OptimizerNames` that begin so
logger = logging.getLogger(__name__)


def _tuner_of(trainer: Any) -> Optional[PolyModel]:
    return tuner_of(trainer.accelerator.unwrap_model(trainer.model))  # FSDP puts its wrapper there


def _keeping_columns(method: Callable) -> Callable:
    """`task_ids` stays, and `task` where our collator is there to read it; TRL's trainers, too, come by here."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        tuner = _tuner_of(self)
        if tuner is not None:
            _check_names(self, tuner)
            tell_labels(self.data_collator, tuner)
            _check_hands_tasks_on(self, tuner, args[0] if args else None)
            _settle_noise(self, tuner)
            _check_rows_have_one_task(self, tuner, args[0] if args else None)
        if tuner is not None or any(routed_layers(self.model)):
            keep_task_columns(self, tuner, args[0] if args else None)
        return method(self, *args, **kwargs)

    return wrapper


def _watching_columns(method: Callable) -> Callable:
    """The same where it is a collator that drops them."""
    keeping = _keeping_columns(method)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        collator = keeping(self, *args, **kwargs)
        return watched(self, collator) if _tuner_of(self) is None and any(routed_layers(self.model)) else collator

    return wrapper


def _active_configs(tuner: PolyModel) -> dict[str, PolyConfig]:
    return {name: cast(PolyConfig, tuner.peft_config[name]) for name in tuner.active_adapters}


def _check_names(trainer: Any, tuner: PolyModel) -> None:
    """The collator and the metrics number the tasks as the model does; fewer of the first names are no harm."""
    for part in (trainer.data_collator, trainer.compute_metrics):
        if not isinstance(part, (DataCollatorWithTaskIds, PerTaskMetrics)) or part.task_names is None:
            continue
        for adapter, config in _active_configs(tuner).items():
            if config.task_names and part.task_names != config.task_names[: len(part.task_names)]:
                raise ValueError(
                    f"The task_names of {type(part).__name__} are not those of the model: "
                    f"{difference(part.task_names, config.task_names)} in adapter {adapter!r}, so ids would mean "
                    "other tasks. Pass `task_names=model.task_names`."
                )


def _checking_checkpoint(method: Callable) -> Callable:
    """As `loading.load_adapter` does, which FSDP and DeepSpeed do not come by; and before anything is loaded."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]  # the folder first, if there is one; `_load_best_model` takes none
        folder = given[0] if given else self.state.best_model_checkpoint
        tuner = _tuner_of(self)
        if tuner is not None and folder is not None:
            _check_checkpoint(Path(folder), tuner)
        return method(self, *args, **kwargs)

    return wrapper


def _loading_best(method: Callable) -> Callable:
    """A `Trainer` looks for the best adapter beside the checkpoint's other files, where only "default" lies."""
    checking = _checking_checkpoint(method)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = checking(self, *args, **kwargs)
        tuner, folder = tuner_of(self.model), Path(self.state.best_model_checkpoint)
        for name in () if tuner is None else tuner.task_context.poly_adapters():
            if name != "default" and (folder / name).is_dir():
                self.model.load_adapter(str(folder / name), name, is_trainable=True)
        return found

    return wrapper


def _check_checkpoint(folder: Path, tuner: PolyModel) -> None:
    """Adapters of other names than `default` lie in folders of their names."""
    configs = {name: cast(PolyConfig, tuner.peft_config[name]) for name in tuner.task_context.poly_adapters()}
    alone = "default" if "default" in configs else tuner.active_adapters[0]
    for name, config in configs.items():
        for place in {folder / name, *([folder] if name == alone else [])}:
            if place.is_dir():  # else it would be asked for on the Hub
                check_task_names(place, config, name)
                check_heads(place, tuner.model, name)


def _kinds(trainer: Any) -> set[str]:
    """Names of the classes of TRL that a trainer is one of."""
    return {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")}


def _check_hands_tasks_on(trainer: Any, tuner: PolyModel, dataset: Any) -> None:
    found = _kinds(trainer) & GENERATING
    if not found:
        return
    if tuner.task_context.default is not None or tuner.task_context.current() is not None:
        _check_all_are_the_set_task(dataset, tuner, found.pop())
    elif any(config.n_tasks > 1 for config in _active_configs(tuner).values()):
        raise ValueError(
            f"{found.pop()} cannot train several tasks at once: it takes no collator, and calls the model with the "
            "tokens of the answers that it has generated, in batches that it has shuffled and cut, without the "
            "columns of their rows. Choose one task for the run with `model.set_task(...)`, and leave out the rows of "
            "other tasks."
        )


def _settle_noise(trainer: Any, tuner: PolyModel) -> None:
    """As these trainers do with dropout: what they compare must differ by the parameters alone."""
    routers: list[Any] = [router for layer in tuner._layers() for router in layer.poly_router.values()]
    noisy = [router for router in routers if getattr(router, "noise", False)]
    if noisy and (found := _kinds(trainer) & COMPARING):
        for router in noisy:
            router.noise = False
        warnings.warn(
            f"{found.pop()} compares log-probabilities of several passes, in each of which `router_noise` would draw "
            "another routing: it is switched off in this model, as TRL does with dropout."
        )


def _check_rows_have_one_task(trainer: Any, tuner: PolyModel, dataset: Any) -> None:
    args, context = trainer.args, tuner.task_context
    packs = [f"`{name}=True`" for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, False)]
    if not packs or not any(config.n_tasks > 1 for config in _active_configs(tuner).values()):
        return
    if context.default is None and context.current() is None:
        raise ValueError(
            f"{' and '.join(packs)} of {type(args).__name__} would put examples of several tasks into one row, and "
            "lose their tasks; a row has one task. Set it to False, or choose one task for the whole run with "
            "`model.set_task(...)`."
        )
    _check_all_are_the_set_task(dataset, tuner, " and ".join(packs))


def _check_all_are_the_set_task(dataset: Any, tuner: PolyModel, packs: str) -> None:
    """As far as the data set still has its tasks: TRL's packing drops them before anybody sees them."""
    if not set(TASK_COLUMNS) & set(getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        return
    context, tasks = tuner.task_context, tasks_of(dataset)
    entered = context.current()
    chosen = context.default if entered is None else entered.given
    if not isinstance(chosen, (int, str)):
        return
    for name, config in _active_configs(tuner).items():
        wanted = resolve_task(chosen, config, name)
        for row, task in enumerate(tasks):
            if isinstance(task, str) and not config.task_names:
                continue
            if resolve_task(task, config, name) != wanted:
                label = config.task_names[wanted] if config.task_names else wanted
                raise ValueError(
                    f"{packs} and `set_task` train the one task {label!r}, but row {row} of the data set has the task "
                    f"{task!r}. Leave the rows of other tasks out, such as with `dataset.filter(...)`."
                )


def _handing_ids(method: Callable) -> Callable:
    """Evaluation hands the rows' ids to `PerTaskMetrics`, gathered from all processes as the predictions are."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.compute_metrics, PerTaskMetrics) or _tuner_of(self) is None:
            return method(self, *args, **kwargs)
        self.compute_metrics.check_arguments(self.args)
        config = headed_config(_tuner_of(self))
        with _collecting_ids(self, None if config is None else config.labels):
            return method(self, *args, **kwargs)

    return wrapper


@contextmanager
def _collecting_ids(trainer: Any, labels: Any) -> Iterator[None]:
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
    trainer.compute_metrics = lambda prediction: metrics(
        prediction, task_ids=torch.cat(ids).numpy(), task_labels=labels
    )
    try:
        yield
    finally:
        trainer.compute_metrics = metrics
        if own is None:
            del trainer.prediction_step
        else:
            trainer.prediction_step = own


def _settling(method: Callable) -> Callable:
    """Before a reference is computed, which some do as soon as they are made."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        tuner = _tuner_of(self)
        if tuner is not None:
            _settle_noise(self, tuner)

    return wrapper


def _with_two_rates(method: Callable) -> Callable:
    """An optimizer that nobody gave is that of `create_poly_optimizer`, made by the `Trainer`'s own code."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args and args[0] is not None else kwargs.get("model")
        model = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        theirs = self.optimizer is not None or (given is not None and _groups_by_itself(*given))
        if not any(isinstance(module, PolyLayer) for module in model.modules()):
            return method(self, *args, **kwargs)
        if self.optimizer is not None:
            warn_of_untrained(model, self.optimizer)
        if theirs:
            return method(self, *args, **kwargs)
        if given is None:
            _check_optim(str(getattr(self.args.optim, "value", self.args.optim)))
        cls, settings = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = poly_parameter_groups(
            model, lr=settings.get("lr", self.args.learning_rate), weight_decay=self.args.weight_decay
        )
        self.optimizer_cls_and_kwargs = cls, {**settings, "params": groups}
        try:
            made = method(self, *args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in groups)
        logger.info("%s has the learning rates: %s", type(made).__name__, rates)
        return made

    return wrapper


def _groups_by_itself(cls: Any, settings: dict[str, Any]) -> bool:
    """A factory is called with the model, and is no class of optimizers."""
    return "params" in settings or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer))


def _check_optim(optim: str) -> None:
    """Some optimizers sort the parameters themselves, or step inside of the backward."""
    if optim.startswith(OWN_GROUPS):
        raise ValueError(
            f"`optim={optim!r}` makes its own groups of parameters, so that the router cannot have a learning rate of "
            "its own. Choose another, such as 'adamw_torch', or pass the one that you want as `optimizers=`."
        )


def _checking_deepspeed(method: Callable) -> Callable:
    """An `optimizer` in DeepSpeed's config is made by DeepSpeed, with one rate for all."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        tuner = _tuner_of(self)
        if tuner is not None and plugin is not None and "optimizer" in plugin.deepspeed_config:
            rates = {config.effective_router_lr for config in _active_configs(tuner).values()}
            if rates - {self.args.learning_rate}:
                raise ValueError(
                    "The `optimizer` in the config of DeepSpeed has one learning rate for all parameters, and the "
                    f"router is to learn at {', '.join(f'{rate:g}' for rate in sorted(rates))}. Take `optimizer` out "
                    "of that config: the Trainer then makes the one that `optim` names; or set `router_lr` of the "
                    f"PolyConfig to the one rate, {self.args.learning_rate:g}."
                )
        return method(self, *args, **kwargs)

    return wrapper


LESSONS: dict[str, Callable[[Callable], Callable]] = {
    "__init__": _settling,
    "_remove_unused_columns": _keeping_columns,
    "_get_collator_with_removed_columns": _watching_columns,
    "evaluation_loop": _handing_ids,
    "create_optimizer": _with_two_rates,
    "train": _checking_deepspeed,
    "_load_from_checkpoint": _checking_checkpoint,
    "_load_best_model": _loading_best,
    "_get_num_items_in_batch": counting_places(_tuner_of),
    "compute_loss": smoothing_by_head(_tuner_of),
    "_load_optimizer_and_scheduler": _checking_checkpoint,  # DeepSpeed loads without the first
}
