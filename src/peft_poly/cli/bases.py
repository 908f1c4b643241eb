"""The base model of a saved adapter: its class from the adapter's config, its weights only where they are needed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import torch
import transformers
from peft import PeftModel
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checkpoints.finding import find_file
from ..checkpoints.reading import read_tensors

__all__ = [
    "base_model_name",
    "holds_base_weights",
    "hollow_base_model",
    "load_base_model",
    "save_tokenizer",
    "with_adapter",
]

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
LAST_OF_HEAD = re.compile(r"\.(classifier|score|classifier\.out_proj)\.weight$")
CONFIG = "config.json"
UNFIT = ("ignore_mismatched_sizes", "copying a param with shape")  # of transformers 5, and of 4
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


def base_model_name(config: PeftConfig, given: Optional[str]) -> str:
    """The base model to load: the given one, else the one that the adapter's config names.

    Raises:
        ValueError: neither says one.
    """
    name = given or config.base_model_name_or_path
    if not name:
        raise ValueError("The adapter's config names no base model. Pass --base with a Hub id or a folder.")
    return name


def load_base_model(source: Union[str, Path], config: PeftConfig, base: str) -> nn.Module:
    """The base model with its weights, in their own dtype.

    Args:
        source: the adapter, which knows the number of labels of a classifier that it trained.
        config: its config.
        base: folder or Hub id of the base model.

    Raises:
        ValueError: there is no such base model, or its class is none of transformers.
    """
    cls, labels = _model_class(config), _labels(source, config)
    with _loading(config, base):  # a head of another size is replaced by the adapter's
        return cls.from_pretrained(
            base, dtype="auto", ignore_mismatched_sizes=bool(labels), **_revision(config, base), **labels
        )


def hollow_base_model(source: Union[str, Path], config: PeftConfig, base: str) -> nn.Module:
    """The base model's layers by name and size, with no weights behind them: enough to load an adapter for export.

    Only the base model's `config.json` is read. Every parameter is one number, seen in the shape of the weight.
    Arguments and errors of `load_base_model`.
    """
    cls = _model_class(config)
    options = {**_revision(config, base), **_labels(source, config)}
    with _loading(config, base):
        model_config = transformers.AutoConfig.from_pretrained(base, **options)
    make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    with torch.device("meta"):
        model = make(model_config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))
    return model


def with_adapter(model: nn.Module, source: str, **kwargs: Any) -> Any:
    """The base model with the saved adapter on it; `kwargs` are those of `PeftModel.from_pretrained`.

    Raises:
        ValueError: the adapter was trained on a model of other sizes.
    """
    try:
        return PeftModel.from_pretrained(model, source, **kwargs)
    except RuntimeError as error:  # of torch: a heading, and then a line for every tensor
        said = str(error).strip().splitlines()
        raise ValueError(f"{source} does not fit the base model: {said[min(1, len(said) - 1)].strip()}") from error


def holds_base_weights(model: nn.Module, source: Union[str, Path]) -> bool:
    """Whether the adapter's file has parameters of the base model itself, its embeddings, beside its own."""
    path = find_file(source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    return bool(read_tensors(path, dict(model.named_parameters()).__contains__))


def save_tokenizer(base: str, folder: Path) -> bool:
    """Save the base model's tokenizer into a folder; says whether it has one."""
    try:
        find_file(base, TOKENIZER)
    except FileNotFoundError:
        return False
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return True


def _model_class(config: PeftConfig) -> Any:
    task_type = getattr(config.task_type, "value", config.task_type)
    if task_type is not None:
        return getattr(transformers, AUTO_CLASSES[task_type])
    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class"), str(mapping.get("parent_library", ""))
    if name and library.split(".")[0] == "transformers":
        return getattr(importlib.import_module(library), name)
    raise ValueError(
        f"The adapter's base model is of class {name or 'unknown'}, which is none of transformers, so the command "
        "line cannot load it. Load it in Python, and use the methods of the model."
    )


@contextmanager
def _loading(config: PeftConfig, base: str) -> Iterator[None]:
    try:
        find_file(base, (CONFIG,), **_revision(config, base))  # transformers asks many times for what is not there
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        unfit = any(sign in str(error) for sign in UNFIT)  # transformers says it in a table, which is not shown
        reason = "its weights have other sizes than its config.json says." if unfit else error
        raise ValueError(f"The base model {base!r} cannot be loaded: {reason}") from error


def _revision(config: PeftConfig, base: str) -> dict[str, Any]:
    return {"revision": config.revision} if config.revision and base == config.base_model_name_or_path else {}


def _labels(source: Union[str, Path], config: PeftConfig) -> dict[str, int]:
    """Number of labels of the head that the adapter trained; the base model on disk may have had none."""
    if getattr(config.task_type, "value", config.task_type) not in CLASSIFIERS:
        return {}
    path = find_file(source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        heads = [key for key in file.keys() if LAST_OF_HEAD.search(key)]  # noqa: SIM118
        return {"num_labels": file.get_slice(max(heads, key=len)).get_shape()[0]} if heads else {}
