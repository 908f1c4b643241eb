"""Why routers have a learning rate of their own: how far the mixing weights get from uniform, with and without one.

A teacher, a small network with a task-routed adapter whose tasks use skills of a common inventory or do not, makes the
targets of eight tasks. Students of the same size learn from it with AdamW: with one rate of 1e-3, with 1e-3 for the
skills and 0.1 for the routers, and with one rate of 1e-2. Distance from uniform is the total variation, half the sum
of `|w - 1 / n_skills|`: 0 for equal weights, 0.75 for one skill out of four.

    python examples/router_rate.py
    python examples/router_rate.py --steps 3000 --seeds 0 1 2 3 4 --plot router-rate.png
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from peft_poly import PolyConfig, create_poly_optimizer

TASKS, SKILLS, FEATURES, BATCH = 8, 4, 32, 64
RATES = {  # of skills and routers, and the colour of the curve
    "1e-3 for all": (1e-3, 1e-3, "#b45309"),
    "1e-3, routers at 0.1": (1e-3, 0.1, "#1d4ed8"),
    "1e-2 for all": (1e-2, 1e-2, "#6b7280"),
}
console = Console(highlight=False)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 2 * FEATURES), nn.GELU(), nn.Linear(2 * FEATURES, FEATURES))


def with_adapter(base: nn.Module, **settings: Any) -> PeftModel:
    sizes = {"r": 4, "lora_alpha": 4, "n_skills": SKILLS, "n_splits": 2, "n_tasks": TASKS}
    return get_peft_model(copy.deepcopy(base), PolyConfig(target_modules=["0", "2"], **sizes, **settings))


def teacher(base: nn.Module) -> PeftModel:
    """Every task uses each skill of each split or not, by the toss of a coin."""
    model = with_adapter(base, init_weights=False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("module_logits"):
            parameter.data = torch.randint(2, parameter.shape) * 10.0 - 5.0
    return model.requires_grad_(False)


def distance(model: PeftModel) -> float:
    """Total variation between the mixing weights and uniform ones: mean over layers, tasks and splits."""
    weights = torch.stack([(w - 1 / SKILLS).abs().sum(-1).mean() / 2 for w in model.routing_weights().values()])
    return weights.mean().item()


@torch.no_grad()
def error(model: PeftModel, target: PeftModel) -> float:
    """Mean squared error on fresh rows of all tasks, in shares of that of the network without an adapter."""
    task_ids = torch.arange(TASKS).repeat_interleave(64)
    x = torch.randn(len(task_ids), FEATURES, generator=torch.Generator().manual_seed(1))
    y = target(x, task_ids=task_ids)
    model.eval()
    with model.disable_adapter():
        base = nn.functional.mse_loss(model(x), y)
    found = nn.functional.mse_loss(model(x, task_ids=task_ids), y)
    model.train()
    return (found / base).item()


def learn(lr: float, router_lr: float, seed: int, steps: int, every: int) -> tuple[list[float], float]:
    """The distance from uniform every so many steps, and the error at the end."""
    torch.manual_seed(seed)
    base = network()
    target, student = teacher(base), with_adapter(base)
    optimizer = create_poly_optimizer(student, torch.optim.AdamW, lr=lr, router_lr=router_lr, weight_decay=0.0)
    distances = [distance(student)]
    for step in track(
        range(1, steps + 1), f"{lr:g}, routers {router_lr:g}, seed {seed}", console=console, transient=True
    ):
        task_ids = torch.randint(TASKS, (BATCH,))
        x = torch.randn(BATCH, FEATURES)
        loss = nn.functional.mse_loss(student(x, task_ids=task_ids), target(x, task_ids=task_ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            distances.append(distance(student))
    return distances, error(student, target)


def draw(curves: dict[str, torch.Tensor], every: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, values in curves.items():
        steps, colour = range(0, values.shape[1] * every, every), RATES[label][2]
        axes.plot(steps, values.mean(0), color=colour)
        axes.text(steps[-1], values[:, -1].amax() + 0.01, label, color=colour, ha="right", va="bottom")
        axes.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)
    axes.axhline(1 - 1 / SKILLS, color="grey", linewidth=0.8, linestyle=":")
    axes.text(0, 1 - 1 / SKILLS, f"one skill of {SKILLS}", va="bottom", fontsize=8, color="grey")
    axes.set(xlabel="step", ylabel="distance of the mixing weights from uniform", ylim=(0, 0.8))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements (default: 50)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--plot", type=Path, help="where to draw the curves; needs matplotlib")
    args = parser.parse_args(argv)
    moments = [args.steps // args.every * part // 8 for part in (1, 4, 8)]  # early, half way, at the end
    table = Table(title=f"Distance from uniform, mean of {len(args.seeds)} seed(s)")
    for column in ("learning rates", *(f"step {moment * args.every}" for moment in moments), "error left"):
        table.add_column(column, justify="left" if column == "learning rates" else "right")
    curves = {}
    for label, (lr, router_lr, _) in RATES.items():
        runs = [learn(lr, router_lr, seed, args.steps, args.every) for seed in args.seeds]
        curves[label] = torch.tensor([distances for distances, _ in runs])
        errors = torch.tensor([left for _, left in runs]).mean()
        table.add_row(label, *(f"{curves[label][:, moment].mean():.2f}" for moment in moments), f"{errors:.1%}")
    console.print(table)
    if args.plot:
        draw(curves, args.every, args.plot)
        console.print(f"{args.plot} has the curves; the bands span the seeds.")


if __name__ == "__main__":
    main()
