"""The verbs that take tasks out of the model: into its base weights, or into plain LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from ..checkpoints.export import export_lora
from ..checkpoints.sharding import check_whole
from ..compute.keeping.serving import check_not_serving
from ..compute.merging import merged_weight
from ..layer import Linear
from .by_name import ByName, Task

__all__ = ["MergeAndExport"]


class MergeAndExport(ByName):
    """For one task an adapter is a LoRA, which can be merged or written as one; a mixin of `PolyModel`."""

    def merge_adapter(
        self,
        adapter_names: Optional[list[str]] = None,
        safe_merge: bool = False,
        task: Union[Task, dict[str, Task], None] = None,
    ) -> None:
        """Add what one task contributes to the base weights, which then run at the base model's speed.

        Args:
            adapter_names: adapters to merge; those that are merged stay so. Default: the active ones of each layer.
            safe_merge: check for NaN and infinity; if there are any, nothing is merged.
            task: the task, by name or id, or `{adapter: task}`. Default: the set one, or the only one.

        Raises:
            ValueError: no task was chosen; another task is merged already; a weight would not be finite.
        """
        check_not_serving(self.task_context, "`merge_adapter`")
        with self.task_context.choosing(task):
            self._check_can_merge(adapter_names, task, safe_merge)
            super().merge_adapter(adapter_names=adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        task: Union[Task, dict[str, Task], None] = None,
    ) -> nn.Module:
        """The base model with one task merged into it, and no adapter left.

        Args:
            progressbar: show one.
            safe_merge: check for NaN and infinity; if there are any, nothing is merged.
            adapter_names: adapters to merge; those that are merged stay so. Default: the active ones of each layer.
            task: the task, by name or id, or `{adapter: task}`. Default: the set one, or the only one.

        Returns:
            The base model, in its own dtype.

        Raises:
            ValueError: as `merge_adapter`; or another task is merged already.
        """
        check_not_serving(self.task_context, "`merge_and_unload`")
        with self.task_context.choosing(task):
            more = self._check_can_merge(adapter_names, task, safe_merge)
            unload: Any = self._unload_and_optionally_merge  # typed as returning None
            return unload(merge=more, progressbar=progressbar, adapter_names=adapter_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can be used: once the task is known, by `set_task` or as the only one."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self._poly_layers(adapter_name).values())

    def export_lora(
        self, task: Optional[Task], save_directory: Union[str, Path], **kwargs: Any
    ) -> Union[Path, dict[str, Path]]:
        """Write one task as a plain PEFT LoRA with equal outputs, or every task; see `peft_poly.export_lora`.

        Args:
            task: id or name of the task, whose folder `save_directory` becomes. None: every task, a subfolder each.
            save_directory: where to write.
            kwargs: `adapter_name`, `overwrite` and `save_embedding_layers` of `peft_poly.export_lora`.

        Returns:
            The folder, or the folders by task.

        Raises:
            FileExistsError: `save_directory` is not empty, and `overwrite` is False.
            ValueError: there is no such task; several adapters are active and none was named.
        """
        return export_lora(self, task, save_directory, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any) -> None:
        """Refused: a combination of adapters is no adapter of the same size, whose mix is a product of averages.

        Args:
            adapters: names of adapters, as in PEFT's LoRA.
            weights: one for each.
            adapter_name: of the combination.
            kwargs: the same.

        Raises:
            ValueError: always; the message says what gives the exact sum.
        """
        raise ValueError(
            f"Adapters that route tasks are not combined into one ({adapters} into {adapter_name!r}): the sum of their "
            "updates is no adapter of the same rank. For the exact sum activate them together with "
            "`model.base_model.set_adapter([...])`, each at its own `set_scale`, or merge them with `merge_adapter("
            "adapter_names=[...], task=...)`; for arithmetic on one task, `export_lora` each and combine the LoRAs."
        )

    def _check_can_merge(self, adapter_names: Optional[list[str]], task: Any, finite: bool) -> bool:
        """Raise what a merge would, for every layer, before any of them changes; whether there is more to merge."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        layers = [module for module in self.model.modules() if isinstance(module, Linear)]
        names = dict.fromkeys(adapter_names or (name for layer in layers for name in layer.active_adapters))
        tasks: dict[str, int] = {}
        for name in names:
            merged = self.task_context.merged.get(self._poly_name(name))
            if merged is None or task is not None or self.task_context.default is not None:
                tasks[name] = self.task_context.one_task(name)
            if merged is not None and tasks.get(name, merged) != merged:
                raise ValueError(self._merged_message(name))
        check_whole(self.model, names, "be merged")
        more = False
        for layer in layers:
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            new = [name for name in wanted if name in layer.poly_lora_A and name not in layer.merged_adapters]
            more = more or bool(new)
            if new and (finite or layer.quantization_backend is not None):
                with onload_layer(layer):
                    merged_weight(layer, {name: tasks[name] for name in new}, finite)
        return more

    def _merged_message(self, name: str) -> str:
        task, names = self.task_context.merged[name], self._poly_config(name).task_names
        return (
            f"Adapter {name!r} is merged already, with task {names[task] if names else task!r}. Call "
            "`unmerge_adapter()` first."
        )
