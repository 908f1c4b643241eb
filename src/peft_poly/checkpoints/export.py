"""One task as a plain LoRA: a folder that PEFT, and whatever reads its LoRAs, loads without this package.

    task t ─▶ router (eval) ─▶ A_t (in, r) ─── transposed ─────────────▶ lora_A (r, in)
                               B_t (r, out) ── transposed, · alpha / r ─▶ lora_B (out, r)       lora_alpha = r

The scale sits in B, so that a reader needs nothing but `W + B A`; the rank is the same in every layer.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..adapter.labelled.classifiers import check_has_head, named_heads
from ..adapter.labelled.heads import TaskHeads
from ..adapter.targets import exact_targets
from ..compute.onloading import onloaded
from ..compute.states import evaluating
from ..config import PolyConfig
from ..layer import PolyLayer
from ..tasks.ids import resolve_task
from .sharding import check_layer_whole, check_whole
from .staging import staged
from .vllm import vllm_command, vllm_section, vllm_serves

__all__ = ["export_lora", "folder_names"]

PREFIX = "base_model.model."


def export_lora(
    model: nn.Module,
    task: Union[int, str, None],
    save_directory: Union[str, Path],
    *,
    adapter_name: Optional[str] = None,
    overwrite: bool = False,
    save_embedding_layers: Union[bool, Literal["auto"]] = "auto",
) -> Union[Path, dict[str, Path]]:
    """Write one task as a plain PEFT LoRA of the same rank, with the outputs of the task at eval, or all of them.

    Args:
        model: the `PeftModel`, its `PolyModel`, or a model that was given its adapter by injection. It may be in
            training mode, quantised or merged: only the adapter's tensors are read.
        task: id or name of the task, whose folder `save_directory` becomes. None: every task, each in a subfolder
            with its name (its id if it has none). Where vLLM serves such LoRAs, the line to type is printed.
        save_directory: where to write. The tensors have the adapter's dtype.
        adapter_name: the adapter. Default: the active one.
        overwrite: replace an existing folder.
        save_embedding_layers: whether the base model's embeddings go along, as in PEFT's `save_pretrained`: "auto" does
            so if the vocabulary has another size than the base model's, which leaves out those that were changed in
            place. True: both ends, of a model of transformers.

    Returns:
        The folder; for `task=None` the folders by task name (by id, as text, if the tasks have no names).

    Raises:
        FileExistsError: `save_directory` is not empty, and `overwrite` is False.
        ValueError: there is no such task or adapter; several adapters are active and none was named; the tensors are
            not all here (sharded, or on the meta device).
    """
    with onloaded(model):
        return _export(_source(model, adapter_name, save_embedding_layers), task, Path(save_directory), overwrite)


def _export(
    source: _Source, task: Union[int, str, None], target: Path, overwrite: bool
) -> Union[Path, dict[str, Path]]:
    names = folder_names(source.config)
    lora_config = _lora_config(source)
    for name in source.config.task_names or () if task is None else _names(task, source):
        check_has_head(source.root, source.adapter, name)
    if task is not None:
        task_id = _task_id(task, source)
        with staged(target, overwrite) as folder:
            _write(source, lora_config, task_id, folder, {names[task_id]: f"./{target.resolve().name}"})
        return target
    with staged(target, overwrite) as folder:
        for task_id, name in enumerate(names):
            _write(source, lora_config, task_id, folder / name, {name: f"./{name}" for name in names})
    if source.vllm_serves:
        print(vllm_command(source.base_name, source.config.r, {name: str(target / name) for name in names}))
    labels = source.config.task_names or names
    return {label: target / name for label, name in zip(labels, names, strict=True)}


# --------------------------------------------------------------------------------------------------------- the source
@dataclass
class _Source:
    """An adapter in a model: `layers` by their names in the base model, and what else was trained with them.

    Of that, `heads` are the heads per task, by the beginning of their tensors' names.
    """

    adapter: str
    config: PolyConfig
    root: nn.Module
    layers: dict[str, PolyLayer]
    others: dict[str, torch.Tensor]
    heads: dict[str, TaskHeads]
    base_name: Optional[str]

    @property
    def without_heads(self) -> dict[str, torch.Tensor]:
        """The others that every task's folder has."""
        return {key: tensor for key, tensor in self.others.items() if not key.startswith(tuple(self.heads))}

    @property
    def vllm_serves(self) -> bool:
        """Whether vLLM serves the folders."""
        return vllm_serves(self.root, self.config.r, whole_tensors=bool(self.others))


def _source(model: nn.Module, adapter_name: Optional[str], embeddings: Union[bool, Literal["auto"]]) -> _Source:
    model = getattr(model, "_orig_mod", model)
    tuner = model.base_model if isinstance(model, PeftModel) else model
    root = tuner.model if isinstance(tuner, BaseTuner) else tuner
    layers = {name: m for name, m in root.named_modules() if isinstance(m, PolyLayer)}
    if not layers:
        raise ValueError(f"This {type(model).__name__} has no task-routed layers, so there is no task to export.")
    adapter = adapter_name or _only_active(layers.values())
    layers = {name.replace("_orig_mod.", ""): m for name, m in layers.items() if adapter in m.poly_lora_A}
    if not layers:
        raise ValueError(f"There is no task-routed adapter {adapter!r} in this model.")
    config = next(iter(layers.values())).task_context.configs[adapter]
    check_whole(root, [adapter], "be exported")
    for name, layer in layers.items():
        check_layer_whole(name, layer, adapter, config)
    base_name = config.base_model_name_or_path or getattr(root, "name_or_path", None) or None
    heads = {f"{PREFIX}{name.replace('_orig_mod.', '')}.": module for name, module in named_heads(root, adapter)}
    source = _Source(adapter, config, root, layers, _other_tensors(tuner, root, adapter, embeddings), heads, base_name)
    _warn_of_whole_tensors(source)
    return source


def _only_active(layers: Iterable[PolyLayer]) -> str:
    active = {name for layer in layers for name in layer.active_adapters if name in layer.poly_lora_A}
    if len(active) != 1:
        state = f"Several adapters are active ({sorted(active)})" if active else "No adapter is active"
        raise ValueError(f"{state}, and a LoRA folder holds one. Pass `adapter_name=`.")
    return active.pop()


def _other_tensors(
    tuner: nn.Module, root: nn.Module, adapter: str, embeddings: Union[bool, Literal["auto"]]
) -> dict[str, torch.Tensor]:
    """What PEFT saves with the adapter besides its skills and routers: `modules_to_save`, embeddings."""
    tensors: dict[str, torch.Tensor] = {}
    if embeddings is True and isinstance(root, PreTrainedModel):  # PEFT leaves out one end where the other is adapted
        tensors |= _embeddings(root)
    if adapter in getattr(tuner, "peft_config", {}):
        prefix = PREFIX if tuner is root else PREFIX.removesuffix("model.")
        saved = get_peft_model_state_dict(tuner, adapter_name=adapter, save_embedding_layers=embeddings)
        tensors |= {f"{prefix}{key}": t for key, t in saved.items() if f".{PolyLayer.prefix}" not in f".{key}"}
    # of a wrapper that is another adapter's, this one sees the module inside
    inside = {key.replace(".original_module.", "."): t for key, t in tensors.items() if ".original_module." in key}
    wrapped = (".original_module.", ".modules_to_save.")
    return {**inside, **{key: t for key, t in tensors.items() if not any(part in key for part in wrapped)}}


def _embeddings(root: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The input and output embeddings that are no adapter's."""
    ends = [end for end in (root.get_input_embeddings(), root.get_output_embeddings()) if end is not None]
    return {
        f"{PREFIX}{name.replace('_orig_mod.', '')}.{key}": tensor
        for name, module in root.named_modules(remove_duplicate=False)
        if type(module) in (nn.Embedding, nn.Linear) and any(module is end for end in ends)
        for key, tensor in module.state_dict().items()
    }


def _warn_of_whole_tensors(source: _Source) -> None:
    """Count what is in a folder: of heads those of its task."""
    names = list(source.without_heads)
    names += [f"{prefix}{name}" for prefix, heads in source.heads.items() for name in heads.linear(0).state_dict()]
    if names:
        warnings.warn(
            f"Beside its low-rank pairs the LoRA has {len(names)} whole tensor(s) of `modules_to_save` or embeddings, "
            f"such as {min(names)}. PEFT loads them; some servers, vLLM among them, refuse such an adapter."
        )


def _task_id(task: Any, source: _Source) -> int:
    if not isinstance(task, (int, str)) or isinstance(task, bool):
        raise ValueError(f"`task` must be one id, one name, or None for all tasks, got {task!r}.")
    return resolve_task(task, source.config, source.adapter)


def _names(task: Any, source: _Source) -> list[str]:
    names = source.config.task_names
    return [] if names is None else [names[_task_id(task, source)]]


# --------------------------------------------------------------------------------------------------------- the folder
def _write(source: _Source, lora_config: LoraConfig, task_id: int, folder: Path, served_with: dict[str, str]) -> None:
    """One task's folder; its card says how to serve it with those of `served_with`."""
    folder.mkdir(exist_ok=True)
    save_file(_tensors(source, task_id), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    base = type(source.root)
    mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}  # as PEFT's save_pretrained does
    lora_config.save_pretrained(str(folder), auto_mapping_dict=None if lora_config.task_type else mapping)
    _card(source, task_id, served_with).save(folder / "README.md")


@torch.no_grad()
def _tensors(source: _Source, task_id: int) -> dict[str, torch.Tensor]:
    kept = source.without_heads
    for prefix, heads in source.heads.items():
        kept |= {f"{prefix}{name}": tensor for name, tensor in _head(source, heads, task_id).state_dict().items()}
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in kept.items()}
    for name, layer in source.layers.items():
        with evaluating(cast(nn.Module, layer.poly_router[source.adapter])):
            A, B = layer.mixed_pair(source.adapter, torch.tensor([task_id]))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A[0].T.contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (B[0].T * layer.scaling[source.adapter]).contiguous().cpu()
    return tensors


def _head(source: _Source, heads: TaskHeads, task_id: int) -> nn.Linear:
    names = source.config.task_names
    return heads.linear(task_id if names is None else list(heads.labels).index(names[task_id]))


def _lora_config(source: _Source) -> LoraConfig:
    config = source.config
    saved = sorted(set(config.modules_to_save)) if config.modules_to_save else None
    # PEFT's classes for classifiers pass arguments of texts, which some models of images and sound cannot take.
    of_text = config.labels is None or getattr(source.root, "main_input_name", "input_ids") == "input_ids"
    return LoraConfig(
        task_type=config.task_type if of_text else None,
        base_model_name_or_path=source.base_name,
        revision=config.revision,
        inference_mode=True,
        r=config.r,
        lora_alpha=config.r,
        target_modules=exact_targets(source.root, source.layers, saved),
        modules_to_save=saved,
        fan_in_fan_out=all(layer.fan_in_fan_out for layer in source.layers.values()),
    )


def folder_names(config: PolyConfig) -> list[str]:
    """A folder name for each task: its name where that is safe as one, else a safe form of it, all different.

    They differ in more than upper and lower case, which some file systems do not tell apart.

    ```py
    >>> folder_names(PolyConfig(task_names=["rte", "glue/sst2", "glue_sst2", "RTE"]))
    ['rte', 'glue_sst2-1', 'glue_sst2', 'RTE-3']
    >>> folder_names(PolyConfig(n_tasks=2))
    ['0', '1']

    ```
    """
    names = config.task_names or [str(task) for task in range(config.n_tasks)]
    safe = [_safe(name) for name in names]
    taken: dict[str, int] = {}  # first the names that are safe as they are, so that no other task sits under them
    for task in sorted(range(len(names)), key=lambda task: safe[task] != names[task]):
        while safe[task].casefold() in taken:
            safe[task] += f"-{task}"
        taken[safe[task].casefold()] = task
    return safe


def _safe(name: str) -> str:
    text = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name))
    return text.lstrip(".-").rstrip(".")[:80] or "task"


def _base_lines(source: _Source, cls: str, task_id: int) -> list[str]:
    """Code that loads the base model; with heads, one whose last layer is that of the task, which no LoRA can say."""
    labels, name = source.config.labels, source.base_name
    if labels is None:
        return [f'base = {cls}.from_pretrained("{name}")']
    settings = [f"{key}={value!r}" for key, value in list(labels.values())[task_id].config.items()]
    lines = "".join(f"    {setting},\n" for setting in [f'"{name}"', *settings, "ignore_mismatched_sizes=True"])
    return [f"base = {cls}.from_pretrained(\n{lines})"]


def _card(source: _Source, task_id: int, served_with: dict[str, str]) -> ModelCard:
    config, base = source.config, source.root
    name = " ".join(config.task_names[task_id].split()) if config.task_names else str(task_id)
    data = ModelCardData(base_model=source.base_name, library_name="peft", tags=["lora", "peft-poly"])
    lines = ["from peft import PeftModel"]
    if isinstance(base, PreTrainedModel) and source.base_name:
        cls = type(base).__name__
        lines += [f"from transformers import {cls}", "", *_base_lines(source, cls, task_id)]
    else:
        lines += ["", f"base = ...  # the {type(base).__name__} that the adapter was trained on"]
        for key, heads in source.heads.items():
            layer = _head(source, heads, task_id)
            size = f"{layer.in_features}, {layer.out_features}{'' if heads.has_bias else ', bias=False'}"
            lines += [f"# its `{key.removeprefix(PREFIX)[:-1]}` must be a `torch.nn.Linear({size})`, that of this task"]
    lines += ['model = PeftModel.from_pretrained(base, "...")  # this folder, or the id of its repository']
    loading = "\n".join(lines)
    serving = vllm_section(source.base_name, config.r, served_with) if source.vllm_serves else ""
    return ModelCard(
        f"""\
---
{data.to_yaml()}
---

# LoRA of the task {name}

A plain LoRA of rank {config.r}: what a task-routed adapter of {config.n_tasks} task(s) computes for its task \
{name} (id {task_id}). peft-poly wrote it; nothing but PEFT is needed to load it.

## How to load it

```python
{loading}
```
{serving}"""
    )
