"""One unit: an adapter is made or loaded, trained with the demo's code, and asked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from assistant_data import LATER, TRAINED, Row, answer_of, rows_of, scores, told
from assistants import answers, load, routed, train
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_poly import PolyConfig

from .plan import FEW, OLD_ROWS, QUANTISED, Plan, Result, Unit

__all__ = ["Run"]


class Run:
    """Runs the units of a plan; trained adapters of all assistants go to `outputs`, for the units that come later."""

    def __init__(self, plan: Plan, model: Path, outputs: Path, progress: bool = True) -> None:
        self.plan, self.model, self.outputs, self.progress = plan, model, outputs, progress

    def __call__(self, unit: Unit) -> list[Result]:
        start = time.perf_counter()
        torch.manual_seed(unit.seed)
        stages = {"tune": self._tune, "all": self._all, "quantised": self._quantised}
        stages |= {"few": self._few, "kept": self._kept}
        model, tokenizer, rows = stages[unit.stage](unit)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if unit.method != "base" else 0
        said = answers(model, tokenizer, rows, tasks=_has_tasks(model))
        return _results(rows, said, trained, round(time.perf_counter() - start, 1))

    def served(self, adapter: Path) -> dict[str, tuple[list[Result], list[str]]]:
        """What an adapter answers to the test letters on the plain and on the NF4 base: scores, and the words."""
        found = {}
        for name, nf4 in (("plain", False), ("NF4", True)):
            base, tokenizer = self._base(nf4)
            # An adapter that is loaded to be trained keeps bitsandbytes at products in float32, on every CPU.
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
            rows = self._rows("MHR", "test", self.plan.settings.test_rows)
            said = answers(model, tokenizer, rows)
            found[name] = _results(rows, said), said
        return found

    def _tune(self, unit: Unit) -> tuple[Any, Any, list[Row]]:
        model, tokenizer = self._trained(unit.method, unit.seed, unit.rates)
        return model, tokenizer, self._rows(unit.method, "validation", self.plan.settings.validation_rows)

    def _all(self, unit: Unit) -> tuple[Any, Any, list[Row]]:
        rows = self._rows(unit.method, "test", self.plan.settings.test_rows)
        if unit.method == "base":
            return (*load(self.model), rows)
        model, tokenizer = self._trained(unit.method, unit.seed, self.plan.rates(unit.method))
        self._keep(model, self._folder(unit.method, unit.seed))
        return model, tokenizer, rows

    def _quantised(self, unit: Unit) -> tuple[Any, Any, list[Row]]:
        trained_on, served_on = QUANTISED[unit.method]
        folder = self._adapter("MHR", unit.seed, nf4=trained_on == "nf4")
        base, tokenizer = self._base(served_on == "nf4")
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        return model, tokenizer, self._rows("MHR", "test", self.plan.settings.test_rows)

    def _few(self, unit: Unit) -> tuple[Any, Any, list[Row]]:
        """The seventh assistant from a few rows; the draws are of other rows and of another start."""
        model, tokenizer = self._seventh(unit, unit.method, [])
        return model, tokenizer, self._rows(FEW[unit.method], "test", self.plan.settings.test_rows, [LATER])

    def _kept(self, unit: Unit) -> tuple[Any, Any, list[Row]]:
        """The seventh and then the six, after the seventh was learnt: alone, or with rows of the six beside it."""
        way = unit.method.removesuffix(OLD_ROWS)
        method, each = FEW[way], -(-unit.shots // len(TRAINED))
        old = self._rows(method, "train", each) if way != unit.method else []
        model, tokenizer = self._seventh(unit, way, old)
        return model, tokenizer, self._rows(method, "test", self.plan.settings.test_rows, [LATER, *TRAINED])

    def _seventh(self, unit: Unit, way: str, others: list[Row]) -> tuple[Any, Any]:
        """What a way makes of the rows of the seventh and of others, which are seen as often as its own."""
        method, settings = FEW[way], self.plan.settings
        base, tokenizer = load(self.model)
        every = self._rows(method, "train", None, [LATER])
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(unit.draw)).tolist()
        rows = [every[n] for n in order[: unit.shots]] + others
        config, rates = None, self.plan.rates(method or "shared LoRA")
        if method is None:
            model, config = base, self._config("shared LoRA", [LATER])
        else:
            model = PeftModel.from_pretrained(base, self._adapter(method, unit.seed), is_trainable=True)
            if isinstance(model.active_peft_config, PolyConfig):
                model.add_tasks([LATER])
            if "only" in way:
                model.train_router_only()
        passes = settings.few_steps * settings.few_batch / unit.shots
        return self._train(model, tokenizer, rows, config, rates, unit.draw, passes, settings.few_batch), tokenizer

    def _adapter(self, method: str, seed: int, nf4: bool = False) -> Path:
        """The folder of an adapter of all assistants; it is trained where only its results are there, as in a clone."""
        folder = self._folder(f"{method} on NF4" if nf4 else method, seed)
        if not folder.exists():
            model, _ = self._trained(method, seed, self.plan.rates(method), nf4)
            self._keep(model, folder)
        return folder

    def _trained(self, method: str, seed: int, rates: tuple[float, float], nf4: bool = False) -> tuple[Any, Any]:
        base, tokenizer = self._base(nf4)
        rows = self._rows(method, "train", self.plan.settings.train_rows)
        config = self._config(method, TRAINED)
        return self._train(base, tokenizer, rows, config, rates, seed, self.plan.settings.epochs), tokenizer

    def _train(
        self,
        model: Any,
        tokenizer: Any,
        rows: list[Row],
        config: PeftConfig | None,
        rates: tuple[float, float],
        seed: int,
        epochs: float,
        batch_size: int = 12,
    ) -> PeftModel:
        how = {"lr": rates[0], "router_lr": rates[1], "epochs": epochs, "batch_size": batch_size, "seed": seed}
        return train(model, tokenizer, rows, config, self.outputs / "trainer", progress=self.progress, **how)

    def _config(self, method: str, assistants: list[str]) -> PeftConfig:
        rank = self.plan.settings.rank
        if method == "MHR":
            return routed(assistants, r=rank // 6)
        where = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
        if method == "gates":
            return PolyConfig(poly_type="gates", r=rank, lora_alpha=rank, task_names=assistants, **where)
        return LoraConfig(r=rank, lora_alpha=rank, **where)

    def _base(self, nf4: bool) -> tuple[Any, Any]:
        model, tokenizer = load(self.model)
        if nf4:
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, quantization_config=how)
        return model, tokenizer

    def _rows(self, method: str | None, split: str, most: int | None, assistants: Sequence[str] = TRAINED) -> list[Row]:
        rows = [row for name in assistants for row in rows_of([name], split)[:most]]
        return [told(row) for row in rows] if method == "shared LoRA, told" else rows

    def _folder(self, method: str, seed: int) -> Path:
        return (
            self.outputs
            / self.plan.settings.name.replace(" ", "-")
            / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
        )

    @staticmethod
    def _keep(model: PeftModel, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, save_embedding_layers=False)


def _results(rows: list[Row], said: list[str], parameters: int = 0, seconds: float = 0) -> list[Result]:
    """By assistant, what is in its form and what is right."""
    right = _right(rows, said)
    return [
        Result(task, one["form"], one["exact"], parameters, seconds, right[task])
        for task, one in scores(rows, said).items()
    ]


def _right(rows: list[Row], said: list[str]) -> dict[str, str]:
    """By assistant, 1 for each row that is answered right to the letter, and 0 for each other."""
    found = dict.fromkeys((row["task"] for row in rows), "")
    for row, answer in zip(rows, said, strict=True):
        found[row["task"]] += str(int(answer == answer_of(row)))
    return found


def _has_tasks(model: Any) -> bool:
    return isinstance(getattr(model, "active_peft_config", None), PolyConfig)
