"""Tasks with different labels on one encoder: a head for each task, beside a model for each task.

    python examples/different_labels.py                     # texts, then tags: some minutes on two cores
    python examples/different_labels.py --mode tags --epochs 4

Texts: sentiment (two labels), topic (four), stars (a number) and genres (several at once). Tags: entities, times and
orders, a label for each word. One adapter learns all tasks of a mode from mixed batches with the stock `Trainer`;
beside it stands a LoRA of the same rank for each task alone, which sees the same rows as often. A table compares them
on rows that neither has seen, and the script shows what a pipeline and an exported LoRA say. Stars are told as so many
above or below 3.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from train_multitask import minilm_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from peft_poly import DataCollatorWithTaskIds, PerTaskMetrics, PolyConfig, create_poly_optimizer
from peft_poly.training import TaskPrediction

DATA = Path(__file__).parent / "data" / "labels"
LESS = 0.3  # several labels at once share one row's loss, so each pulls at the shared layers less than a class does
CENTRE = 3.0  # stars are learned as so many above or below: numbers far from 0 drown the other tasks at the start
TEXTS = {
    "sentiment": {"labels": ["negative", "positive"], "weights": [LESS] * 2},
    "topic": {"labels": ["sport", "economy", "science", "politics"], "weights": [LESS] * 4},
    "stars": {"labels": 1, "weights": [LESS]},
    "genres": {"labels": ["comedy", "romance", "war", "science fiction", "crime"], "kind": "multi_label"},
}
TAGS = {"entities": ["O", "PER", "LOC", "ORG"], "times": ["O", "DATE", "TIME"], "orders": ["O", "COUNT", "ITEM"]}
MODES = {
    "texts": ("SEQ_CLS", AutoModelForSequenceClassification, TEXTS),
    "tags": ("TOKEN_CLS", AutoModelForTokenClassification, TAGS),
}
console = Console(width=110, highlight=False)


def load_rows(tasks: list[str], split: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of the tasks, as tokens; a label for each word stands on the word's first token."""
    rows = []
    for task in tasks:
        lines = (DATA / f"{task}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        for row in filter(lambda row: row["split"] == split, map(json.loads, lines)):
            if "tags" in row:
                encoded = tokenizer(row["tokens"], is_split_into_words=True)
                words = encoded.word_ids()
                first = [
                    word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
                ]
                labels = [row["tags"][word] if is_first else -100 for word, is_first in zip(words, first, strict=True)]
            else:
                encoded = tokenizer(row["text"])
                labels = row["label"] - CENTRE if task == "stars" else row["label"]
            rows.append({**encoded, "labels": labels, "task": task})
    return rows


def measure(prediction: TaskPrediction) -> dict[str, float]:
    """Accuracy of classes, mean absolute error of numbers, F1 of several labels and of tags other than O."""
    logits, truth = prediction.predictions, prediction.label_ids
    if prediction.labels.kind == "regression":
        return {"error": float(np.abs(logits[..., 0] - truth).mean())}
    if prediction.labels.kind == "multi_label":
        return {"f1": f1(logits > 0, truth > 0)}
    if logits.ndim == 3:
        known, found = truth != -100, logits.argmax(-1)[..., None] == np.arange(1, logits.shape[-1])
        return {"f1": f1(found[known], (truth[..., None] == np.arange(1, logits.shape[-1]))[known])}
    return {"accuracy": float((logits.argmax(-1) == truth).mean())}


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """Twice the hits by all that was found and all that is there."""
    return float(2 * (found & true).sum() / max(1, found.sum() + true.sum()))


def train(model: PeftModel, rows: list, test: list, steps: int, args: argparse.Namespace, labels: dict) -> dict:
    """The stock Trainer; returns the metrics by task."""
    tokens = model.peft_config["default"].task_type == "TOKEN_CLS"
    pad = (DataCollatorForTokenClassification if tokens else DataCollatorWithPadding)(args.tokenizer)
    metrics = PerTaskMetrics(measure, list(labels))
    settings = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        warmup_steps=steps // 10,
        seed=args.seed,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=args.lr, weight_decay=0.0)
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        eval_dataset=test,
        data_collator=DataCollatorWithTaskIds(pad, list(labels)),
        compute_metrics=metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    trainer.evaluate()
    return metrics.table


def alone(auto: Any, task_type: str, task: str, labels: dict, steps: int, args: argparse.Namespace) -> tuple[dict, int]:
    """A model for one task: the same adapter with one skill, which is a LoRA, and one head."""
    set_seed(args.seed)
    config = PolyConfig(
        task_type=task_type, r=24, n_skills=1, lora_alpha=24, target_modules="all-linear",
        task_labels={task: labels[task]},
    )  # fmt: skip
    model = get_peft_model(auto.from_pretrained(args.model), config)
    rows, test = (load_rows([task], split, args.tokenizer) for split in ("train", "test"))
    return train(model, rows, test, steps, args, {task: labels[task]})[task], n_trainable(model)


def n_trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter on all tasks of a mode, and a model for each; print the table, and what comes out."""
    task_type, auto, labels = MODES[mode]
    rows, test = (load_rows(list(labels), split, args.tokenizer) for split in ("train", "test"))
    steps = max(1, round(args.epochs * len(rows) / args.batch_size))
    console.rule(f"{mode}: {', '.join(labels)}")

    set_seed(args.seed)
    config = PolyConfig.recommended(
        task_type=task_type, poly_type="gates", target_modules="all-linear", task_labels=labels
    )
    model = get_peft_model(auto.from_pretrained(args.model), config)
    together, size = train(model, rows, test, steps, args, labels), n_trainable(model)
    share = max(1, round(steps / len(labels)))
    single = {task: alone(auto, task_type, task, labels, share, args) for task in labels}

    table = Table(
        "task", "labels", "metric", "one model, a head per task", "a model per task", title=f"{mode}, test rows"
    )
    for task in labels:
        for metric, value in together[task].items():
            said = "mean absolute error" if metric == "error" else metric
            table.add_row(task, str(config.labels[task]), said, f"{value:.2f}", f"{single[task][0][metric]:.2f}")
    sizes = sum(parameters for _, parameters in single.values())
    table.add_section()
    table.add_row("parameters to train and keep", "", "", f"{size:,}", f"{sizes:,}")
    console.print(table)
    return {"model": model.eval(), "together": together, "single": {task: found for task, (found, _) in single.items()}}


def show_texts(model: PeftModel, args: argparse.Namespace) -> None:
    """What a pipeline says, with the adapter and merged, and what an exported LoRA says under PEFT alone."""
    text = "In the old mill the staff were helpful, and breakfast was superb."
    classify = pipeline("text-classification", model=model, tokenizer=args.tokenizer)
    for task in TEXTS:
        console.print(f"pipeline, task_ids={task!r}:", classify(text, task_ids=task)[0])
    folder = model.export_lora("topic", Path(args.output_dir) / "topic", overwrite=True)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    console.print(f"\n{folder}/README.md opens it with PEFT alone:\n\n{code}", markup=False)
    check = (
        f"{code.replace('...', str(folder), 1)}\nimport sys, json\nfrom transformers import AutoTokenizer, pipeline\n"
        f"tokenizer = AutoTokenizer.from_pretrained({args.model!r})\n"
        'answer = pipeline("text-classification", model=model, tokenizer=tokenizer)(sys.argv[1])[0]\n'
        "assert 'peft_poly' not in sys.modules\nprint(json.dumps(answer))"
    )
    child = subprocess.run([sys.executable, "-c", check, text], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"The exported LoRA could not be opened:\n{child.stderr}")
    console.print("PEFT alone, in a new process:", json.loads(child.stdout.splitlines()[-1]))
    model.save_pretrained(Path(args.output_dir) / "adapter", save_embedding_layers=False)
    merged = model.merge_and_unload(task="topic")
    answer = pipeline("text-classification", model=merged, tokenizer=args.tokenizer)(text)[0]
    console.print("merged:", answer, merged.config.id2label)


def show_tags(model: PeftModel, args: argparse.Namespace) -> None:
    """What a pipeline says of one sentence in each task."""
    text = "On Monday Elena Petrova ordered fifteen coffee mugs from Falcon Systems ."
    tag = pipeline("token-classification", model=model, tokenizer=args.tokenizer, aggregation_strategy="simple")
    for task in TAGS:
        found = [
            f"{part['word']} ({part['entity_group']})"
            for part in tag(text, task_ids=task)
            if part["entity_group"] != "O"
        ]
        console.print(f"pipeline, task_ids={task!r}:", ", ".join(found))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mode", choices=["both", *MODES], default="both", help="what to train (default: both)")
    add("--model", help="folder or Hub id of an encoder (default: MiniLM, from a package)")
    add("--epochs", type=float, default=8, help="passes over the rows (default: 8)")
    add("--batch_size", type=int, default=16, help="rows of a step (default: 16)")
    add("--lr", type=float, default=3e-3, help="learning rate of the LoRA and the heads (default: 3e-3)")
    add("--seed", type=int, default=0, help="seed (default: 0)")
    add("--output_dir", default="outputs/different_labels", help="where adapters and figures go")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    start = time.time()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not the user's
    args = parse(argv)
    args.model = args.model or minilm_folder()
    args.tokenizer = AutoTokenizer.from_pretrained(args.model)
    results = {}
    for mode in MODES if args.mode == "both" else [args.mode]:
        found = run(mode, args)
        model = found.pop("model")
        results[mode] = found
        (show_texts if mode == "texts" else show_tags)(model, args)
    path = Path(args.output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"\n{path} has the figures. {time.time() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main()
