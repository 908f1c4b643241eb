"""What every verb looks up: an adapter by its name, its settings, its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Union, cast

from ..checkpoints.sharding import check_whole
from ..config import PolyConfig
from ..layer import Linear
from ..tasks.context import TaskContext

__all__ = ["ByName", "Task"]

Task = Union[int, str]

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as _Tuner
else:
    _Tuner = object


class ByName(_Tuner):
    """Where a verb takes `adapter_name`, the default is the first active adapter."""

    task_context: TaskContext

    def _poly_name(self, adapter_name: Optional[str] = None) -> str:
        if adapter_name is None:
            if not self.active_adapters:
                raise ValueError("No adapter is active. Choose one with `set_adapter`.")
            return self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}. There are: {sorted(self.peft_config)}.")
        return adapter_name

    def _poly_config(self, adapter_name: Optional[str] = None) -> PolyConfig:
        return cast(PolyConfig, self.peft_config[self._poly_name(adapter_name)])

    def _poly_layers(self, *adapter_names: Optional[str]) -> dict[str, Linear]:
        names = [self._poly_name(name) for name in adapter_names]
        layers = {key: m for key, m in self.model.named_modules() if isinstance(m, Linear)}
        return {key: layer for key, layer in layers.items() if any(name in layer.poly_lora_A for name in names)}

    def _whole_layers(self, adapter_name: Optional[str], to: str) -> dict[str, Linear]:
        check_whole(self.model, [self._poly_name(adapter_name)], to)
        return self._poly_layers(adapter_name)
