"""The settings that did best in this project's benchmarks, by kind of adapter: the one place that has them.

`PolyConfig.recommended` fills them in, and `create_poly_optimizer` and the `Trainer` take the router's rate from here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ROUTER_LR", "plain_defaults_message", "settings_for"]

SETTINGS: dict[str, dict[str, Any]] = {  # by `poly_type`; of one size, without what the tasks add
    "poly": {"r": 3, "n_skills": 8, "router_noise": False},
    "gates": {"r": 24, "n_skills": 1},
}
ROUTER_LR = 0.1  # of both kinds, beside 1e-3 for the skills; these up to 3e-3 where a task has hundreds of rows


def settings_for(poly_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a `PolyConfig`: those given, and what is recommended for the others.

    The scale is worked out from the sizes: `lora_alpha = r * n_skills` makes an even mix move as far at one learning
    rate as a LoRA of the rank `r * n_skills`.
    """
    settings = {**SETTINGS.get(poly_type, {}), **given}  # of a kind that there is not, the config says so
    sizes: list[Any] = [settings.get(name) for name in ("r", "n_skills")]
    if "lora_alpha" not in given and all(type(size) is int for size in sizes):  # else the config says what is wrong
        settings["lora_alpha"] = sizes[0] * sizes[1]
    return settings


def plain_defaults_message(adapter_name: str, r: int, n_skills: int) -> str:
    """What an adapter that is made for training with the default scale is warned of."""
    size = r * n_skills
    return (
        f"Adapter {adapter_name!r} is made with the default `lora_alpha=1`, that of PEFT's own Poly. At one learning "
        f"rate its update is some {size} times smaller than that of a LoRA as large, of the rank {size}, so that it "
        "learns next to nothing. Use `PolyConfig.recommended(task_names=...)`, or set "
        f"`lora_alpha={size}`, r * n_skills; `lora_alpha=1` written out keeps the scale without this warning."
    )
