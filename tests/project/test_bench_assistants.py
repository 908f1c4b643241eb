"""The benchmark of the assistants: every unit runs on a tiny chat model, goes on after a stop, and is counted right."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no part of the package
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # nor are examples

import assistants
from assistant_data import TRAINED, rows_of

from benchmarks.assistants import __main__ as command
from benchmarks.assistants import report
from benchmarks.assistants.plan import (
    FEW,
    GRID,
    KEPT,
    METHODS,
    OLD_ROWS,
    QUANTISED,
    Plan,
    Result,
    Settings,
    Store,
    Unit,
)
from benchmarks.assistants.runs import Run

TINY = Settings(
    train_rows=2,
    validation_rows=1,
    test_rows=1,
    epochs=1,
    seeds=2,
    shots=(2, 3),
    draws=2,
    few_steps=1,
    few_batch=2,
    rank=6,
)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

NEWER = pytest.mark.transformers_5(reason="passes token types of this tokenizer on to generate")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A tiny Llama that knows bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **sizes))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = fast.pad_token_id, fast.eos_token_id
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def plan(tmp_path) -> Plan:
    return Plan(TINY, Store(tmp_path / "results.csv", TINY.name))


def fill(plan: Plan, exact) -> None:
    """Pretend that every unit has run; `exact` says what its two assistants have right."""
    for unit in plan.units():
        values = [*zip("ab", exact(unit), strict=True), *([("slip", 0.0)] if unit.stage == "kept" else [])]
        plan.store.add(unit, [Result(task, 100.0, value, 7, 1.0, _rows(value)) for task, value in values])


def _rows(exact: float) -> str:
    """Ten letters, of which so many per cent are right."""
    right = round(exact / 10)
    return "1" * right + "0" * (10 - right)


def test_a_plan_has_every_method_seed_way_and_draw_once(plan):
    units = list(plan.units())
    assert len(units) == len(set(units))
    assert [unit.method for unit in units if unit.stage == "all"] == [*METHODS, *METHODS[1:]]
    assert {unit.method for unit in units if unit.stage == "quantised"} == set(QUANTISED)
    few = {(unit.method, unit.shots, unit.draw) for unit in units if unit.stage == "few"}
    assert few == {(way, shots, draw) for way in FEW for shots in (2, 3) for draw in (0, 1)}
    assert {(unit.method, unit.shots) for unit in units if unit.stage == "kept"} == {(way, 3) for way in KEPT}


def test_results_of_other_settings_are_not_taken_for_these(plan):
    fill(plan, lambda unit: (0.0, 100.0))
    assert Plan(TINY, Store(plan.store.path, TINY.name)).left() == []
    other = replace(TINY, epochs=3)
    assert Plan(other, Store(plan.store.path, other.name)).left() == list(Plan(other, plan.store).units())


def test_the_rates_are_those_with_most_validation_rows_right(plan):
    best = {method: grid[-1] for method, grid in GRID.items()}
    fill(plan, lambda unit: (50.0, 60.0 if best.get(unit.method) == unit.rates else 40.0))
    assert {method: plan.rates(method) for method in GRID} == best


def test_without_trials_the_first_rates_are_taken(plan):
    assert plan.rates("MHR") == GRID["MHR"][0]


def test_the_tables_have_means_over_assistants_with_errors_over_seeds_and_draws(plan):
    fill(plan, lambda unit: (20.0 * unit.seed + 10 * unit.draw, 40.0))
    found = {row["method"]: row for row in report.all_table(plan)}
    assert found["MHR"]["exact"] == "25.0 ± 5.0"  # (0 + 40) / 2 and (20 + 40) / 2
    assert found["gates"]["exact, less told"] == "0.0 (0 to 0)"
    low, high = (float(part) for part in found["MHR"]["95 % of draws"].split(" to "))
    assert low < 25 < high
    assert found["base"]["exact"] == "20.0"
    assert report.task_table(plan)[0] | {"base": "0"} == report.task_table(plan)[0]
    assert report.task_table(plan)[0]["MHR"] == "10"
    few = {row["way"]: row for row in report.few_table(plan)}
    assert few["MHR, all"]["3 rows, right"] == "22.5 ± 2.5"
    assert few["MHR, all"]["2 rows, form"] == "100.0 ± 0.0"
    assert few["MHR, all"]["right at 3, less shared LoRA, trained on"] == "0.0 (0 to 0)"
    assert few["shared LoRA, trained on"]["right at 3, less shared LoRA, trained on"] == ""


def test_a_way_to_learn_from_few_rows_is_compared_letter_by_letter(plan):
    fill(plan, lambda unit: (60.0, 60.0) if unit.method == "MHR, all" else (20.0, 40.0))
    (cell,) = (row["right at 3, less shared LoRA, trained on"] for row in report.few_table(plan)
               if row["way"] == "MHR, all")  # fmt: skip
    # of ten letters two assistants: 2 and 2 are right both ways, then 4 to 6 more for one and 2 to 4 for the other
    assert cell.startswith("30.0 (")
    low, high = (float(part) for part in cell[len("30.0 (") : -1].split(" to "))
    assert 0 < low < 30 < high < 60
    first, *others = report.quantised_table(plan)
    assert first["exact, less plain"] == ""
    assert [row["exact, less plain"] for row in others] == ["0.0 (0 to 0)"] * len(QUANTISED)


def test_seeds_that_disagree_make_an_interval_wide_though_all_letters_agree(plan):
    fill(plan, lambda unit: (100.0, 100.0) if unit.method == "MHR" and unit.seed else (0.0, 0.0))
    found = {row["method"]: row for row in report.all_table(plan)}
    mean, drawn = found["MHR"]["exact, less told"].split(" ", 1)
    assert mean == "50.0"
    low, high = (float(part) for part in drawn.strip("()").split(" to "))
    assert low <= 0
    assert high >= 100  # a draw of one seed twice, moved apart as two seeds ask
    assert found["gates"]["exact, less told"] == "0.0 (0 to 0)"


def test_what_the_six_keep_is_compared_with_what_they_had_letter_by_letter(plan):
    fill(plan, lambda unit: (80.0, 60.0))
    seventh, lost = Result("slip", 90.0, 50.0, 7, 1.0, _rows(50.0)), {"a": 80.0, "b": 20.0}
    six = [Result(task, 70.0, exact, 7, 1.0, _rows(exact)) for task, exact in lost.items()]
    plan.store.done[Unit("kept", "MHR, all" + OLD_ROWS, 0, 3)] = [seventh, *six]
    (row,) = (row for row in report.kept_table(plan) if row["way"] == "MHR, all, with rows of the six")
    assert (row["seventh, form"], row["seventh, right"]) == ("90.0", "50.0")
    assert (row["the six, form"], row["the six, right"]) == ("70.0", "50.0")
    assert (row["the six before, form"], row["the six before, right"]) == ("100.0", "70.0")
    # four of ten letters lose one of their two answers
    mean, drawn = row["right, the six less before"].split(" ", 1)
    low, high = (float(part) for part in drawn.strip("()").split(" to "))
    assert mean == "-20.0"
    assert -50 < low < -20 < high <= 0


@NEWER
def test_every_unit_of_a_plan_runs_and_a_second_call_runs_none(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "QUICK", replace(TINY, seeds=1, shots=(2,), draws=1, tune=False))
    skipped = {"quantised"}  # needs a model whose layers are large enough to be worth four bits: below
    monkeypatch.setattr(
        Plan, "units", lambda self, every=Plan.units: (u for u in every(self) if u.stage not in skipped)
    )
    words = ["--quick", "--model", str(chat_model), "--results", str(tmp_path), "--outputs", str(tmp_path / "out")]
    command.main(words)
    with (tmp_path / "assistants.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 * len(METHODS) + len(FEW) + 7 * len(KEPT)
    sizes = {line["method"]: int(line["parameters"]) for line in lines}
    assert sizes["base"] == 0
    assert sizes["gates"] > sizes["shared LoRA"] == sizes["shared LoRA, told"]
    assert sizes["MHR, routers only (-z)"] < sizes["gates, all"]
    before = (tmp_path / "assistants.csv").read_bytes()
    monkeypatch.setattr(command, "Run", None)  # would fail
    command.main(words)
    assert (tmp_path / "assistants.csv").read_bytes() == before


@NEWER
def test_adapters_trained_on_a_quantised_base_are_served_on_either(chat_model, plan, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = Run(plan, chat_model, tmp_path / "out", progress=False)
    for name in QUANTISED:  # trained here, as in a clone that has the results of MHR and not its adapter
        results = run(Unit("quantised", name, 0))
        assert [result.task for result in results] == ["order", "summary", "title", "tags", "desk", "chat"]
    base, _ = run._base(nf4=True)
    assert isinstance(PeftModel.from_pretrained(base, run._adapter("MHR", 0, nf4=True)), PeftModel)
    assert type(base.model.layers[0].mlp.up_proj.get_base_layer()).__name__ == "Linear4bit"
    found = run.served(run._adapter("MHR", 0))
    plain, nf4 = report.served_table(found)
    assert plain["answers equal"] == "6 of 6"
    equal = sum(a == b for a, b in zip(found["plain"][1], found["NF4"][1], strict=True))
    assert nf4["answers equal"] == f"{equal} of 6"
    assert [result.task for result in found["NF4"][0]] == ["order", "summary", "title", "tags", "desk", "chat"]


def test_the_loss_on_the_answers_alone_trains_what_trls_own_does(chat_model, tmp_path, monkeypatch):
    rows = [row for name in TRAINED for row in rows_of([name], "train")[:2]]

    def trained() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, tokenizer = assistants.load(chat_model)
        config = assistants.routed(TRAINED, r=1)
        settings = {"epochs": 2, "lr": 1e-2, "batch_size": 4, "progress": False}
        model = assistants.train(model, tokenizer, rows, config, tmp_path, **settings)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    ours = trained()
    monkeypatch.setattr(assistants, "OnAnswers", trl.SFTTrainer)
    torch.testing.assert_close(ours, trained(), atol=1e-5, rtol=1e-4)
