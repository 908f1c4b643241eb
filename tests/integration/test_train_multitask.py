"""The demo script end to end on a tiny BERT: it trains, reports, saves and reloads; its parts against naive loops."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from processes import DEEPSPEED, TORCHRUN, accelerate, launch
from safetensors.torch import load_file
from tiny import bert_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

import peft_poly  # noqa: F401  # registers the method, for the adapter that is loaded here

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [
    "is", "it", "red", "blue", "green", "one", "two", "three", "cat", "dog",
    "sun", "moon", "big", "small", "which", "colour", "what", "pick", "rewrite", "the",
]  # fmt: skip
SIZES = ["--r", "2", "--n_skills", "2", "--n_splits", "2", "--lr", "0.01"]


def rows_of_task(task: str, n: int = 9) -> list[dict]:
    """Rows of one of three kinds: one label set, options of its own in each row, none at all."""
    rows = []
    for i in range(n):
        word, other = WORDS[(3 * i) % 14 + 2], WORDS[(5 * i + 1) % 14 + 2]
        options = {"colour": ["red", "blue", "green"], "pick": sorted({word, other, "the"}), "rewrite": None}[task]
        rows.append(
            {
                "task": task,
                "instruction": f"which {task}",
                "input": f"is {word} {other} {WORDS[i]}",
                "output": options[i % len(options)] if options else word,
                "options": options,
                "split": ["train", "train", "test"][i % 3],
            }
        )
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a tiny encoder with its tokenizer, and of three tasks."""
    root = tmp_path_factory.mktemp("multitask")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(root / "model")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        root / "model"
    )
    (root / "data").mkdir()
    for task in ("colour", "pick", "rewrite"):
        lines = [json.dumps(row) for row in rows_of_task(task)]
        (root / "data" / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def finished(folders):
    """The script, run from another folder than its own: its output, and what it wrote."""
    command = [sys.executable, str(EXAMPLES / "train_multitask.py"), "--model", "model", "--data", "data"]
    command += ["--output_dir", "out", "--max_steps", "2", "--batch_size", "4", "--seeds", "0", "1", *SIZES]
    done = subprocess.run(command, cwd=folders, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return done, json.loads((folders / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def ranking(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("ranking")


@pytest.fixture
def script(ranking):
    return importlib.import_module("train_multitask")


def expected_tests() -> list[dict]:
    return [row for task in ("colour", "pick") for row in rows_of_task(task) if row["split"] == "test"]


def naive_answer(model, tokenizer, row: dict, **call) -> str:
    """The option with the largest cosine, one text at a time, without padding."""

    def embed(text: str) -> torch.Tensor:
        tokens = tokenizer(text, return_tensors="pt")
        return model(tokens["input_ids"], **call).last_hidden_state[0].mean(dim=0)

    text = embed(f"{row['instruction']} {row['input']}")
    cosines = [torch.cosine_similarity(text, embed(option), dim=0).item() for option in row["options"]]
    return row["options"][cosines.index(max(cosines))]


# ------------------------------------------------------------------------------------------------------- the whole run
def test_the_table_has_a_column_per_method_and_a_row_per_task_and_the_mean(finished):
    output = finished[0].stdout
    for text in ("majority", "base", "shared LoRA", "PEFT_POLY", "colour", "pick", "mean", "2 seed(s)"):
        assert text in output


def test_a_task_without_options_is_skipped_and_named(finished):
    done, results = finished
    assert "Skipped, for their rows have no options to choose from: rewrite" in done.stdout
    assert set(results["accuracy"][0]["base"]) == {"colour", "pick", "mean"}


def test_a_progress_bar_is_shown_and_the_rates_are_said(finished):
    done, _ = finished
    assert "2/2" in done.stderr
    assert "learning rate 0.01, routers 0.1" in done.stdout


def test_a_new_process_gives_equal_answers(finished):
    done, results = finished
    assert results["reload_equal"] is True
    assert "in a new process its answers are equal" in done.stdout


def test_the_saved_adapter_gives_the_answers_of_a_naive_loop(folders, finished):
    config = peft.PeftConfig.from_pretrained(folders / "out" / "adapter")
    assert config.task_names == ["colour", "pick"]
    model = peft.PeftModel.from_pretrained(BertModel.from_pretrained(folders / "model"), folders / "out" / "adapter")
    model.eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "model")
    wanted = [naive_answer(model, tokenizer, row, task_ids=row["task"]) for row in expected_tests()]
    assert json.loads((folders / "out" / "reloaded.json").read_text(encoding="utf-8")) == wanted


def test_majority_and_base_are_what_a_naive_loop_counts(folders, finished):
    tests = expected_tests()
    encoder = BertModel.from_pretrained(folders / "model").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "model")
    for task in ("colour", "pick"):
        rows = [row for row in tests if row["task"] == task]
        trained = Counter(row["output"] for row in rows_of_task(task) if row["split"] == "train")
        majority = [sorted(row["options"], key=lambda option: -trained[option])[0] for row in rows]
        base = [naive_answer(encoder, tokenizer, row) for row in rows]
        for method, answers in (("majority", majority), ("base", base)):
            right = sum(answer == row["output"] for answer, row in zip(answers, rows, strict=True))
            assert finished[1]["accuracy"][0][method][task] == pytest.approx(100 * right / len(rows))


def test_the_shared_lora_is_as_large_as_a_whole_rank_allows(finished):
    sizes = finished[1]["sizes"]
    per_rank = 2 * (4 * (16 + 16) + 2 * (16 + 32))  # two layers; query, key, value, output; the two of the MLP
    assert sizes["PEFT_POLY"] == 2 * 2 * per_rank + 12 * 2 * (2 * 2)  # skills of rank 2, and 12 routers of 2 tasks
    assert abs(sizes["PEFT_POLY"] - sizes["shared LoRA"]) <= per_rank / 2


def test_each_seed_has_figures_of_its_own(finished):
    first, second = finished[1]["accuracy"]
    assert first["base"] == second["base"]
    assert finished[1]["arguments"]["seeds"] == [0, 1]


def test_no_temporary_warning_of_the_libraries_reaches_the_user(finished):
    assert "FutureWarning" not in finished[0].stderr


# ------------------------------------------------------------------------------------------------------------ the parts
def test_both_adapters_see_the_same_rows_in_the_same_order(script, folders, tmp_path):
    args = script.parse(["--model", str(folders / "model"), "--output_dir", str(tmp_path), "--max_steps", "3", *SIZES])
    encoder, tokenizer = script.load_encoder(args)
    rows = rows_of_task("colour")
    seen = []

    class Recorder(script.Collator):
        def __call__(self, rows):
            seen.append([row["input"] for row in rows])
            return super().__call__(rows)

    collate = Recorder(tokenizer, ["colour"])
    poly, lora = script.with_poly(encoder, ["colour"], args), script.with_lora(encoder, 1000, args)
    orders = []
    for adapter in (poly, lora):
        script.train(script.Ranker(adapter), lambda m: torch.optim.AdamW(m.parameters()), rows, collate, args, seed=5)
        orders.append(list(seen))
        seen.clear()
    assert len(orders[0]) >= 3
    assert orders[0] == orders[1]


def test_it_compares_as_the_command_does(script, folders, tmp_path, monkeypatch):
    asked = {}

    def compare_methods(data, base, output, settings, say):
        asked.update(data=data, base=base, output=output, settings=settings)
        raise ValueError("stop")

    monkeypatch.setattr(script, "compare_methods", compare_methods)
    words = ["--compare", "--data", "my_tasks", "--model", "my_encoder", "--output_dir", "out", "--seeds", "0", "1"]
    with pytest.raises(SystemExit, match="error: stop"):
        script.main([*words, "--epochs", "3"])
    settings = script.Settings(epochs=3, seeds=2)
    assert asked == {
        "data": Path("my_tasks"), "base": "my_encoder", "output": Path("out/comparison"), "settings": settings,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--compare takes all tasks and all rows"):
        script.main([*words, "--max_rows", "5"])


def test_help_names_every_setting_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "Learning rate of the routers" in output
    assert "python examples/train_multitask.py --data my_tasks" in output


def test_options_that_rows_of_a_task_share_are_embedded_once(ranking, folders):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "model")
    rows = rows_of_task("colour")[:4] + rows_of_task("pick")[:3]
    batch = ranking.Collator(tokenizer, ["colour", "pick"])(rows)
    different = {(row["task"], option) for row in rows for option in row["options"]}
    assert len(batch["options"]["input_ids"]) == len(batch["option_task_ids"]) == len(different)
    assert batch["task_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch["candidates"].shape == (7, 3)
    names = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch["options"]["input_ids"]]
    for row, candidates, label in zip(rows, batch["candidates"].tolist(), batch["labels"].tolist(), strict=True):
        assert [names[n] for n in candidates if n >= 0] == row["options"]
        assert row["options"][label] == row["output"]


def test_options_that_only_fill_up_never_win_and_do_not_change_the_loss(ranking, folders):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "model")
    encoder = peft.get_peft_model(
        BertModel.from_pretrained(folders / "model"), peft.LoraConfig(task_type="FEATURE_EXTRACTION")
    ).eval()
    ranker = ranking.Ranker(encoder, temperature=0.5)
    collate = ranking.Collator(tokenizer, ["colour", "pick"])
    three, two = rows_of_task("colour")[0], {**rows_of_task("colour")[1], "options": ["blue", "green"]}
    both = ranker(**collate([three, two]))
    alone = [ranker(**collate([row]))["loss"] for row in (three, two)]
    assert both["logits"][1, 2] == -torch.inf
    torch.testing.assert_close(both["loss"], (alone[0] + alone[1]) / 2)


def test_held_out_tasks_are_left_out(ranking, folders):
    assert ranking.load_tasks(str(folders / "data"), ["pick"])[1] == ["rewrite"]
    tasks, skipped = ranking.load_tasks(str(folders / "data"), ["pick", "rewrite"])
    assert (list(tasks), skipped) == (["colour"], [])


def test_max_rows_counts_per_task_and_split(ranking, folders):
    tasks, _ = ranking.load_tasks(str(folders / "data"))
    rows = ranking.rows_of(tasks, "train", max_rows=2)
    assert Counter(row["task"] for row in rows) == {"colour": 2, "pick": 2}


def without_split(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "split"}


@pytest.mark.parametrize(
    ("change", "held_out", "message"),
    [
        (without_split, [], r"colour\.jsonl, line 1: the row lacks \['split'\]"),
        (lambda row: {**row, "output": "pink"}, [], r"line 1: 'pink' is not one of \['red', 'blue', 'green'\]"),
        (lambda row: row, ["color"], r"Unknown tasks \['color'\]; .* has \['colour'\]"),
        (lambda row: {**row, "options": None}, [], "No task to rank is left"),
    ],
    ids=["missing key", "answer not an option", "unknown held-out task", "nothing left"],
)
def test_rows_that_cannot_be_used_are_named(ranking, tmp_path, change, held_out, message):
    line = json.dumps(change(rows_of_task("colour")[0]))
    (tmp_path / "colour.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ranking.load_tasks(str(tmp_path), held_out)


def test_a_folder_without_tasks_is_refused(ranking, tmp_path):
    with pytest.raises(ValueError, match="No task to rank is left"):
        ranking.load_tasks(str(tmp_path))


def test_a_task_without_rows_in_a_split_is_named(ranking, folders):
    tasks, _ = ranking.load_tasks(str(folders / "data"))
    with pytest.raises(ValueError, match="no row in the split 'validation': colour, pick"):
        ranking.rows_of(tasks, "validation")


# -------------------------------------------------------------------------------------------------- several processes
ONE_BATCH = ["--model", "model", "--data", "data", "--max_steps", "3", "--batch_size", "4", "--router_noise", "False"]


@pytest.fixture
def one_process(script, folders, monkeypatch):
    """The script in this process, without noise: its results, and the adapter."""
    monkeypatch.chdir(folders)
    monkeypatch.setattr(script, "reloaded_answers", lambda argv, args: None)  # that is tested above
    with pytest.raises(SystemExit):
        script.main([*ONE_BATCH, *SIZES, "--output_dir", "one"])
    return outcome(folders / "one")


def outcome(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize(
    "launcher",
    [
        "ddp",
        pytest.param("torchrun", marks=pytest.mark.slow),
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero2", marks=[pytest.mark.slow, DEEPSPEED, pytest.mark.timeout(700)]),
        pytest.param("zero3", marks=[pytest.mark.slow, DEEPSPEED, pytest.mark.timeout(700)]),
    ],
)
def test_two_processes_come_to_what_one_comes_to(folders, one_process, launcher):
    command = [EXAMPLES / "train_multitask.py", *ONE_BATCH, *SIZES, "--output_dir", folders / launcher]
    command[2], command[4] = folders / "model", folders / "data"
    if launcher not in ("ddp", "torchrun"):
        command.insert(0, Path(__file__).with_name("on_cpus.py"))
    start = [*TORCHRUN, "--"] if launcher == "torchrun" else accelerate(f"{launcher}.yaml")
    output = launch(start, *command, timeout=600)
    assert output.count("in a new process its answers are equal") == 1  # rank 0 alone speaks
    (results, adapter), (wanted, wanted_adapter) = outcome(folders / launcher), one_process
    assert results["accuracy"] == wanted["accuracy"]
    assert results["reload_equal"] is True
    assert adapter.keys() == wanted_adapter.keys()
    for name, tensor in wanted_adapter.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused(script, folders, monkeypatch):
    monkeypatch.setattr(script, "PROCESSES", 3)
    args = script.parse(["--batch_size", "4"])
    with pytest.raises(SystemExit, match="--batch_size 4 cannot be shared by 3 processes"):
        script.train(None, None, [], None, args, seed=0)


def test_processes_that_do_not_find_each_other_are_noticed(script, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PROCESSES", 2)
    args = script.parse(["--batch_size", "4", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2 processes were started, but the Trainer sees 1"):
        script.train(None, None, [], None, args, seed=0)
