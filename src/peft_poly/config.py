"""`PolyConfig`: every setting of a task-routed adapter, checked without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Protocol, Union

from peft.config import PeftConfig
from peft.utils import PeftType

from .labels import TaskLabels, read_task_labels
from .recommended import ROUTER_LR, settings_for

__all__ = ["PolyConfig"]

GRANULARITIES = ("layer", "block", "model")
INITS = (True, False, "mhr")
HEADED = ("SEQ_CLS", "TOKEN_CLS")  # task types whose models end in a layer of labels
UNKNOWN = ("error", "mean")


class _One(int):
    """A 1 that can be told from one that was typed."""


NOT_GIVEN = _One(1)


class KindSettings(Protocol):
    """What a kind of adapter says about its settings; `peft_poly.compute.kinds.kind` has the rest of it."""

    name: str
    n_skills: int
    n_splits: int

    def check(self, config: PolyConfig) -> None:
        """Raise `ValueError` for settings that this kind cannot have."""

    def router(self, config: PolyConfig) -> Any:
        """A router for these settings."""


# By `poly_type`; `peft_poly.compute.kinds` enters them, and a reload of this module keeps them.
KINDS: dict[str, KindSettings] = globals().get("KINDS", {})


@dataclass
class PolyConfig(PeftConfig):
    """Settings of a Polytropon (Poly) or Multi-Head Routing (MHR) adapter.

    The adapter keeps `n_skills` low-rank pairs per adapted layer and, for each of `n_tasks` tasks, a router row that
    mixes them. With `n_splits > 1` (MHR) every slice of the features has mixing weights of its own. The defaults
    reproduce PEFT's own Poly. Papers: Polytropon, arXiv 2202.13914; MHR, arXiv 2211.03831.

    `task_type` (`"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`, ... or None), `base_model_name_or_path`, `revision` and
    `inference_mode` are those of every `peft.PeftConfig`; PEFT fills in `peft_type`, `peft_version` and `auto_mapping`.

    Args:
        r (`int`): Rank of every skill.
        target_modules (`list[str] | str`, *optional*): Layers to adapt: name endings, a regular expression,
            `"all-linear"`, or None for the default of the architecture (the same as LoRA's).
        exclude_modules (`list[str] | str`, *optional*): Layers to leave out, by name ending or regular expression.
        layers_to_transform (`list[int] | int`, *optional*): Indices of the repeated blocks to adapt; None for all.
            Needs `target_modules` to be a list.
        layers_pattern (`list[str] | str`, *optional*): Name of the module list that `layers_to_transform` counts in.
        modules_to_save (`list[str]`, *optional*): Further modules to train and save as they are (heads, say).
        init_weights (`bool | "mhr"`): True: A as `nn.Linear` per split, B zero. False: B as A, for tests. `"mhr"`:
            A uniform in `+-1/sqrt(3 in_features)`, B zero, as the code of the MHR paper has it.
        poly_type (`"poly" | "gates"`): The kind of adapter. `"poly"` mixes skills by task (Poly; MHR with more than one
            split). `"gates"` is one LoRA that all tasks share, and a gate for each task, layer and rank, the diagonal
            case of MTL-LoRA (arXiv 2410.09437): `y = base(x) + ((x A) * g_t) B * lora_alpha / r`.
        n_tasks (`int`, *optional*): Number of tasks (router rows). Default: `len(task_names)`, else 1.
        n_skills (`int`, *optional*): Number of skills in the inventory of a layer. Default: 4; with gates 1, and no
            other is allowed.
        n_splits (`int`, *optional*): Number of splits (heads). Must divide the in- and out-features of every adapted
            layer. Default: 1; with gates no other is allowed.
        task_names (`list[str]`, *optional*): A name for each task, usable wherever an id goes. Sets `n_tasks`.
        task_labels (`dict`, *optional*): The labels of each task, for a head per task in place of the base model's last
            layer (`task_type` `"SEQ_CLS"` or `"TOKEN_CLS"`): by the task's name a list of names, a number of labels, 1
            for a number to predict, or `{"labels": ..., "kind": "single_label" | "multi_label" | "regression",
            "weights": [...]}`, where weights, one for each label, multiply the loss of the rows that have it. Sets
            `task_names` if those are not given.
        lora_alpha (`float`): The update is scaled by `lora_alpha / r`. The default, 1, is that of PEFT's
            own Poly, and at the learning rate of a LoRA it hardly moves: an adapter that is made for training with
            it says so. `PolyConfig.recommended` sets what did best.
        lora_dropout (`float`): Dropout on the input of the adapter while training.
        router_temperature (`float`): Temperature of the relaxed Bernoulli; 1 as in the papers.
        router_noise (`bool`): True: training samples the relaxed Bernoulli. False: training uses the sigmoid too, as
            the MHR recipe for T0 does.
        router_granularity (`"layer" | "block" | "model"`): One router per adapted layer, per repeated block, or for
            the whole model. Layers outside any repeated block keep their own under `"block"`.
        router_lr (`float`, *optional*): Learning rate of the router rows, for `create_poly_optimizer` and for a
            `Trainer` that is given no optimizer. None: what is recommended. Any number is taken as it
            is; the skills' own rate makes one rate for all.
        unknown_task (`"error" | "mean"`): What a task name gets that the adapter does not have. `"mean"`: in eval
            mode, the mean row of the router's logits. While training, and for ids out of range, it is an error.

    Raises:
        ValueError: A setting is outside what is allowed; the message names it, the value and what to do.

    Example:

    ```py
    >>> from peft_poly import PolyConfig
    >>> config = PolyConfig(task_type="SEQ_2_SEQ_LM", r=8, n_skills=8, n_splits=4, task_names=["rte", "sst2"])
    >>> config.n_tasks
    2

    ```
    """

    r: int = field(default=8, metadata={"help": "Rank of every skill."})
    target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Layers to adapt: name endings, a regular expression, or 'all-linear'."}
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Layers to leave out: name endings or a regular expression."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indices of the repeated blocks to adapt."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Further modules to train and save as they are."}
    )
    init_weights: Union[bool, Literal["mhr"]] = field(
        default=True, metadata={"help": "True: A as nn.Linear, B zero. False: B as A. 'mhr': the paper's range for A."}
    )
    poly_type: str = field(default="poly", metadata={"help": "The kind of adapter."})
    n_tasks: int = field(  # type: ignore[assignment]  # None until __post_init__, to tell "not given" from 1
        default=None, metadata={"help": "Number of tasks. Default: the number of task_names, else 1."}
    )
    n_skills: int = field(  # type: ignore[assignment]  # None until __post_init__, where the kind fills it in
        default=None, metadata={"help": "Number of skills in the inventory of a layer. Default: 4."}
    )
    n_splits: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Number of splits; more than 1 is Multi-Head Routing. Default: 1."}
    )
    task_names: Optional[list[str]] = field(default=None, metadata={"help": "A name for each task."})
    task_labels: Optional[dict[str, Any]] = field(
        default=None, metadata={"help": "The labels of each task, for a head per task."}
    )
    lora_alpha: float = field(default=NOT_GIVEN, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter."})
    router_temperature: float = field(default=1.0, metadata={"help": "Temperature of the relaxed Bernoulli."})
    router_noise: bool = field(default=True, metadata={"help": "Sample the routing while training."})
    router_granularity: Literal["layer", "block", "model"] = field(
        default="layer", metadata={"help": "One router per adapted layer, per repeated block, or for the model."}
    )
    router_lr: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the router. Default: what is recommended."}
    )
    unknown_task: Literal["error", "mean"] = field(
        default="error", metadata={"help": "What an unknown task name gets at eval: an error, or the mean row."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PEFT_POLY  # type: ignore[attr-defined]
        self.has_plain_scale = self.lora_alpha is NOT_GIVEN  # one that was read from a file was given
        self.lora_alpha = 1 if self.has_plain_scale else self.lora_alpha
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as all PEFT configs do
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_targets()
        self._check_tasks()
        self._fill_in()
        self._check_sizes()
        self._check_choices()
        self.kind.check(self)

    @property
    def kind(self) -> KindSettings:
        """The kind of adapter that `poly_type` names."""
        return KINDS[self.poly_type]

    def _fill_in(self) -> None:
        if self.poly_type not in KINDS:
            raise ValueError(f"`poly_type` must be one of {sorted(KINDS)}, got {self.poly_type!r}.")
        self.n_skills = self.kind.n_skills if self.n_skills is None else self.n_skills
        self.n_splits = self.kind.n_splits if self.n_splits is None else self.n_splits

    @classmethod
    def recommended(
        cls, *, task_names: Optional[list[str]] = None, poly_type: Literal["poly"] = "poly", **overrides: Any
    ) -> PolyConfig:
        """The settings that did best in this project's benchmarks, for one kind of adapter.

        Train the skills at 1e-3, or up to 3e-3 where a task has hundreds of rows; the router's rate is
        `effective_router_lr`.

        Args:
            task_names: a name for each task.
            poly_type: the kind.
            overrides: any other setting of a `PolyConfig`. `lora_alpha` follows `r` and `n_skills` unless it is given.

        Raises:
            ValueError: a setting is outside what is allowed.

        Example:

        ```py
        >>> from peft_poly import PolyConfig
        >>> config = PolyConfig.recommended(task_names=["rte", "sst2"], r=4)
        >>> config.r, config.n_skills, config.lora_alpha, config.effective_router_lr
        (4, 8, 32, 0.1)

        ```
        """
        return cls(task_names=task_names, poly_type=poly_type, **settings_for(poly_type, overrides))

    @property
    def effective_router_lr(self) -> float:
        """`router_lr`, or the rate that is recommended."""
        return ROUTER_LR if self.router_lr is None else self.router_lr

    def _check_targets(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a regular expression or 'all-linear', got "
                    f"{self.target_modules!r}. Pass a list of names, or say it all in the expression."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`, the indices of the blocks to adapt.")

    @property
    def labels(self) -> Optional[dict[str, TaskLabels]]:
        """What `task_labels` says, by task in the order of `task_names`; None if the tasks have no heads."""
        return None if self.task_labels is None else read_task_labels(self.task_labels, self.task_names or [])

    def _check_tasks(self) -> None:
        if self.task_labels is not None and self.task_names is None:
            self.task_names = list(read_task_labels(self.task_labels, tuple(self.task_labels)))
        if self.task_names is None:
            self.n_tasks = 1 if self.n_tasks is None else self.n_tasks
            return
        check_task_names(self.task_names)
        self.task_names = list(self.task_names)
        if self.n_tasks is not None and self.n_tasks != len(self.task_names):
            raise ValueError(
                f"`n_tasks` is {self.n_tasks} but `task_names` has {len(self.task_names)} entries. "
                "Leave `n_tasks` out, or make them agree."
            )
        self.n_tasks = len(self.task_names)
        self._check_labels(self.task_names)

    def _check_labels(self, task_names: list[str]) -> None:
        if self.task_labels is None:
            return
        read_task_labels(self.task_labels, task_names)
        if self.task_type not in HEADED:
            raise ValueError(
                f"`task_labels` makes a head per task, which needs a `task_type` of {' or '.join(HEADED)}, got "
                f"{self.task_type!r}. In a model of your own put `peft_poly.TaskHeads` in, and its name into "
                "`modules_to_save`."
            )
        self.task_labels = {name: self.task_labels[name] for name in task_names}

    def _check_sizes(self) -> None:
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name in ("lora_alpha", "router_temperature", "router_lr"):
            value = getattr(self, name)
            if name == "router_lr" and value is None:
                continue
            if not _is_number(value) or value <= 0:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), got {self.lora_dropout!r}.")

    def _check_choices(self) -> None:
        if not isinstance(self.router_noise, bool):
            raise ValueError(f"`router_noise` must be True or False, got {self.router_noise!r}.")
        if not isinstance(self.init_weights, bool) and self.init_weights != "mhr":
            raise ValueError(f"`init_weights` must be one of {INITS}, got {self.init_weights!r}.")
        if self.router_granularity not in GRANULARITIES:
            raise ValueError(f"`router_granularity` must be one of {GRANULARITIES}, got {self.router_granularity!r}.")
        if self.unknown_task not in UNKNOWN:
            raise ValueError(f"`unknown_task` must be one of {UNKNOWN}, got {self.unknown_task!r}.")


def check_task_names(names: object) -> None:
    """Raise `ValueError` unless `names` is a non-empty sequence of different, non-empty strings."""
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"`task_names` must be a non-empty list of names, got {names!r}.")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Every task name must be a non-empty string, got {name!r} in {list(names)!r}.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Task names must differ, but {repeated} occur more than once. Rename or remove them.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
