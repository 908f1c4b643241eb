"""A whole comparison on a tiny encoder: what it writes, how it goes on after a stop, what makes it start anew."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers as tf
from labelled_folder import write_encoder, write_rows, write_tasks
from tiny import bert_config

from peft_poly.compare import Settings, as_numbers, compare_methods, comparison_table, runs, verdict
from peft_poly.compare.comparison import MAJORITY
from peft_poly.compare.learning.methods import METHODS
from peft_poly.compare.plots import save_plot
from peft_poly_cli import main

SHORT = {"epochs": 1, "batch_size": 10, "rates": (0.01, 0.03), "seeds": 2, "blocks": 1}
ALL = len(METHODS) * 3  # two rates at the first seed, one at the second


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, base, tmp_path_factory):
    """A comparison that nobody stopped: its folder, what it said, and what came out."""
    output, said = tmp_path_factory.mktemp("whole"), []
    return output, said, compare_methods(data, base, output, Settings(**SHORT), said.append)


@pytest.fixture
def trained(monkeypatch):
    """The names of the methods that are trained, without the steps that are only timed; `stop` ends a run early."""
    names, train = [], runs.train

    def watched(method, *args, steps, **kwargs):
        if steps != runs.PROBED:
            if len(names) == watched.stop:
                raise KeyboardInterrupt
            names.append(method.name)
        return train(method, *args, steps=steps, **kwargs)

    watched.stop = None
    monkeypatch.setattr(runs, "train", watched)
    return names, watched


def lines(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------------- the whole run
def test_every_method_is_tried_at_every_rate_and_goes_on_with_the_better_one(whole):
    output, _, found = whole
    assert len(lines(output)) == ALL
    for method in METHODS:
        first = {
            line["lr"]: line["found"] for line in lines(output) if (line["method"], line["seed"]) == (method.name, 0)
        }
        assert set(first) == set(SHORT["rates"])
        best = max(first, key=lambda lr: (first[lr]["validation"], -first[lr]["loss"]))
        assert found.rates[method.name] == best
        assert [line["lr"] for line in lines(output) if (line["method"], line["seed"]) == (method.name, 1)] == [best]


def test_it_says_what_the_data_are_and_how_long_it_will_take_before_it_trains(whole):
    _, said, _ = whole
    assert said[0].startswith("3 tasks of 2 to 3 labels; rows: 48 to train, 12 to choose on, 24 to test. 5 steps of 10")
    assert f"{ALL} runs: about" in said[-1]
    assert "seconds on this machine, as it is now" in said[-1]


def test_the_numbers_are_those_of_the_answers(whole):
    output, _, found = whole
    numbers = as_numbers(found)
    chosen = [line for line in lines(output) if line["lr"] == found.rates[line["method"]]]
    for method in METHODS:
        right = [[int(bit) for bit in line["found"]["right"]] for line in chosen if line["method"] == method.name]
        by_task = {}
        for n, row in enumerate(found.tasks.test):
            by_task.setdefault(row.task, []).append(sum(run[n] for run in right) / len(right))
        means = {task: sum(values) / len(values) for task, values in by_task.items()}
        assert numbers["methods"][method.name]["by_task"] == pytest.approx(means)
        assert numbers["methods"][method.name]["accuracy"]["mean"] == pytest.approx(sum(means.values()) / len(means))
    assert numbers["methods"][MAJORITY]["by_task"] == pytest.approx({"count": 3 / 8, "far": 0.5, "near": 0.5})
    assert numbers["verdict"] == verdict(found)


def test_the_table_and_the_picture_have_all_methods(whole, tmp_path):
    found = whole[2]
    cells = list(comparison_table(found).columns[0].cells)
    assert cells == [MAJORITY, *(method.name for method in METHODS)]
    save_plot(found, tmp_path / "new" / "table.svg")
    drawn = (tmp_path / "new" / "table.svg").read_text(encoding="utf-8")
    assert all(name in drawn for name in cells)


# ------------------------------------------------------------------------------------------------------------- goes on
def test_what_is_done_is_not_done_again(whole, data, base, trained):
    output, _, found = whole
    said = []
    again = compare_methods(data, base, output, Settings(**SHORT), said.append)
    assert trained[0] == []
    assert said[-1] == f"All {ALL} runs are in {output / 'runs.jsonl'}."
    assert as_numbers(again) == as_numbers(found)


def test_a_stopped_comparison_goes_on_to_what_an_undisturbed_one_comes_to(whole, data, base, tmp_path, trained):
    names, watched = trained
    watched.stop = done = ALL - len(METHODS) + 1  # the first seed is done, and one run of the second
    with pytest.raises(KeyboardInterrupt):
        compare_methods(data, base, tmp_path, Settings(**SHORT), print)
    with (tmp_path / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"setup": "torn')  # killed while it wrote
    watched.stop, said = None, []
    found = compare_methods(data, base, tmp_path, Settings(**SHORT), said.append)
    assert f"{done} of {ALL} are done already" in said[-1]
    assert len(names) == ALL
    assert as_numbers(found) == as_numbers(whole[2])
    assert len(lines(tmp_path)) == ALL


def test_more_seeds_and_rates_add_runs_and_other_data_or_settings_start_anew(whole, data, base, tmp_path, trained):
    names, watched = trained
    output = whole[0]
    (tmp_path / "runs.jsonl").write_bytes((output / "runs.jsonl").read_bytes())
    compare_methods(data, base, tmp_path, Settings(**{**SHORT, "seeds": 3}), print)
    assert len(names) == len(METHODS)
    other = write_tasks(tmp_path / "data")
    write_rows(other, [{"task": "near", "input": "is big", "output": "red", "split": "test"}], "one_more.jsonl")
    for changed in ({"folder": other}, {"settings": Settings(**{**SHORT, "epochs": 2})}):
        names.clear()
        watched.stop = 1
        call = {"folder": data, "settings": Settings(**SHORT), **changed}
        with pytest.raises(KeyboardInterrupt):
            compare_methods(call["folder"], base, tmp_path, call["settings"], print)
        assert names == [METHODS[0].name]


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"epochs": 0}, "epochs=0"), ({"seeds": -1}, "seeds=-1"), ({"rates": ()}, "rates=0"), ({"rates": (-1,)}, "r.*-1")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"must be positive numbers: {message}"):
        Settings(**settings)


@pytest.mark.transformers_5(reason="makes up no tokenizer where there is none")
def test_a_tokenizer_that_knows_none_of_the_words_is_refused(data, tmp_path):
    torch.manual_seed(0)
    tf.BertModel(bert_config()).save_pretrained(tmp_path)  # transformers makes up a tokenizer without words
    with pytest.raises(ValueError, match=r"tokenizer knows 0 of the \d+ tokens of these texts"):
        compare_methods(data, str(tmp_path), tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def command(data, base, whole, tmp_path, capsys, monkeypatch):
    """Runs `peft-poly compare` on what is done already: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "kept"
    output.mkdir()
    (output / "runs.jsonl").write_bytes((whole[0] / "runs.jsonl").read_bytes())
    verbosity = tf.logging.get_verbosity()

    def call(*args, folder=data):
        words = ["compare", folder, "--base", base, "--output", output, "--epochs", 1, "--rate", 0.01, "--rate", 0.03]
        words += ["--batch-size", 10]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in (*words, "--seeds", 2, "--blocks", 1, *args)])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    yield call
    tf.logging.set_verbosity(verbosity)
    tf.logging.enable_progress_bar()


def test_the_command_prints_the_table_and_the_verdict(command, whole):
    code, out, err = command()
    assert code == 0
    assert all(method.name in out for method in METHODS)
    assert " ".join(out.split()).endswith(verdict(whole[2]))
    assert "3 tasks of 2 to 3 labels" in err


def test_the_command_gives_numbers_and_draws(command, whole, tmp_path):
    code, out, err = command("--json", "--plot", "table.png")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(as_numbers(whole[2])))
    assert (tmp_path / "table.png").stat().st_size > 1000
    code, _, err = command("--plot", "table.png")
    assert (code, "table.png exists. Pass --force" in err) == (2, True)


def test_bad_input_is_told_in_one_line(command, tmp_path):
    write_rows(tmp_path / "bad", [{"task": "near", "input": "is red"}])
    for args, folder, message in (
        ([], {"folder": tmp_path / "bad"}, "rows.jsonl, line 1: the row lacks output, split"),
        (["--plot", "table.doc"], {}, "table.doc must end in one of"),
        (["--blocks", "3"], {}, "The encoder has 2 blocks"),
    ):
        code, out, err = command(*args, **folder)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


def test_a_picture_without_matplotlib_is_refused_before_anything_is_trained(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command("--plot", "table.png")
    assert code == 2
    assert err.splitlines()[-1].endswith("Pictures need matplotlib. Run: pip install matplotlib scipy")


def test_a_run_that_nobody_watches_says_where_it_is_line_by_line(command, tmp_path):
    code, _, err = command("--output", tmp_path / "new", "--epochs", 0.1, "--seeds", 1)
    assert code == 0, err
    assert "  0 %: one shared LoRA, rate 0.01, seed 0" in err
    assert len(lines(tmp_path / "new")) == 2 * len(METHODS)
