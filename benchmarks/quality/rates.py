"""Learning rates and scale: what is tuned."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Rates"]


class Rates(NamedTuple):
    """Learning rate of skills or of a LoRA, that of routers, and the scale `lora_alpha / r`; 0 for what there is not.

    A router rate of 0 for a routed method means one rate for all. A LoRA with a bias per task has it for those.
    """

    lr: float = 0.0
    router_lr: float = 0.0
    scale: float = 0.0

    def __str__(self) -> str:
        return " ".join(f"{rate:g}" for rate in self)

    @classmethod
    def parse(cls, text: str) -> Rates:
        """What `str` has made."""
        return cls(*(float(rate) for rate in text.split()))
