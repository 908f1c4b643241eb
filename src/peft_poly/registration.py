"""Makes the method known to PEFT, and closes the gaps PEFT leaves for a method from outside.

PEFT hands `task_ids` on for its own Poly only, and its `generate` and plain `PeftModel` for none. So the `forward` and
`generate` of its model classes, and transformers' `generate`, are wrapped: for a task-routed model the wrapper takes
`task_ids` out of the call and enters the tuner's context with them; every other model passes straight through. The
saving methods are wrapped in the same way, for the atomic save and the model card of `saving.py`; so are
`load_adapter`, for the check of names in `loading.py`, the making of a model, for a warning that PEFT causes,
transformers' `Trainer`, for the lessons of `trainer.py`, its pipelines, for the steps of `pipelines.py`, and its check
of PEFT's version, for a message that can be followed.
Wrapping keeps names and signatures, is marked, and is done once however often the package is imported or reloaded.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any, Optional

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.peft_model import PeftModel
from peft.utils import PeftType, register_peft_method
from torch.utils import checkpoint
from transformers import GenerationMixin
from transformers import __version__ as transformers_version
from transformers.integrations import peft as transformers_door

from .adapter.routed_calls import PASSED
from .checkpoints import loading, saving
from .compat import PEFT_VERSIONS
from .config import PolyConfig
from .model import PolyModel, tuner_of
from .pipelines import STEPS
from .tasks.batch import current_generation, generation, how_rows_repeat, rows_left_message
from .tasks.choosing import check_one_task_is_set, task_contexts
from .tasks.ids import rows_of_call
from .tasks.recomputing import binding_first_argument, binding_second_argument
from .training.trainer import LESSONS

__all__ = ["register"]

MARK = "_peft_poly_wraps"
NAME = "peft_poly"
TRAINER = "transformers.trainer"
# what a checkpoint that is not reentrant runs by: the first from torch 2.15 on
CHECKPOINTING = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")


def register() -> None:
    """Register the method and wrap PEFT's doors; calling it again, or after a reload, leaves one registration."""
    peft_type = PeftType[NAME.upper()]
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    register_peft_method(name=NAME, config_cls=PolyConfig, model_cls=PolyModel, prefix=PolyModel.prefix)
    for cls in (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        _wrap(cls, "forward", _routed)
        _wrap(cls, "generate", functools.partial(_routed, door="routed_generate"))
    _wrap(GenerationMixin, "generate", _generating)
    for cls in GenerationMixin.__mro__[1:]:
        _wrap(cls, "init_continuous_batching", _in_its_own_thread)
    _wrap(checkpoint, next(filter(functools.partial(hasattr, checkpoint), CHECKPOINTING)), binding_first_argument)
    _wrap(checkpoint.CheckpointFunction, "forward", binding_second_argument)
    for cls, steps in STEPS.items():
        for name, make in steps.items():
            _wrap(cls, name, make)
    _wrap(PeftModel, "__init__", _without_an_old_name)
    _wrap(PeftModel, "load_adapter", _for_poly(loading.load_adapter))
    _wrap(PeftModel, "save_pretrained", _for_poly(saving.save_pretrained))
    _wrap(PeftModel, "push_to_hub", _for_poly(saving.push_to_hub))
    _wrap(PeftModel, "create_or_update_model_card", _for_poly(saving.create_or_update_model_card))
    _wrap(LoraFAOptimizer, "__init__", _without_poly)
    _wrap(transformers_door, "check_peft_version", _saying_what_to_do)
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _TrainerIsImported.__name__]
    if TRAINER in sys.modules:
        _teach_trainer(sys.modules[TRAINER])
    else:
        sys.meta_path.insert(0, _TrainerIsImported())


def _wrap(cls: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method of `cls` by `make(method)`; an earlier wrapper of ours is unwrapped first."""
    if name not in vars(cls) and cls is not PeftModel:
        return  # inherited, so wrapped where it is defined
    method = getattr(cls, name)
    method = getattr(method, MARK, method)
    wrapper = make(method)
    setattr(wrapper, MARK, method)
    setattr(cls, name, wrapper)


def _routed(method: Callable, door: str = "routed") -> Callable:
    parameters = list(inspect.signature(method).parameters)
    position = parameters.index("task_ids") - 1 if "task_ids" in parameters else None

    @functools.wraps(method)
    def wrapper(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        tuner = tuner_of(self)
        if tuner is None:
            return method(self, *args, **kwargs)
        task_ids = kwargs.pop("task_ids", None)
        if position is not None and len(args) > position:
            task_ids, args = args[position], (*args[:position], None, *args[position + 1 :])
        if tuner.ids_position is not None:
            if task_ids is not None:
                kwargs["task_ids" if position is None else PASSED] = task_ids
            elif position is None and len(args) > tuner.ids_position:
                task_ids = args[tuner.ids_position]
        with getattr(tuner, door)(args, kwargs, task_ids):
            return method(self, *args, **kwargs)

    return wrapper


def _generating(method: Callable) -> Callable:
    """Says how `generate` repeats rows. One inside another (long recordings, an own `generate`) must keep all rows."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_rows_are_whole(self, rows_of_call(args, kwargs)[0])
        with generation(*how_rows_repeat(self, kwargs)):
            return method(self, *args, **kwargs)

    return wrapper


def _check_rows_are_whole(model: Any, n_rows: Optional[int]) -> None:
    outer = current_generation()
    if outer is None or n_rows is None:
        return
    for context in task_contexts(model):
        batch = context.current()
        if batch is not None and batch.mixed:
            before = batch.n_rows if outer.n_rows is None else outer.n_rows
            if n_rows != before:
                raise ValueError(rows_left_message(before, n_rows))
    outer.n_rows = n_rows


def _in_its_own_thread(method: Callable) -> Callable:
    """Continuous batching computes packed rows in a thread of its own, which sees the set task only."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_one_task_is_set(self, "Continuous batching")
        return method(self, *args, **kwargs)

    return wrapper


def _without_poly(method: Callable) -> Callable:
    """LoRA-FA derives the gradient of an update from pairs of matrices, which it finds by the order of names."""

    @functools.wraps(method)
    def wrapper(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        groups = list(params)
        named = [name for group in groups if isinstance(group, dict) for name in group.get("names", ())]
        if any(f".{PolyModel.prefix}lora_A." in name for name in named):
            raise ValueError(
                "LoRA-FA is for plain LoRAs: it corrects the gradient of B by the one A beside it, and here skills are "
                "mixed. Use `create_poly_optimizer`; to leave A as it is, freeze the `poly_lora_A` tensors."
            )
        method(self, groups, *args, **kwargs)

    return wrapper


def _without_an_old_name(method: Callable) -> Callable:
    """PEFT asks a model for what newer versions of transformers call otherwise; that is no news for who trains."""

    @functools.wraps(method)
    def wrapper(self: PeftModel, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(peft_config, PolyConfig):
            return method(self, model, peft_config, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return method(self, model, peft_config, *args, **kwargs)

    return wrapper


def _saying_what_to_do(check: Callable) -> Callable:
    """transformers 5.24 asks for a PEFT that there is not in its own `add_adapter`, `set_adapter` and the like."""

    @functools.wraps(check)
    def wrapper(min_version: str) -> None:
        try:
            check(min_version)
        except ValueError as error:
            raise ValueError(
                f"transformers {transformers_version} wants PEFT {min_version} for its own `model.add_adapter`, "
                f"`set_adapter` and the like, and peft_poly works with {PEFT_VERSIONS}. Call "
                "`peft.get_peft_model(model, config)`, or `peft.inject_adapter_in_model(config, model)`, which puts "
                "the same layers in; or run: pip install 'transformers<5.24'"
            ) from error

    return wrapper


class _TrainerIsImported(MetaPathFinder):
    """Teaches transformers' `Trainer` when somebody imports it: it brings `datasets` and more, which not all need."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Let the other finders find the module of the `Trainer`, and teach it once it is loaded."""
        if fullname != TRAINER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_teach(module: Any) -> None:
                load(module)
                _teach_trainer(module)

            spec.loader.exec_module = load_and_teach  # type: ignore[method-assign]
        return spec


def _teach_trainer(module: Any) -> None:
    for name, make in LESSONS.items():
        _wrap(module.Trainer, name, make)


def _for_poly(ours: Callable) -> Callable[[Callable], Callable]:
    """`ours(method, model, ...)` for task-routed models, `method(model, ...)` for all others."""

    def make(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            if tuner_of(self) is None:
                return method(self, *args, **kwargs)
            return ours(functools.partial(method, self), self, *args, **kwargs)

        return wrapper

    return make
