"""The benchmarks run and count right: ratios on a clock of the test's own, bytes against sums, tables in place."""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import peft_poly

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    cases,
    distinct,
    figures,
    gpu,
    growth,
    launches,
    measuring,
    models,
    orders,
    results,
    speed,
)
from benchmarks.variants import KINDS, kinds_here  # noqa: E402

TINY = {"model": "linear-256", "rows": 3, "length": 2, "r": 2, "skills": 2, "splits": 2, "tasks": 3, "distinct": 3}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measure(case: cases.Case) -> figures.Figures:
    return figures.measure(case, rounds=3, budget=0, variants=figures.variants_of(case))


class TestMeasuring:
    def test_ratios_are_taken_within_a_round_and_their_median_counts(self):
        now, calls = [0.0], []
        costs = {"one": iter([2.0] * 1000), "other": iter([1.0] * 1000)}

        def tick(name):
            calls.append(name)
            now[0] += next(costs[name])

        times = measuring.paired({name: lambda name=name: tick(name) for name in costs}, 4, 1e9, clock=lambda: now[0])
        assert [len(seconds) for seconds in times.values()] == [4, 4]
        assert measuring.median_ratio(times, "one", "other") == 2.0
        assert calls[-8:] == ["one", "other", "other", "one"] * 2  # forth and back, so that a drift hits both
        assert measuring.median_ratio({"one": [2.0, 9.0, 6.0], "other": [1.0, 1.0, 2.0]}, "one", "other") == 3.0

    def test_saved_bytes_are_those_of_the_storages_that_the_graph_holds(self):
        weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)
        held: list[torch.Tensor] = []

        def function():
            held.append((x @ weight).exp().sum())

        assert measuring.saved_bytes(function, [weight]) == 4 * (x.numel() + 8 * 4)  # x for the product, exp for itself

    @pytest.mark.parametrize(("rows", "count"), [(8, 1), (8, 8), (32, 8), (5, 2)])
    def test_a_batch_has_as_many_tasks_as_it_says_none_beside_its_like(self, rows, count):
        ids = models.make_task_ids(rows, count, 16).tolist()
        assert len(ids) == rows
        assert len(set(ids)) == count
        assert count == 1 or all(one != other for one, other in itertools.pairwise(ids))


class TestVariants:
    def test_a_kind_is_measured_where_the_package_accepts_it(self):
        assert {"poly", "mhr"} <= set(kinds_here()) <= set(KINDS)

    @pytest.mark.parametrize("mode", ["forward", "train", "saved", "peak"])
    def test_a_case_gives_the_cost_of_everyone_over_the_bare_model(self, mode):
        rivals = ("lora", "upstream poly", "upstream mhr", *(("adapters", "merged") if mode == "forward" else ()))
        taken = measure(cases.Case(mode, rivals, **TINY))
        assert set(taken.over) == {"base", *rivals, *kinds_here()}
        assert all(value > 0 for value in taken.over.values())

    def test_those_who_do_the_same_work_give_the_same_outputs(self):
        taken = measure(cases.Case("forward", ("adapters", "upstream poly", "upstream mhr"), **TINY))
        assert 0 <= taken.difference < figures.DIFFERENCE

    def test_decoding_gives_the_tokens_of_those_who_do_the_same_work(self, monkeypatch):
        monkeypatch.setattr(figures, "TOKENS", 4)
        case = cases.Case("decode", ("adapters", "upstream mhr"), **{**TINY, "model": "llama-64x4"})
        assert measure(case).difference == 0

    def test_merging_leaves_the_weights_that_the_others_share_alone(self):
        variants = figures.variants_of(cases.Case("forward", **TINY))
        weight = variants["base"].model.layers[0].weight
        before = weight.clone()
        merged = variants["merged"].model
        assert torch.equal(weight, before)
        assert not torch.equal(merged.base_model.model.layers[0].weight, before)
        assert variants["lora"].model.base_model.model.layers[0].weight is weight

    def test_only_the_loras_in_use_are_loaded(self):
        variants = figures.variants_of(cases.Case("forward", **{**TINY, "tasks": 9}))
        variants.load([4, 8])
        variants.load([8])
        assert set(variants["adapters"].model.peft_config) == {"0", "4", "8"}


class TestBars:
    def test_a_bar_is_held_against_what_was_measured_in_the_same_rounds(self):
        held = cases.bars("poly mhr", lora=1e9, upstream=0.0) + cases.bars("mhr", one_task=1e9)
        taken = measure(cases.Case("forward", ("lora", "upstream poly", "upstream mhr"), held, beside_one=True, **TINY))
        verdicts = {(claim.variant, claim.against): claim.verdict for claim in taken.claims}
        assert verdicts["poly", "lora"] == verdicts["mhr", "lora"] == verdicts["mhr", "one task"] == "hit"
        assert verdicts["poly", "upstream poly"].startswith("miss by ")

    @pytest.mark.parametrize(("measured", "verdict"), [(1.0, "hit"), (1.25, "miss by 0.25"), (None, "to come")])
    def test_a_miss_says_by_how_much_and_what_cannot_be_measured_is_no_hit(self, measured, verdict):
        assert cases.Claim("decode", "mhr", "lora", measured, 1.0).verdict == verdict

    def test_what_this_version_cannot_do_is_said_to_come(self, monkeypatch):
        monkeypatch.setattr(figures, "kinds_here", lambda: ())
        taken = measure(cases.Case("forward", (), cases.bars("gates", lora=1.0), kinds=("gates",), **TINY))
        assert [claim.verdict for claim in taken.claims] == ["to come"]
        assert results.rows_of([taken]) == []

    @pytest.mark.skipif(hasattr(peft_poly.PolyModel, "serving"), reason="there is one")
    def test_serving_is_to_come(self):
        case = cases.Case("forward", ("lora",), cases.bars("poly", lora=0.98), serving=True, **TINY)
        assert [claim.verdict for claim in measure(case).claims] == ["to come"]

    @pytest.mark.skipif(not hasattr(peft_poly.PolyModel, "serving"), reason="this version has none")
    def test_serving_is_measured(self):
        case = cases.Case("forward", ("lora",), cases.bars("poly", lora=1e9), serving=True, **TINY)
        assert [claim.verdict for claim in measure(case).claims] == ["hit"]


class TestPrograms:
    def test_speed_writes_tables_and_a_csv_that_grows(self, tmp_path, monkeypatch):
        quick = [cases.Case(mode, ("lora",), cases.bars("mhr", lora=1e9), **TINY) for mode in ("forward", "saved")]
        monkeypatch.setitem(cases.SETS, "quick", quick)
        page = tmp_path / "page.md"
        places = "\n".join(f"<!-- {name} -->\nold\n<!-- /{name} -->" for name in ("quick", "claims"))
        page.write_text(f"before\n{places}\nafter\n", encoding="utf-8")
        common = ["--quick", "--rounds", "3", "--budget", "0.01", "--results", str(tmp_path), "--docs", str(page)]
        for _ in range(2):
            speed.main([*common, "--models", "linear-256"])
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- quick -->\n`python -m benchmarks.speed --set quick`")
        assert text.endswith("<!-- /claims -->\nafter\n")
        assert "old" not in text
        assert text.count("| forward, linear-256, 3 x 2, 3 of 3 tasks | ") == 2  # a figure, and a bar
        assert text.count("| hit |") == 2
        with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert [line["mode"] for line in lines] == ["forward", "saved"] * 2
        assert all(float(line["mhr"]) > 0 for line in lines)

    def test_a_page_without_a_place_for_the_table_is_refused(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("nothing", encoding="utf-8")
        with pytest.raises(ValueError, match="no place for the table"):
            results.write_table(page, "speed", [], {"command": "", "date": "", "machine": "", "torch": ""}, ["work"])

    def test_the_table_of_launches_is_written(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(launches, "WORK", (launches.DECODE,))
        monkeypatch.setattr(launches, "LIMITS", {(launches.DECODE, "mhr"): 2.0})
        page = tmp_path / "page.md"
        page.write_text("<!-- launches -->\n<!-- /launches -->\n", encoding="utf-8")
        launches.main(["--docs", str(page)])
        assert "| decode, 8 tasks | 4.0 | 80.0 |" in page.read_text(encoding="utf-8")
        assert "hit" in capsys.readouterr().out

    def test_cost_over_distinct_tasks_is_written_and_drawn(self, tmp_path, monkeypatch):
        monkeypatch.setattr(distinct, "WORK", replace(distinct.WORK, **{**TINY, "rows": 3}))
        page = tmp_path / "page.md"
        page.write_text("<!-- distinct -->\n<!-- /distinct -->\n", encoding="utf-8")
        distinct.main(["--rounds", "3", "--budget", "0", "--picture", str(tmp_path / "speed.png"), "--docs", str(page)])
        assert [line.split(" | ")[0] for line in page.read_text(encoding="utf-8").splitlines()[-3:-1]] == ["| 1", "| 3"]
        assert (tmp_path / "speed.png").stat().st_size > 1000

    def test_growing_is_measured(self, monkeypatch):
        monkeypatch.setitem(models.SHAPES, "t5-small", models.SHAPES["t5-small"].__class__(**_tiny_t5()))
        row = growth.measure(tasks=5, skills=2, splits=1)
        assert row["routers MB"] == pytest.approx(2 * 5 * 2 * 4 / 1e6, rel=0.01)  # two layers, five tasks, two skills
        assert set(row) == set(growth.COLUMNS)

    def test_orders_of_computing_agree_and_are_compared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(orders, "SIZES", [(2, 4, 4)])
        monkeypatch.setattr(orders, "LAYERS", 2)
        page = tmp_path / "page.md"
        page.write_text("<!-- orders -->\n<!-- /orders -->\n", encoding="utf-8")
        orders.main(["--docs", str(page)])  # checks that outputs of skills mixed are those of mixed pairs
        assert "| 2 | 4 | 4 |" in page.read_text(encoding="utf-8")

    def test_the_program_for_a_gpu_runs_on_a_cpu_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "DISTINCT", (1, 2, 8))
        monkeypatch.setattr(gpu, "TOKENS", 2)
        page = tmp_path / "page.md"
        page.write_text("<!-- gpu -->\n<!-- /gpu -->\n", encoding="utf-8")
        gpu.main(["--device", "cpu", "--tiny", "--rows", "8", "--length", "2", "--rounds", "3", "--docs", str(page)])
        works = [line.split(" | ")[0] for line in page.read_text(encoding="utf-8").splitlines()]
        for work in ("operators a layer, decode, 8 tasks", "decode, 8 tasks: tokens/s", "train, 2 tasks: tokens/s"):
            assert f"| {work}" in works

    def test_the_program_for_a_gpu_says_what_it_had_no_time_for(self, monkeypatch, capsys):
        monkeypatch.setattr(gpu.launches, "WORK", (launches.DECODE_ONE,))
        gpu.main(["--device", "cpu", "--tiny", "--rows", "8", "--length", "2", "--seconds", "2"])
        assert "left out: 2 seconds are gone" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_without_a_gpu_it_says_so(self, capsys):
        with pytest.raises(SystemExit):
            gpu.main([])
        assert "there is no GPU here" in capsys.readouterr().err


def _tiny_t5():
    import transformers as tf

    config = tf.T5Config(
        vocab_size=models.VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return {"make": lambda: tf.T5ForConditionalGeneration(config), "targets": ("wi",), "task_type": "SEQ_2_SEQ_LM"}
