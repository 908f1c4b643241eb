"""`peft-poly` as a user runs it: results on stdout, one line and exit code 2 on bad input, nothing half written.

What a command writes is compared with a dense merge, with PEFT's LoRA and POLY, and with the numbers of `analysis`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers as tf
from adapters import adapt, poly, spread
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import CASES, MLP, TASKS, bert_config, first, llama, naive_merge

import peft_poly
from peft_poly.insight import analysis
from peft_poly_cli import main

WEIGHTS = "adapter_model.safetensors"
HEAVY = ("torch", "peft", "peft_poly", "transformers", "safetensors", "huggingface_hub", "matplotlib", "scipy")


@pytest.fixture(autouse=True)
def _library_state(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    verbosity = tf.logging.get_verbosity()
    yield
    tf.logging.set_verbosity(verbosity)
    tf.logging.enable_progress_bar()


@pytest.fixture
def run(capsys):
    """Runs a command line: its exit code, stdout and stderr."""

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def done(run):
    """Runs a command line that must succeed: its stdout."""

    def call(*args):
        code, out, err = run(*args)
        assert code == 0, err
        return out

    return call


def save(folder, case="llama", base=None, **settings):
    """A base model and an adapter of three tasks in `folder/base` and `folder/adapter`; the adapted model."""
    base = CASES[case].make() if base is None else base
    base.save_pretrained(folder / "base")
    config = poly(case, **{"n_tasks": None, "task_names": TASKS, "n_splits": 2, **settings})
    model = adapt(base, config)
    model.save_pretrained(folder / "adapter")
    return model


def load(folder):
    """The base model that `save` wrote."""
    return tf.LlamaForCausalLM.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a base model and an adapter, and the model itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    return folder, save(folder)


@pytest.fixture
def adapter(saved):
    return saved[0] / "adapter"


@pytest.fixture
def base(saved):
    return saved[0] / "base"


@pytest.fixture
def model(saved):
    return saved[1]


def give_tokenizer(folder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


class TestHelp:
    def test_it_names_every_command_and_what_it_is_for(self, done):
        for args in (["--help"], ["-h"], []):
            out = done(*args)
            for command in ("inspect", "export", "merge", "convert", "compare"):
                assert f" {command} " in out

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("compare", ["DATA", "--base", "--output", "--rate", "--seeds", "--blocks", "--plot", "--json", "--force"]),
            ("inspect", ["FOLDER_OR_HUB_ID", "--task", "--plot", "--html", "--json", "--force"]),
            ("export", ["FOLDER_OR_HUB_ID", "--base", "--output", "--task", "--force", "--json"]),
            ("merge", ["FOLDER_OR_HUB_ID", "--base", "--task", "--output", "--force", "--safe", "--json"]),
            ("convert", ["SOURCE", "TARGET", "--to", "--set", "--force", "--json"]),
        ],
    )
    def test_a_commands_help_has_its_options_and_an_example(self, done, command, options):
        out = done(command, "--help")
        assert all(option in out for option in options)
        assert f"peft-poly {command} ./" in out

    @pytest.mark.parametrize("command", [[], ["inspect"], ["export"], ["merge"], ["convert"], ["compare"]])
    def test_flags_take_no_value(self, done, command):
        assert "<bool>" not in done(*command, "--help")

    def test_the_version_is_the_packages(self, done):
        assert done("--version").strip() == peft_poly.__version__

    @pytest.mark.parametrize(
        ("args", "environment", "said"),
        [
            (["--help"], {}, "inspect"),
            (["export", "--help"], {}, "--output"),
            (["inspekt"], {}, "inspekt"),
            ([], {"_PEFT_POLY_COMPLETE": "complete_bash", "COMP_WORDS": "peft-poly in", "COMP_CWORD": "1"}, "inspect"),
        ],
        ids=["help", "help of a command", "a mistyped command", "completion"],
    )
    def test_answers_that_need_no_model_load_no_torch(self, args, environment, said):
        code = f"import sys, atexit; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))"
        code += f"; import peft_poly_cli; peft_poly_cli.main({args})"
        env = {**os.environ, **environment}
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        *_, loaded = ran.stdout.splitlines()
        assert loaded == "[]"
        assert said in ran.stdout + ran.stderr


class TestInspect:
    def test_the_tables_say_the_numbers(self, done, adapter, model):
        out, routing = done("inspect", adapter), analysis.read_routing(model)
        assert "PEFT_POLY, 3 task(s), 4 skill(s), 2 split(s), rank 8, 14 router(s)" in out
        rows = [line.split() for line in out.splitlines()]
        for layer, metrics in analysis.layer_metrics(routing).items():
            numbers = (metrics.discreteness, metrics.sparsity, metrics.usage)
            assert [layer, *(f"{x:.3f}" for x in numbers), f"{metrics.effective_skills:.2f}"] in rows
        for task, name in enumerate(TASKS):
            ((other, cosine),) = analysis.nearest_tasks(routing, name, n=1)
            row = next(row for row in rows if row[:2] == [str(task), name])
            assert row[-2:] == [other, f"({cosine:.3f})"]
            assert row[2] == str(analysis.top_skills(routing, name)[0][0])

    @pytest.mark.parametrize("task", ["sst2", "1"])
    def test_one_task_is_shown_layer_by_layer(self, done, adapter, model, task):
        out = done("inspect", adapter, "--task", task)
        assert "Mixing weights of sst2 (id 1)" in out
        rows = [line.split() for line in out.splitlines()]
        for layer, weights in model.routing_weights().items():
            assert [layer, *(f"{w:.2f}" for w in weights[1].double().mean(dim=0).tolist())] in rows

    def test_many_skills_are_shown_by_their_heaviest(self, done, tmp_path):
        save(tmp_path, n_skills=12)
        assert "top skills (weight)" in done("inspect", tmp_path / "adapter", "--task", "rte")

    def test_json_is_all_there_is_on_stdout(self, done, adapter, model):
        numbers, routing = json.loads(done("inspect", adapter, "--json")), analysis.read_routing(model)
        sizes = {key: numbers[key] for key in ("peft_type", "r", "n_tasks", "n_splits", "n_skills", "task_names")}
        assert sizes == {
            "peft_type": "PEFT_POLY", "r": 8, "n_tasks": 3, "n_splits": 2, "n_skills": 4, "task_names": TASKS,
        }  # fmt: skip
        assert numbers["layers"].keys() == set(routing.layers)
        assert numbers["mean"]["usage"] == pytest.approx(analysis.mean_metrics(routing).usage)
        assert torch.tensor(numbers["similarity"]).shape == (3, 3)
        matrix = torch.tensor(numbers["task_skill"], dtype=torch.float64)
        torch.testing.assert_close(matrix, analysis.task_skill_matrix(routing))
        assert "task" not in numbers

    def test_gates_are_shown_by_rank_and_nothing_is_said_of_skills(self, done, tmp_path):
        model = save(tmp_path, poly_type="gates", n_splits=None, r=12)
        routing, adapter = analysis.read_routing(model), tmp_path / "adapter"
        tables, task = done("inspect", adapter), done("inspect", adapter, "--task", "rte")
        assert "PEFT_POLY, 3 task(s), rank 12, 14 router(s)" in tables
        assert "top ranks (gate)" in tables
        assert "Gates of rte (id 0)" in task
        metrics = analysis.mean_metrics(routing)
        numbers = [f"{x:.3f}" for x in (metrics.distance, metrics.between, metrics.negative)]
        rows = [line.split() for line in tables.splitlines()]
        assert ["mean", "of", "14", *numbers, f"{metrics.effective_ranks:.2f}"] in rows
        text = done("inspect", adapter, "--json")
        assert not re.search("skill|mixing|split|probabilit", tables + task + text)
        shown = json.loads(text)
        assert (shown["poly_type"], shown["r"], shown["mean"]) == ("gates", 12, pytest.approx(asdict(metrics)))
        torch.testing.assert_close(
            torch.tensor(shown["task_rank"], dtype=torch.float64), analysis.task_skill_matrix(routing)
        )
        assert shown["effective_ranks"] == pytest.approx(analysis.effective_skills(routing).tolist())

    def test_json_of_one_task_has_its_weights(self, done, adapter, model):
        task = json.loads(done("inspect", adapter, "--task", "boolq", "--json"))["task"]
        assert (task["id"], task["name"]) == (2, "boolq")
        for layer, weights in model.routing_weights().items():
            torch.testing.assert_close(torch.tensor(task["weights"][layer]), weights[2])

    def test_pictures_and_reports_are_written_beside_the_tables(self, run, adapter, tmp_path):
        code, out, err = run("inspect", adapter, "--plot", tmp_path / "a.png", "--html", tmp_path / "a.html", "--json")
        assert (code, len(json.loads(out)["layers"])) == (0, 14)
        assert err.splitlines() == [f"wrote {tmp_path / name}" for name in ("a.png", "a.html")]
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert f"Routing of {adapter}" in (tmp_path / "a.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize("option", ["--plot", "--html"])
    def test_a_file_is_replaced_only_with_force(self, run, done, adapter, tmp_path, option):
        path = tmp_path / ("a.svg" if option == "--plot" else "a.html")
        path.write_text("old")
        code, out, err = run("inspect", adapter, option, path)
        assert (code, out, path.read_text()) == (2, "", "old")
        assert err == f"peft-poly: error: {path} exists. Pass --force to replace it, or choose another name.\n"
        done("inspect", adapter, option, path, "--force")
        assert "<svg" in path.read_text(encoding="utf-8")

    def test_an_adapter_of_pefts_own_poly_is_shown(self, done, tmp_path):
        config = peft.PolyConfig(target_modules=["lin0"], n_tasks=2, n_skills=3, r=2)
        spread(peft.get_peft_model(MLP(), config)).save_pretrained(tmp_path)
        assert ": POLY, 2 task(s), 3 skill(s), 1 split(s), rank 2, 1 router(s)" in done("inspect", tmp_path)

    def test_names_are_text_and_not_markup(self, done, tmp_path):
        save(tmp_path, task_names=["[red]a[/red]", "[/]", "plain"])
        for options in ([], ["--task", "[/]"]):
            out = done("inspect", tmp_path / "adapter", *options)
            assert "[red]a[/red]" in out
            assert "[/]" in out

    def test_of_one_skill_it_says_that_nothing_is_routed(self, done, tmp_path):
        save(tmp_path, "bert", n_skills=1, n_splits=1)
        for options in ([], ["--task", "rte"]):
            out = done("inspect", tmp_path / "adapter", *options)
            assert "There is one skill, so nothing is routed: every task computes the same LoRA." in out
            assert "nearest" not in out
            assert "discreteness" not in out
        assert json.loads(done("inspect", tmp_path / "adapter", "--json"))["n_skills"] == 1

    def test_gates_of_one_rank_are_tables(self, done, tmp_path):
        save(tmp_path, "bert", poly_type="gates", r=1, n_skills=1, n_splits=1)
        assert "nothing is routed" not in done("inspect", tmp_path / "adapter")

    def test_long_tables_end_with_what_was_left_out(self, done, tmp_path):
        save(tmp_path, task_names=[f"task{i}" for i in range(45)])
        out = done("inspect", tmp_path / "adapter")
        assert "task39" in out
        assert "task40" not in out
        assert "... and 5 more" in out

    def test_an_adapter_on_the_hub_is_read_by_a_real_process(self, adapter, tmp_path):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        with HubServer() as hub:
            hub.seed("user/adapter", {path.name: path.read_bytes() for path in adapter.iterdir()})
            env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
            shown = subprocess.run(
                [sys.executable, "-m", "peft_poly", "inspect", "user/adapter", "--json"],
                env=env, capture_output=True, text=True, timeout=250, check=False,
            )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["task_names"] == TASKS


class TestExport:
    def test_one_task_is_a_lora_with_equal_outputs(self, done, adapter, base, model, tmp_path):
        out = done("export", adapter, "--base", base, "--task", "sst2", "--output", tmp_path / "lora")
        assert out.split() == [str(tmp_path / "lora")]
        lora = peft.PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
        assert lora.peft_config["default"].peft_type == "LORA"
        inputs = CASES["llama"].inputs()
        torch.testing.assert_close(lora(**inputs).logits, naive_merge(model, 1)(**inputs).logits, atol=1e-5, rtol=0)

    def test_without_a_task_every_task_is_exported_and_the_serving_line_printed(self, done, adapter, base, tmp_path):
        *folders, empty, line = done("export", adapter, "--base", base, "--output", tmp_path / "all").splitlines()
        assert folders == [str(tmp_path / "all" / name) for name in TASKS]
        assert empty == ""
        assert line.startswith(f"vllm serve {base} --enable-lora")
        assert all(f"{name}={tmp_path / 'all' / name}" in line for name in TASKS)
        assert all((tmp_path / "all" / name / WEIGHTS).exists() for name in TASKS)

    def test_the_base_models_weights_are_not_needed(self, done, adapter, base, model, tmp_path):
        (tmp_path / "config-only").mkdir()
        shutil.copy(base / "config.json", tmp_path / "config-only")
        done("export", adapter, "--base", tmp_path / "config-only", "--task", "rte", "-o", tmp_path / "ours")
        model.export_lora("rte", tmp_path / "theirs")
        ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    @pytest.mark.parametrize("kind", ["safetensors", "bin", "one end"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_embeddings_that_were_saved_with_the_adapter_go_along(self, run, tmp_path, kind, tied):
        base = llama()
        base = tf.LlamaForCausalLM(tf.LlamaConfig.from_dict({**base.config.to_dict(), "tie_word_embeddings": tied}))
        model = save(tmp_path, base=base)
        with torch.no_grad():
            model.get_input_embeddings().weight[-2:].normal_()  # spare rows of the vocabulary, used
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True, safe_serialization=kind != "bin")
        if kind == "bin":
            (tmp_path / "adapter" / WEIGHTS).unlink(missing_ok=True)
        if kind == "one end":
            weights = load_file(tmp_path / "adapter" / WEIGHTS)
            kept = {key: tensor for key, tensor in weights.items() if "lm_head.weight" not in key}
            save_file(kept, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
        words = ["--base", tmp_path / "base", "--task", "1", "-o", tmp_path / "lora"]
        code, _, err = run("export", tmp_path / "adapter", *words)
        assert code == 0
        assert "whole tensor(s) of `modules_to_save` or embeddings" in err
        lora = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "lora").eval()
        ids = torch.arange(base.config.vocab_size - 4, base.config.vocab_size)[None]
        wanted = model.eval()(input_ids=ids, task_ids=1).logits
        torch.testing.assert_close(lora(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("embeddings", [False, "auto"])
    def test_an_adapted_head_is_exported_with_the_base_models_own_weights(self, run, tmp_path, embeddings):
        model = save(tmp_path, base=llama(), n_splits=1, target_modules=["q_proj", "lm_head"])
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
        words = ["--base", tmp_path / "base", "--task", "1", "-o", tmp_path / "lora"]
        assert run("export", tmp_path / "adapter", *words)[0] == 0
        lora = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "lora").eval()
        inputs = CASES["llama"].inputs()
        wanted = model.eval()(**inputs, task_ids=1).logits
        torch.testing.assert_close(lora(**inputs).logits, wanted, atol=1e-5, rtol=0)

    def test_json_says_where_each_task_lies(self, done, adapter, base, tmp_path):
        result = json.loads(done("export", adapter, "--base", base, "-o", tmp_path / "all", "--json"))
        assert result["folders"] == {name: str(tmp_path / "all" / name) for name in TASKS}
        assert result["serve"].startswith("vllm serve ")
        result = json.loads(done("export", adapter, "--base", base, "-o", tmp_path / "1", "--task", "1", "--json"))
        assert result == {"folders": {"sst2": str(tmp_path / "1")}, "serve": None}

    def test_the_base_model_is_the_one_of_the_config_unless_told(self, done, tmp_path, monkeypatch):
        save(tmp_path, base=llama())
        base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        adapt(base, poly("llama", n_tasks=2)).save_pretrained(tmp_path / "adapter")
        done("export", tmp_path / "adapter", "-o", tmp_path / "lora")
        config = json.loads((tmp_path / "lora" / "0" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")

    def test_a_head_that_was_trained_too_comes_along_with_a_warning(self, run, tmp_path):
        model = save(tmp_path, "bert")
        model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
        model.save_pretrained(tmp_path / "adapter")
        args = ["--base", tmp_path / "base", "--task", "boolq", "--output", tmp_path / "lora"]
        code, _, err = run("export", tmp_path / "adapter", *args)
        assert code == 0
        (warning,) = err.splitlines()
        assert warning.startswith("peft-poly: warning: ")
        base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        lora = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        inputs = CASES["bert"].inputs()
        expected = model(**inputs, task_ids="boolq").logits
        torch.testing.assert_close(lora(**inputs).logits, expected, atol=1e-5, rtol=0)


class TestMerge:
    @pytest.mark.parametrize("case", ["t5", "llama", "gpt2", "bert"])
    def test_the_folder_is_a_plain_model_with_the_tasks_outputs(self, done, tmp_path, case):
        model = save(tmp_path, case)
        done("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--task", "sst2", "-o", tmp_path / "merged")
        merged = type(CASES[case].make()).from_pretrained(tmp_path / "merged").eval()
        inputs = CASES[case].inputs()
        expected = first(model(**inputs, task_ids="sst2"))
        torch.testing.assert_close(first(merged(**inputs)), expected, atol=1e-5, rtol=0)

    def test_a_model_whose_adapter_has_no_task_type_keeps_its_class(self, done, tmp_path):
        base = llama()
        base.save_pretrained(tmp_path / "base")
        model = adapt(base, peft_poly.PolyConfig(target_modules=["q_proj"], n_tasks=2, init_weights=False))
        model.save_pretrained(tmp_path / "adapter")
        done("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--task", "1", "-o", tmp_path / "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

    def test_a_head_with_other_labels_than_the_base_models_is_taken_from_the_adapter(self, done, tmp_path):
        model = save(tmp_path, "bert")
        config = bert_config()
        config.num_labels = 2
        tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "two-labels")
        bert = tf.BertModel.from_pretrained(tmp_path / "base")
        headless = tf.BertForSequenceClassification.from_pretrained(tmp_path / "two-labels")
        headless.bert.load_state_dict(bert.state_dict(), strict=False)
        headless.save_pretrained(tmp_path / "two-labels")
        args = ["--base", tmp_path / "two-labels", "--task", "rte", "--output", tmp_path / "merged"]
        done("merge", tmp_path / "adapter", *args)
        merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        inputs = CASES["bert"].inputs()
        expected = model(**inputs, task_ids="rte").logits
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("has_tokenizer", [True, False])
    def test_a_tokenizer_comes_along(self, done, adapter, base, tmp_path, has_tokenizer):
        shutil.copytree(base, tmp_path / "base")
        if has_tokenizer:
            give_tokenizer(tmp_path / "base")
        args = ["--base", tmp_path / "base", "--task", "rte", "--output", tmp_path / "merged", "--json"]
        result = json.loads(done("merge", adapter, *args))
        assert result == {"folder": str(tmp_path / "merged"), "task": "rte", "tokenizer": has_tokenizer}
        assert (tmp_path / "merged" / "tokenizer.json").exists() == has_tokenizer
        if has_tokenizer:
            assert tf.AutoTokenizer.from_pretrained(tmp_path / "merged")("hello")["input_ids"] == [1]

    def test_the_dtype_of_the_base_model_is_kept(self, done, adapter, base, tmp_path):
        tf.LlamaForCausalLM.from_pretrained(base).bfloat16().save_pretrained(tmp_path / "base")
        done("merge", adapter, "--base", tmp_path / "base", "--task", "rte", "-o", tmp_path / "merged")
        tensors = load_file(tmp_path / "merged" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}

    def test_safe_stops_at_a_weight_that_is_not_finite(self, run, base, model, tmp_path):
        tensors = peft.get_peft_model_state_dict(model)
        broken = {key: torch.full_like(t, torch.inf) if "lora_B" in key else t for key, t in tensors.items()}
        model.peft_config["default"].save_pretrained(tmp_path / "adapter")
        torch.save(broken, tmp_path / "adapter" / "adapter_model.bin")
        args = ["merge", tmp_path / "adapter", "--base", base, "--task", "rte", "--output", tmp_path / "merged"]
        code, out, err = run(*args, "--safe")
        assert (code, out) == (2, "")
        assert "is not finite" in err.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class TestConvert:
    def test_there_and_back_the_tensors_are_bit_equal(self, run, done, adapter, tmp_path):
        code, out, err = run("convert", adapter, tmp_path / "poly", "--to", "POLY")
        assert (code, out.split()) == (0, [str(tmp_path / "poly")])
        assert err.startswith("peft-poly: warning: POLY has no task names")
        assert peft.PeftConfig.from_pretrained(tmp_path / "poly").peft_type == "POLY"
        names = f"task_names={json.dumps(TASKS)}"
        done("convert", tmp_path / "poly", tmp_path / "ours", "--to", "PEFT_POLY", "--set", names)
        assert peft.PeftConfig.from_pretrained(tmp_path / "ours").task_names == TASKS
        before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_json_says_what_was_written(self, done, adapter, tmp_path):
        result = json.loads(done("convert", adapter, tmp_path / "out", "--to", "PEFT_POLY", "--json"))
        assert result == {"folder": str(tmp_path / "out"), "peft_type": "PEFT_POLY"}

    def test_a_setting_can_be_text(self, done, adapter, tmp_path):
        done("convert", adapter, tmp_path / "out", "--to", "PEFT_POLY", "--set", "base_model_name_or_path=user/base")
        assert peft.PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == "user/base"

    def test_what_poly_cannot_say_is_refused_with_the_reason(self, run, tmp_path):
        save(tmp_path, lora_alpha=16)
        code, _, err = run("convert", tmp_path / "adapter", tmp_path / "out", "--to", "POLY")
        assert code == 2
        assert "lora_alpha=16" in err


def written(command, adapter, base, target):
    """A command line that writes `target`."""
    if command == "convert":
        return [command, adapter, target, "--to", "PEFT_POLY"]
    task = ["--task", "rte"] if command == "merge" else []
    return [command, adapter, "--base", base, *task, "--output", target]


class TestTargets:
    @pytest.mark.parametrize("command", ["export", "merge", "convert"])
    def test_an_existing_folder_is_replaced_only_with_force(self, run, done, adapter, base, tmp_path, command):
        target = tmp_path / "out"
        target.mkdir()
        (target / "adapter_config.json").write_text("old")
        line = written(command, adapter, base, target)
        code, out, err = run(*line)
        assert (code, out) == (2, "")
        assert f"{target} exists and is not empty" in err
        assert [(path.name, path.read_text()) for path in target.iterdir()] == [("adapter_config.json", "old")]
        done(*line, "--force")
        assert not [path for path in target.rglob("*") if path.is_file() and path.read_bytes() == b"old"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("command", ["export", "merge", "convert"])
    def test_a_failure_leaves_what_was_there(self, run, base, tmp_path, command):
        target = tmp_path / "out"
        target.mkdir()
        (target / "adapter_config.json").write_text("old")
        save(tmp_path)
        (tmp_path / "adapter" / WEIGHTS).write_bytes(b"broken")
        code, _, err = run(*written(command, tmp_path / "adapter", base, target), "--force")
        assert code == 2
        assert err.splitlines()[-1].startswith("peft-poly: error: ")
        assert [(path.name, path.read_text()) for path in target.iterdir()] == [("adapter_config.json", "old")]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


BAD_INPUT = [
    (["inspekt"], "No such command 'inspekt'. Did you mean 'inspect'? See 'peft-poly --help'."),
    (["report", "{adapter}"], "No such command 'report'. Did you mean 'inspect --html'? See 'peft-poly --help'."),
    (["--colour"], "No such option: --colour"),
    (["inspect"], "Missing argument 'FOLDER_OR_HUB_ID'"),
    (["inspect", "nowhere"], "'nowhere' is no folder, and no repository of that id could be had from the Hub"),
    (["inspect", "{adapter}/adapter_config.json"], "json is a file. Name the folder that it is in: {adapter}"),
    (["inspect", "{cut}"], "The adapter_config.json of {cut} cannot be read: it is no JSON ("),
    (
        ["inspect", "{list}"],
        "The adapter_config.json of {list} cannot be read: it is no JSON object with a `peft_type`",
    ),
    (["inspect", "{torn}"], "adapter_model.bin of {torn} cannot be read"),
    (["inspect", "{tmp}"], "There is no adapter_config.json in {tmp}"),
    (["inspect", "{adapter}", "--task", "sst"], "Unknown task 'sst'. Did you mean 'sst2'?"),
    (["inspect", "{adapter}", "--task", "3"], "must lie in [0, 2], got 3"),
    (["inspect", "{adapter}", "--plot", "{tmp}/a.docx"], "a.docx must end in one of"),
    (["inspect", "{adapter}", "--html", "{tmp}"], "{tmp} is a folder"),
    (["inspect", "{adapter}", "--plot", "{file}/a.png"], "{file}/a.png cannot be written (File exists: {file})"),
    (["inspect", "{adapter}", "--html", "/proc/no/a.html"], "a.html cannot be written (No such file or directory"),
    (["export", "{adapter}", "--base", "{base}", "-o", "{file}/out"], "{file}/out cannot be written (Not a directory"),
    (
        ["export", "{adapter}", "--base", "{file}", "-o", "{tmp}/out"],
        "The base model '{file}' cannot be loaded: {file} is",
    ),
    (
        ["export", "{adapter}", "--base", "{wide}", "-o", "{tmp}/out"],
        "{adapter} does not fit the base model: poly_lora_A",
    ),
    (
        ["merge", "{adapter}", "--base", "{wide}", "--task", "rte", "-o", "{tmp}/out"],
        "other sizes than its config.json",
    ),
    (["convert", "{file}", "{tmp}/out", "--to", "POLY"], "{file} is no checkpoint that torch can read"),
    (["export", "{adapter}", "--base", "{base}"], "Missing option '--output'"),
    (["export", "{adapter}", "--output", "{tmp}/out"], "names no base model. Pass --base"),
    (["export", "{adapter}", "--base", "{base}", "--task", "x", "-o", "{tmp}/out"], "Unknown task 'x'"),
    (["export", "{adapter}", "--base", "nowhere", "-o", "{tmp}/out"], "The base model 'nowhere' cannot be loaded"),
    (["export", "{adapter}", "--base", "{adapter}", "-o", "{tmp}/out"], "cannot be loaded"),
    (["export", "{lora}", "--base", "{base}", "-o", "{tmp}/out"], "holds a LORA adapter"),
    (["export", "{mlp}", "--base", "{base}", "-o", "{tmp}/out"], "is of class MLP, which is none of transformers"),
    (["export", "{poly}", "--base", "{base}", "-o", "{tmp}/out"], "peft-poly convert {poly} TARGET --to PEFT_POLY"),
    (["merge", "{adapter}", "--base", "{base}", "--output", "{tmp}/out"], "Missing option '--task'"),
    (["merge", "{adapter}", "--base", "nowhere", "--task", "rte", "-o", "{tmp}/out"], "'nowhere' cannot be loaded"),
    (["merge", "{adapter}", "--base", "{broken}", "--task", "rte", "-o", "{tmp}/out"], "cannot be loaded: Error while"),
    (["merge", "{adapter}", "--base", "{gpt2}", "--task", "rte", "-o", "{tmp}/out"], "arget modules"),
    (["convert", "nowhere", "{tmp}/out", "--to", "POLY"], "'nowhere' is no folder"),
    (["convert", "{lora}", "{tmp}/out", "--to", "POLY"], "holds a LORA adapter"),
    (["convert", "{adapter}", "{tmp}/out"], "Missing option '--to'"),
    (["convert", "{adapter}", "{tmp}/out", "--to", "LORA"], "for '--to': 'LORA' is not one of 'PEFT_POLY', 'POLY'"),
    (["convert", "{adapter}", "{tmp}/out", "--to", "POLY", "--set", "r"], "--set takes NAME=VALUE, got 'r'"),
    (
        ["convert", "{adapter}", "{tmp}/out", "--to", "POLY", "--set", "r=2"],
        "r of a saved adapter cannot be given anew",
    ),
]


@pytest.fixture(scope="module")
def places(saved, tmp_path_factory):
    """Folders of things that are no input for most commands."""
    folder = tmp_path_factory.mktemp("places")
    peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["lin0"])).save_pretrained(folder / "lora")
    peft.get_peft_model(MLP(), peft.PolyConfig(target_modules=["lin0"])).save_pretrained(folder / "poly")
    peft.get_peft_model(MLP(), peft_poly.PolyConfig(target_modules=["lin0"])).save_pretrained(folder / "mlp")
    CASES["gpt2"].make().save_pretrained(folder / "gpt2")
    shutil.copytree(saved[0] / "base", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"broken")
    (folder / "file").write_text("nothing")
    for name, config in (("cut", '{"peft_type": "PEFT_POLY", '), ("list", "[1]")):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(config)
    shutil.copytree(saved[0] / "adapter", folder / "torn", ignore=shutil.ignore_patterns(WEIGHTS))
    (folder / "torn" / "adapter_model.bin").write_bytes(b"\x80\x04torn")
    shutil.copytree(saved[0] / "base", folder / "wide")
    wide = json.loads((folder / "wide" / "config.json").read_text())
    (folder / "wide" / "config.json").write_text(json.dumps(wide | {"hidden_size": 2 * wide["hidden_size"]}))
    names = {path.name: str(path) for path in folder.iterdir()}
    return {**names, "adapter": str(saved[0] / "adapter"), "base": str(saved[0] / "base")}


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "message"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else " ".join(value)
    )
    def test_it_ends_with_one_line_and_code_2(self, run, places, tmp_path, args, message):
        places = {**places, "tmp": str(tmp_path)}
        code, out, err = run(*(arg.format(**places) for arg in args))
        assert (code, out) == (2, "")
        *warned, line = err.splitlines()
        assert all(before.startswith("peft-poly: warning: ") for before in warned)
        assert line.startswith("peft-poly: error: ")
        assert message.format(**places) in line
        assert not list(tmp_path.iterdir())

    def test_a_real_process_ends_so_too(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "peft_poly", "inspect", tmp_path / "nothing"],
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("peft-poly: error: ")
        assert "Traceback" not in done.stderr

    def test_an_interrupt_is_no_error_of_the_input(self, run, adapter, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("peft_poly.cli.commands.read_routing", interrupt)
        code, out, err = run("inspect", adapter)
        assert (code, out) == (130, "")
        assert "Traceback" not in err

    def test_a_missing_extra_says_what_to_install(self, run, adapter, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        code, _, err = run("inspect", adapter, "--plot", tmp_path / "a.png")
        assert (code, err) == (2, "peft-poly: error: Pictures need matplotlib. Run: pip install matplotlib scipy\n")


GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "command-line.md"


class TestGuide:
    @pytest.fixture(autouse=True)
    def _beside_what_its_python_saves(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
        exec(code, {})

    def test_its_commands_run_as_they_stand(self, done, tmp_path):
        blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("peft-poly ")]
        assert {line.split()[1] for line in lines} == {"inspect", "export", "merge", "convert"}
        for line in lines:
            done(*shlex.split(line)[1:])
        assert {path.name for path in tmp_path.iterdir()} >= {"rte-lora", "loras", "merged", "for-peft", "routing.html"}

    def test_its_error_is_the_one_that_is_printed(self, run):
        command, error = re.findall(r"```text\n\$ peft-poly (.*?)\n(.*?)\n```", GUIDE.read_text(encoding="utf-8"))[0]
        assert run(*shlex.split(command)) == (2, "", f"{error}\n")

    def test_it_names_the_keys_of_the_json(self, done, adapter):
        text = GUIDE.read_text(encoding="utf-8")
        assert not [
            key for key in json.loads(done("inspect", adapter, "--json", "--task", "0")) if f"`{key}`" not in text
        ]
