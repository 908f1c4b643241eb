"""The benchmarks run and count right: ratios on a clock of the test's own, bytes against sums, tables in place."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, gpu, growth, measuring, models, orders, results, speed  # noqa: E402

TINY = {"rows": 3, "length": 2, "r": 2, "skills": 2, "splits": 2, "tasks": 3}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ratios_are_taken_within_a_round_and_their_median_counts():
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


def test_saved_bytes_are_those_of_the_storages_that_the_graph_holds():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)
    held: list[torch.Tensor] = []

    def function():
        held.append((x @ weight).exp().sum())

    assert measuring.saved_bytes(function, [weight]) == 4 * (x.numel() + 8 * 4)  # x for the product, exp for itself


@pytest.mark.parametrize("mode", ["eval", "train", "saved", "peak", "merged"])
def test_a_case_gives_its_ratios_and_outputs_are_those_of_pefts_poly(mode):
    case = cases.Case(mode, "linear-256", ids="mixed" if mode != "merged" else "one", **TINY)
    row = cases.measure(case, rounds=3, budget=0, variants=cases.variants_of(case))
    assert row["ours/lora"] > 0
    assert row.get("difference", 0) < cases.DIFFERENCE
    assert ("poly/lora" in row) == (mode != "merged")


def test_decoding_gives_the_tokens_of_pefts_poly():
    case = cases.Case("decode", "tiny-64x24", ids="distinct", **TINY)
    assert cases.measure(case, rounds=3, budget=0, variants=cases.variants_of(case))["difference"] == 0


@pytest.mark.parametrize("kind", ["one", "few", "distinct", "mixed"])
def test_batches_have_the_tasks_that_their_name_says(kind):
    ids = models.make_task_ids(kind, 8, 16).tolist()
    assert len(ids) == 8
    assert {"one": 1, "few": 2, "distinct": 8}.get(kind, len(set(ids))) == len(set(ids))


def test_the_program_writes_a_table_a_csv_that_grows_and_a_plot(tmp_path, monkeypatch):
    quick = [cases.Case("eval", "linear-256", **TINY), cases.Case("saved", "linear-256", **TINY)]
    monkeypatch.setattr(cases, "QUICK", quick)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        speed.main(["--quick", "--rounds", "3", "--budget", "0.01", "--results", str(tmp_path), "--docs", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- speed -->\n`python -m benchmarks.speed --quick`")
    assert text.endswith("<!-- /speed -->\nafter\n")
    assert "old" not in text
    assert text.count("linear-256") == 2
    assert text.count("r 2, 2 skills, 2 splits, 3 tasks") == 1  # said once, for all rows have the same
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        assert [row["mode"] for row in csv.DictReader(file)] == ["eval", "saved"] * 2
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table"):
        results.write_table(page, "speed", [], {"command": "", "date": "", "machine": "", "torch": ""})


def test_a_miss_says_by_how_much():
    row = {"mode": "decode", "ours/lora": 0.95, "ours/poly": 0.7, "difference": 0.0}
    assert results.verdict(row) == "miss: ours/lora 0.950 > 0.92"
    assert results.verdict({**row, "ours/lora": 0.9}) == "pass"
    assert "outputs differ" in results.verdict({**row, "difference": 1.0})
    assert results.verdict({"mode": "peak"}) == ""


def test_growing_is_measured(monkeypatch):
    monkeypatch.setitem(models.SHAPES, "t5-small", models.SHAPES["t5-small"].__class__(**_tiny_t5()))
    row = growth.measure(tasks=5, skills=2, splits=1)
    assert row["routers MB"] == pytest.approx(2 * 5 * 2 * 4 / 1e6, rel=0.01)  # two layers, five tasks, two skills
    assert set(row) == set(growth.COLUMNS)


def _tiny_t5():
    import transformers as tf

    config = tf.T5Config(
        vocab_size=models.VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return {"make": lambda: tf.T5ForConditionalGeneration(config), "targets": ("wi",), "task_type": "SEQ_2_SEQ_LM"}


def test_orders_of_computing_agree_and_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(orders, "SIZES", [(2, 4, 4)])
    monkeypatch.setattr(orders, "LAYERS", 2)
    page = tmp_path / "page.md"
    page.write_text("<!-- orders -->\n<!-- /orders -->\n", encoding="utf-8")
    orders.main(["--docs", str(page)])  # checks that outputs of skills mixed are those of mixed pairs
    assert "| 2 | 4 | 4 |" in page.read_text(encoding="utf-8")


def test_the_program_for_a_gpu_runs_on_a_cpu_too(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n", encoding="utf-8")
    sizes = ["--rows", "2", "--length", "4", "--rounds", "3", "--budget", "0", "--docs", str(page)]
    gpu.main(["--device", "cpu", "--tiny", *sizes])
    assert [line.split(" | ")[0] for line in page.read_text(encoding="utf-8").splitlines()[-5:-1]] == [
        "| decode", "| eval", "| train", "| operations of a layer",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU here" in capsys.readouterr().err
