"""The few-shot example on a tiny BERT: it prints its table, and its parts do what they say, against naive loops."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from tiny import bert_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

from peft_poly import PolyLayer

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["is", "it", "red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "moon", "which", "animal"]
OPTIONS = {"colour": ["red", "blue", "green"], "number": ["one", "two", "three"], "animal": ["cat", "dog"]}
LAYERS, SIZE = 2, 2 * (4 * (16 + 16) + (16 + 32) + (32 + 16))  # in + out of all adapted layers of the tiny BERT
R, K, H = 4, 4, 4  # what train_multitask.py has by default


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder with its tokenizer, and four tasks, one of them without options."""
    root = tmp_path_factory.mktemp("few_shot")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(root / "model")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        root / "model"
    )
    (root / "data").mkdir()
    for task, options in [*OPTIONS.items(), ("free", None)]:
        rows = []
        for i in range(12):
            answer = options[i % len(options)] if options else "red"
            text = f"{answer} {WORDS[i % 14]} {WORDS[(5 * i) % 14]}"
            row = {"task": task, "instruction": f"which {task}", "input": text, "output": answer, "options": options}
            rows.append(json.dumps({**row, "split": ["train", "train", "test"][i % 3]}))
        (root / "data" / f"{task}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def script(monkeypatch, folder):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(folder)
    return importlib.import_module("few_shot")


@pytest.fixture
def run(script):
    args = script.FewShotArguments(model="model", data="data", new_tasks=["animal"], rows=4, steps=2)
    return script.Run(args, script.Arguments(model="model", data="data", output_dir="out", max_steps=2, batch_size=4))


COMMAND = ["--model", "model", "--data", "data", "--new_tasks", "animal", "--max_steps", "2", "--steps", "2"]


def test_the_table_has_a_line_for_each_regime_and_counts_what_learns(script, capsys, monkeypatch):
    monkeypatch.setattr(script.console, "width", 140)
    script.main([*COMMAND, "--rows", "4", "--draws", "2"])
    output = capsys.readouterr().out
    assert "Training on 2 tasks; to come later: animal" in output
    assert "before → after 4 rows; 2 draw(s)" in output
    lines = {line.split("│")[1].strip(): line for line in output.splitlines() if line.startswith("│")}
    sizes = {
        "LoRA from scratch": R * SIZE,
        "router only (MHR-z), row uniform": LAYERS * 6 * H * K,  # one row of each router
        "router only (MHR-z), row of the mean task": LAYERS * 6 * H * K,
        "router only (MHR-z), row of the nearest task": LAYERS * 6 * H * K,
        "all, row of the nearest task": K * R * SIZE + LAYERS * 6 * H * K,
        "average of the skills (MHR-mu)": R * SIZE,
    }
    assert list(lines) == list(sizes)
    for name, size in sizes.items():
        assert f" {size:,} " in lines[name]
        assert lines[name].count("→") == 2  # the task and the mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new_tasks", "shape"], "Unknown tasks ['shape']"),
        (["--new_tasks", "free"], "no options to choose from: free"),
        (["--rows", "99"], "Task 'animal' has 8 training rows, fewer than --rows 99"),
    ],
)
def test_settings_that_cannot_be_met_are_an_error_of_one_line(script, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script.main([*COMMAND, *arguments])
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_the_nearest_task_has_the_smallest_loss_of_all(script, run):
    trained = run.pretrain()
    for layer in trained.modules():
        if isinstance(layer, PolyLayer):
            layer.poly_lora_B["default"].data.normal_()
            layer.poly_router["default"].module_logits.data.normal_(std=3)
    rows = script.rows_of(run.new, "train")
    losses = {}
    for task in run.known:
        batch = script.Collator(run.tokenizer, run.known, 64)([{**row, "task": task} for row in rows])
        losses[task] = trained.eval()(**batch)["loss"].item()
    assert len(set(losses.values())) == 2
    batch = script.Collator(run.tokenizer, [*run.known, "animal"], 64)(rows)
    assert script.nearest_task(trained, batch) == min(losses, key=losses.get)


def test_a_newcomer_that_trains_its_router_row_leaves_the_known_tasks_as_they_were(script, run):
    trained = run.pretrain()
    batch = script.Collator(run.tokenizer, [*run.known, "animal"], 64)(script.rows_of(run.new, "train"))
    known = script.Collator(run.tokenizer, run.known, 64)(script.rows_of(run.known, "train"))
    before = trained.eval()(**known)["logits"]
    ranker = script.meet("train_router_only", "uniform", trained, "animal")
    optimizer = script.create_poly_optimizer(ranker, torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    loss = ranker.eval()(**batch)["loss"].item()
    script.learn(ranker, optimizer, batch, steps=5)
    assert ranker.eval()(**batch)["loss"].item() != loss
    assert torch.equal(ranker(**known)["logits"], before)
    assert trained.encoder.task_names == ["colour", "number"]


def test_learning_lowers_the_loss_on_the_rows(script, run):
    lora = run.from_scratch()
    batch = script.Collator(run.tokenizer, [*run.known, "animal"], 64)(script.rows_of(run.new, "train"))
    before = lora.eval()(**batch)["loss"].item()
    script.learn(lora, torch.optim.AdamW(lora.parameters(), lr=0.05), batch, steps=10)
    assert lora.eval()(**batch)["loss"].item() < before
