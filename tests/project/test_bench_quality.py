"""The quality benchmark: units run and go on after a kill, budgets are equal, figures are what a naive count says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are no part of the package

from benchmarks.quality import __main__ as command
from benchmarks.quality import lines, report, routing, workers
from benchmarks.quality.data import Row, batches, chance, draw, families, load_tasks
from benchmarks.quality.encoder import Upper, load_features
from benchmarks.quality.lines import FEW, FEW_REFERENCES, MANY, REFERENCES
from benchmarks.quality.methods import Method, build
from benchmarks.quality.plan import Plan
from benchmarks.quality.ranker import TEMPERATURE, scores
from benchmarks.quality.rates import Rates
from benchmarks.quality.runs import Run, Source
from benchmarks.quality.settings import Settings
from benchmarks.quality.statistics import against_chance, clusters, compare, kinship, mean_and_error, rand_index
from benchmarks.quality.store import Result, Store, Unit

pytestmark = pytest.mark.transformers_5(reason="has other blocks of BERT than the benchmarks run by hand")

THINGS = ["red", "blue", "green", "cat", "dog", "bird", "one", "two", "three"]
WORDS = [*THINGS, "which", "colour", "animal", "number", "it", "is", "the"]
TASKS = {
    "thing_colour": ("which colour is it", ["red", "blue", "green"]),
    "thing_animal": ("which animal is it", ["cat", "dog", "bird"]),
    "count": ("which number is it", ["one", "two"]),
    "later": ("is it", ["cat", "red two"]),
}
TINY = Settings(
    upper_layers=2,
    train_rows=8,
    validation_rows=3,
    test_rows=3,
    steps=3,
    tune_steps=2,
    tasks_per_step=2,
    rows_per_task=2,
    seeds=(0, 1),
    few_steps=2,
    few_batch=2,
    shots=(2, 3),
    draws=1,
)


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    for task, (instruction, options) in TASKS.items():
        with (folder / f"{task}.jsonl").open("w", encoding="utf-8") as file:
            for split, number in (("train", 12), ("validation", 3), ("test", 5)):
                for n in range(number):
                    row = {
                        "task": task,
                        "category": "x",
                        "instruction": instruction,
                        "input": f"the {WORDS[n]} {split}",
                    }
                    row |= {"output": options[n % len(options)], "options": options, "split": split}
                    file.write(json.dumps(row) + "\n")
    (folder / "free.jsonl").write_text(
        json.dumps({"task": "free", "instruction": "x", "input": "y", "output": "z", "options": None, "split": "train"})
    )
    return folder


def write_encoder(folder: Path) -> Path:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS, "train", "validation", "test"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("quality")
    data, model = write_tasks(folder / "data"), write_encoder(folder / "model")
    return Source(data, ("later",), str(model), folder / "outputs", TINY)


@pytest.fixture(scope="module")
def run(source) -> Run:
    return Run(source)


def finish(plan: Plan, run: Run, most: int = 10**9) -> int:
    """Carry out what the plan lacks, in this process; how many units that were."""
    for number in range(most):
        unit = plan.next()
        if unit is None:
            return number
        plan.store.add(unit, run.carry_out(unit))
    return most


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Plan:
    plan = Plan(TINY, run.setup, Store(tmp_path_factory.mktemp("results") / "quality.csv"))
    finish(plan, run)
    return plan


class TestData:
    def test_tasks_without_options_are_left_out_and_named(self, run):
        assert run.tasks.skipped == ["free"]
        assert list(run.tasks.known) == ["count", "thing_animal", "thing_colour"]
        assert list(run.tasks.held_out) == ["later"]

    def test_without_instructions_the_same_rows_have_their_input_alone(self, run):
        bare = run.material(lines.BARE_REFERENCE)
        for task, rows in run.tasks.known.items():
            instruction = TASKS[task][0]
            assert [f"{instruction} {row.text}" for row in bare.tasks.known[task]] == [row.text for row in rows]
            assert [row.label for row in bare.tasks.known[task]] == [row.label for row in rows]
        assert len(bare.features.upper.layer) == TINY.upper_layers

    def test_a_line_that_is_no_json_is_an_error_that_names_it(self, tmp_path):
        folder = write_tasks(tmp_path / "data")
        with (folder / "count.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"task": "count", \n')
        with pytest.raises(ValueError, match=r"count.jsonl, line 21: this is no JSON"):
            load_tasks(folder, ())

    def test_chance_is_the_commonest_answer_or_a_guess(self):
        labels = [Row("t", "x", ("yes", "no"), label, "test") for label in (0, 0, 0, 1)]
        turned = Row("t", "x", ("no", "yes"), 1, "test")
        assert chance([*labels, turned]) == 80
        assert chance([Row("t", "x", ("a", "b"), 0, "test"), Row("t", "x", ("c", "d", "e", "f"), 0, "test")]) == 37.5

    def test_a_folder_without_tasks_is_an_error(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ValueError, match=f"{folder.name} is no folder with"):
                load_tasks(folder)

    def test_an_unknown_held_out_task_is_an_error(self, source):
        with pytest.raises(ValueError, match=r"Held-out tasks \['nothing'\] are not in"):
            load_tasks(source.data, ["nothing"])

    def test_an_answer_that_is_no_option_is_an_error(self, tmp_path):
        row = {"task": "t", "instruction": "", "input": "", "output": "c", "options": ["a", "b"], "split": "train"}
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=r"t.jsonl, line 1: 'c' is not one of \['a', 'b'\]"):
            load_tasks(tmp_path, [])

    def test_a_task_without_a_split_is_an_error(self, tmp_path):
        row = {"task": "t", "instruction": "", "input": "", "output": "a", "options": ["a", "b"], "split": "train"}
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=r"no row in a split: t \(validation\), t \(test\)"):
            load_tasks(tmp_path, [])

    def test_every_method_sees_the_same_batches_and_every_task_equally_often(self, run):
        first, again = (list(batches(run.tasks, 30, 2, 2, seed=5)) for _ in range(2))
        assert first == again
        assert first != list(batches(run.tasks, 30, 2, 2, seed=6))
        seen = [row.task for rows in first for row in rows]
        assert {seen.count(task) for task in run.tasks.known} == {40}
        assert all(row.split == "train" for rows in first for row in rows)

    def test_a_draw_is_the_same_for_every_method_and_differs_from_the_next(self, run):
        assert draw(run.tasks, "later", 3, 0) == draw(run.tasks, "later", 3, 0)
        assert draw(run.tasks, "later", 3, 0) != draw(run.tasks, "later", 3, 1)
        with pytest.raises(ValueError, match="has 8 training rows, fewer than the 9 to draw"):
            draw(run.tasks, "later", 9, 0)

    def test_a_family_is_what_two_names_begin_with(self):
        assert families(["clinc_home", "clinc_work", "piqa", "e2e_x"]) == {"clinc_home": "clinc", "clinc_work": "clinc"}


class TestEncoder:
    def test_the_two_halves_together_are_the_whole_encoder(self, run, source):
        model = BertModel.from_pretrained(source.model).eval()
        texts = ["which colour is it the red train", "cat", "red two"]
        vocabulary = PreTrainedTokenizerFast.from_pretrained(source.model)
        for places, hidden, mask in run.features.chunks([run.features.index[text] for text in texts]):
            upper = run.features.upper(hidden, mask)
            for row, place in enumerate(places):
                with torch.no_grad():
                    whole = model(**vocabulary(texts[place], return_tensors="pt")).last_hidden_state[0]
                assert torch.allclose(upper[row, mask[row]], whole, atol=5e-3)  # the file is in half precision

    def test_lines_of_all_layers_adapt_every_layer_above_the_embeddings(self, run, source):
        features, whole = run.material(lines.DEEP_REFERENCE).features, BertModel.from_pretrained(source.model).eval()
        assert len(features.upper.layer) == 3
        assert run.material(lines.REFERENCE).features is run.features
        (_, hidden, mask), *_ = features.chunks([0])
        tokens = PreTrainedTokenizerFast.from_pretrained(source.model)(next(iter(features.index)), return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(hidden, whole.embeddings(tokens["input_ids"]), atol=5e-3, rtol=0)  # float16
            found = features.upper.eval()(hidden, mask)
            torch.testing.assert_close(found, whole(tokens["input_ids"]).last_hidden_state, atol=1e-2, rtol=0)
        adapter = build(MANY[lines.DEEP_REFERENCE].method, 1.0, features.upper, list(run.tasks.known), 0)
        assert len([name for name, _ in adapter.model.named_parameters() if "query.lora_A" in name]) == 3

    def test_more_upper_layers_than_there_are_is_an_error(self, source, tmp_path):
        with pytest.raises(ValueError, match=r"must lie in \[1, 3\], the layers of the encoder, or be 0, got 4"):
            load_features(["cat"], tmp_path, source.model, n_upper=4)

    def test_scores_are_cosines_whatever_shares_the_batch(self, run):
        adapter = build(Method("none"), 1.0, run.features.upper, list(run.tasks.known), 0)
        rows = [run.tasks.known[task][n] for task in ("count", "thing_colour") for n in (0, 1)]
        together, labels = scores(adapter.encode, run.features, rows, adapter.task_id)
        assert labels.tolist() == [row.label for row in rows]
        for row, values in zip(rows, together, strict=True):
            vectors = []
            for text in (row.text, *row.options):
                ((_, hidden, mask),) = run.features.chunks([run.features.index[text]])
                vectors.append(run.features.upper(hidden, mask)[0].mean(0))
            naive = [torch.cosine_similarity(vectors[0], vector, dim=0) / TEMPERATURE for vector in vectors[1:]]
            assert torch.allclose(values[: len(naive)], torch.stack(naive), atol=1e-4)
            assert torch.isinf(values[len(naive) :]).all()


class TestMethods:
    def test_budgets_are_equal_as_nearly_as_ranks_allow(self):
        layer = BertModel(BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=1)).encoder.layer
        names = [f"task {n}" for n in range(27)]
        sizes = {line: build(MANY[line].method, 1.0, Upper(layer), names, 0).n_trainable for line in MANY}
        reference = sizes[lines.REFERENCE]
        for line, size in sizes.items():
            if line not in lines.OTHER_SIZES:
                assert abs(size / reference - 1) < 0.09, line

    def test_a_lora_per_task_is_that(self, run):
        names = list(run.tasks.known)
        adapter = build(Method("per task"), 2.0, run.features.upper, names, 0)
        for name, parameter in adapter.model.named_parameters():
            if "poly_lora_B" in name:
                torch.nn.init.normal_(parameter)
        r = adapter.model.peft_config["default"].r
        for number, name in enumerate(names):
            lora = build(Method("lora", r=r), 2.0, run.features.upper, names, 0)
            skills = dict(adapter.model.named_modules())
            for key, module in lora.model.named_modules():
                if isinstance(module, peft.tuners.lora.Linear):
                    module.lora_A["default"].weight.data = skills[key].poly_lora_A["default"][0, number].T.clone()
                    module.lora_B["default"].weight.data = skills[key].poly_lora_B["default"][0, number].T.clone()
            rows, outputs, gradients = run.tasks.rows(name, "train"), [], []
            for one in (adapter, lora):
                one.model.zero_grad()
                values, labels = scores(one.encode, run.features, rows, one.task_id)
                torch.nn.functional.cross_entropy(values, labels).backward()
                outputs.append(values.detach())
                found = {n: p.grad for n, p in one.model.named_parameters() if "lora_B" in n and p.grad is not None}
                gradients.append([g[0, number] if one is adapter else g.T for g in found.values()])
            assert torch.allclose(*outputs, atol=1e-4)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))

    def test_pefts_own_poly_runs_beside_ours_with_equal_outputs(self, run):
        names, rows = list(run.tasks.known), run.tasks.rows("count", "train")
        method = Method("peft poly", splits=2)
        theirs = build(method, 0.0, run.features.upper, names, 0)
        ours = build(dataclasses.replace(method, kind="poly"), 1 / method.r, run.features.upper, names, 0)
        for adapter in (theirs, ours):
            adapter.model.eval()
        torch.manual_seed(1)
        state = {name: torch.randn_like(p) for name, p in theirs.model.named_parameters() if p.requires_grad}
        values = []
        for adapter in (theirs, ours):
            adapter.model.load_state_dict(state, strict=False)
            values.append(scores(adapter.encode, run.features, rows, adapter.task_id)[0])
        assert torch.allclose(*values, atol=1e-3)

    def test_one_rate_and_two_rates_reach_the_optimizer(self, run):
        adapter = build(Method("poly"), 1.0, run.features.upper, list(run.tasks.known), 0)
        for rates, expected in ((Rates(1e-3, 0.1, 1), [1e-3, 0.1]), (Rates(1e-3, 0, 1), [1e-3, 1e-3])):
            assert [group["lr"] for group in adapter.optimizer(rates).param_groups] == expected


class TestRunning:
    def test_every_unit_runs_and_has_a_row_for_each_task(self, finished):
        assert finished.done() == len(finished.slots)
        for unit, results in finished.store.done.items():
            assert len(results) == (1 if unit.stage.endswith("few") else 3)
            assert all(0 <= result.accuracy <= 100 and math.isfinite(result.loss) for result in results)

    def test_all_methods_of_a_seed_come_before_the_next_seed(self, finished):
        done = list(finished.store.done)
        tables = {table: [u for u in done if u.stage == "many" and MANY[u.line].table == table] for table in REFERENCES}
        few = ([u for u in done if u.stage == "few" and FEW[u.line].table == table] for table in FEW_REFERENCES)
        for units in (*tables.values(), *few):
            seeds = [unit.seed for unit in units]
            assert seeds == sorted(seeds)
            assert set(seeds) == {0, 1}

    def test_rates_are_those_with_the_best_validation_accuracy(self, finished):
        line = lines.REFERENCE
        tried = {rates: fmean(r.accuracy for r in results) for rates, results in finished.tried(line).items()}
        assert tried[finished.rates(line)] == max(tried.values())
        assert {unit.rates for unit in finished.store.done if unit.stage == "many" and unit.line == line} == {
            str(finished.rates(line))
        }

    def test_a_run_that_was_killed_goes_on_where_it_was(self, run, finished, tmp_path):
        path = tmp_path / "quality.csv"
        lines_ = finished.store.path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines_[:-1]) + lines_[-1][:20], encoding="utf-8")  # killed while it wrote
        plan = Plan(TINY, run.setup, Store(path))
        assert len(plan.slots) - plan.done() == 1
        assert finish(plan, run) == 1
        again = Store(path).done
        last = list(finished.store.done)[-1]
        assert {unit: [dataclasses.replace(r, seconds=0) for r in results] for unit, results in again.items()} == {
            unit: [dataclasses.replace(r, seconds=0) for r in results] for unit, results in finished.store.done.items()
        }
        assert last in again

    @pytest.mark.parametrize("kept", [5, 20, 40, -6, -5, -4, -3, -2])
    def test_a_torn_row_spoils_no_other_wherever_it_was_cut(self, tmp_path, kept):
        store = Store(tmp_path / "quality.csv")
        units = [Unit("s", "many", "a line, with a comma", f"0.{n} 0 1", "0 0 0", 0, 5) for n in range(1, 4)]
        for unit in units[:2]:
            store.add(unit, [Result("t", 1.0, 2.0, 3, 4.0)])
        *whole, torn = store.path.read_text(encoding="utf-8").splitlines(keepends=True)
        store.path.write_text("".join(whole) + torn[:kept], encoding="utf-8")
        Store(store.path).add(units[2], [Result("t", 5.0, 6.0, 7, 8.0)])
        assert list(Store(store.path).done) == [units[0], units[2]]

    def test_an_adapter_whose_file_is_lost_is_trained_again_as_it_was(self, run, finished):
        unit = next(unit for unit in finished.store.done if (unit.stage, unit.line) == ("few", "MHR-mu"))
        file = run.file(lines.BEST, unit.source, unit.seed, TINY.steps)
        before = torch.load(file, weights_only=True)
        file.unlink()
        assert [r.loss for r in run.carry_out(unit)] == [r.loss for r in finished.store.done[unit]]
        assert all(torch.equal(value, before[name]) for name, value in torch.load(file, weights_only=True).items())

    def test_another_setup_has_nothing_done(self, finished):
        assert Plan(TINY, "other", finished.store).done() == 0

    def test_sizes_and_data_make_the_setup(self, source, run, tmp_path):
        assert Run(source).setup == run.setup
        assert Run(dataclasses.replace(source, settings=dataclasses.replace(TINY, steps=4))).setup != run.setup
        assert Run(dataclasses.replace(source, settings=dataclasses.replace(TINY, seeds=(9,)))).setup == run.setup

    def test_a_worker_process_does_what_this_one_does(self, source, run, finished, tmp_path, capsys):
        settings = dataclasses.replace(TINY, seeds=(0,), tune=False, shots=(2,))
        plan = Plan(settings, run.setup, Store(tmp_path / "quality.csv"))
        keep = {("many", "no adapter"), ("many", lines.REFERENCE)}
        plan.slots = [slot for slot in plan.slots if (slot.stage, slot.line) in keep]
        workers.run_all(plan, dataclasses.replace(source, settings=settings), 1, command.console)
        assert plan.done() == 2
        unit = next(unit for unit in plan.store.done if unit.line == "no adapter")
        same = finished.store.done[unit]
        assert [r.accuracy for r in plan.store.done[unit]] == [r.accuracy for r in same]

    def test_the_nearest_task_has_the_smallest_loss(self, run, finished):
        adapter = run.adapter(lines.BEST, str(finished.rates(lines.BEST)), 0, 3)
        rows = [dataclasses.replace(row, task="later") for row in run.tasks.rows("count", "train")]
        losses = {}
        for name in run.tasks.known:
            known = [dataclasses.replace(row, task=name) for row in rows]
            adapter.model.eval()
            losses[name] = torch.nn.functional.cross_entropy(
                *scores(adapter.encode, run.features, known, adapter.task_id)
            )
        assert run.nearest(adapter, rows) == min(losses, key=losses.get)

    def test_router_only_counts_one_row_and_moves_nothing_else(self, run, finished):
        way = FEW["MHR-z, row of the mean"]
        adapter = run.adapter(way.source, str(finished.rates(way.source)), 0, 3).copy()
        run.meet(way, adapter, "later", draw(run.tasks, "later", 2, 0))
        assert all("module_logits" in name for name, p in adapter.model.named_parameters() if p.requires_grad)
        unit = next(u for u in finished.store.done if u.stage == "few" and FEW[u.line] is way)
        splits, skills = MANY[way.source].method.splits, MANY[way.source].method.skills
        assert finished.store.done[unit][0].parameters == 12 * splits * skills


class TestStatistics:
    def test_the_standard_error_is_scipys(self):
        from scipy import stats

        mean, error = mean_and_error([1.0, 2.0, 4.0])
        assert mean == pytest.approx(7 / 3)
        assert error == pytest.approx(stats.sem([1.0, 2.0, 4.0]))
        assert math.isnan(mean_and_error([1.0])[1])

    def test_a_difference_is_paired_and_its_sign_test_counts_tails(self):
        one = {seed: {f"t{n}": 50.0 + n + seed for n in range(6)} for seed in range(3)}
        other = {seed: {f"t{n}": 50.0 + n + seed - (n != 5) for n in range(6)} for seed in range(2)}
        found = compare(one, other)
        assert (found.better, found.equal, found.worse) == (5, 1, 0)
        assert found.mean == pytest.approx(5 / 6)
        assert found.error == pytest.approx(0)
        assert found.p == pytest.approx(2 / 2**5)

    def test_lines_without_a_common_seed_or_tasks_are_errors(self):
        with pytest.raises(ValueError, match="no seed in common"):
            compare({0: {"a": 1.0}}, {1: {"a": 1.0}})
        with pytest.raises(ValueError, match="not tested on the same tasks"):
            compare({0: {"a": 1.0}}, {0: {"b": 1.0}})

    @pytest.mark.parametrize("seed", range(5))
    def test_the_rand_index_counts_pairs(self, seed):
        random = np.random.default_rng(seed)
        a, b = random.integers(0, 3, 12).tolist(), random.integers(0, 4, 12).tolist()
        pairs = list(itertools.combinations(range(12), 2))
        same_a, same_b = ([x[i] == x[j] for i, j in pairs] for x in (a, b))
        both = sum(p and q for p, q in zip(same_a, same_b, strict=True))
        expected = sum(same_a) * sum(same_b) / len(pairs)
        naive = (both - expected) / ((sum(same_a) + sum(same_b)) / 2 - expected)
        assert rand_index(a, b) == pytest.approx(naive)
        assert rand_index(a, a) == 1

    def test_families_that_are_the_clusters_beat_chance_and_shuffled_ones_do_not(self):
        found = [0, 0, 0, 1, 1, 1, 2, 2, 2]
        fit = against_chance(lambda families: rand_index(found, families), list("aaabbbccc"), times=500)
        assert fit.value == 1
        assert fit.p < 0.02
        assert abs(fit.chance) < 0.05
        assert against_chance(lambda families: rand_index(found, families), list("abcabcabc"), times=500).p > 0.9

    def test_kinship_counts_pairs(self):
        random = np.random.default_rng(0)
        similarity, kinds = random.random((7, 7)), list("aabbbcc")
        pairs = list(itertools.combinations(range(7), 2))
        kin = [similarity[i, j] for i, j in pairs if kinds[i] == kinds[j]]
        others = [similarity[i, j] for i, j in pairs if kinds[i] != kinds[j]]
        naive = fmean(a > b for a in kin for b in others)
        assert kinship(similarity, kinds) == pytest.approx(naive)
        assert kinship(np.ones((7, 7)), kinds) == pytest.approx(0.5)

    def test_things_are_clustered_by_their_similarity(self):
        places = np.array([0.0, 0.1, 5.0, 5.1, 9.0])
        found = clusters(1 - np.abs(places[:, None] - places) / 10, 3)
        assert found[0] == found[1] != found[2] == found[3] != found[4]


class TestReport:
    def test_the_few_shot_table_has_medians_over_draws(self, finished, run):
        settings = dataclasses.replace(TINY, draws=3, seeds=(0,))
        plan = Plan(settings, run.setup, Store(Path("nowhere.csv")))
        done = finished.store.done
        tuned = {dataclasses.replace(u, draw=3): results for u, results in done.items() if u.stage == "tune few"}
        plan.store.done = {**done, **tuned}
        way = next(way for way in FEW if FEW[way].learns)
        first = next(
            u for u in finished.store.done if u.stage == "few" and u.line == way and u.shots == 2 and u.seed == 0
        )
        assert way not in report.few_shot(plan, 2)  # one draw of three is no median
        for number, accuracy in enumerate((10.0, 70.0, 30.0)):
            plan.store.done[dataclasses.replace(first, draw=number)] = [Result("later", accuracy, 1.0, 1, 1.0)]
        assert report.few_shot(plan, 2)[way] == {0: {"later": 30.0}}

    def test_tables_plot_and_pictures_are_written(self, finished, run, source, tmp_path, capsys):
        docs = tmp_path / "quality.md"
        names = (
            "quality",
            "quality-variants",
            "quality-longer-best",
            "quality-long",
            "quality-longer",
            "quality-deep",
            "quality-bare",
            "quality-few",
            "quality-few-longer",
            "quality-tuning",
            "quality-tasks",
            "quality-tasks-longer",
            "quality-routing",
            "quality-few-tasks",
        )
        docs.write_text("\n".join(f"<!-- {name} -->\nold\n<!-- /{name} -->" for name in names), encoding="utf-8")
        args = command.arguments(["--data", str(source.data), "--docs", str(docs)])
        command._report(args, run, finished, tmp_path / "quality")
        text = docs.read_text(encoding="utf-8")
        assert "old" not in text
        assert all(f"| {line} |" in text for line in MANY)
        assert "| task | chance |" in text
        assert " ± " in text
        for picture in ("quality.png", "quality-steps.png", "quality-routing.png"):
            assert (tmp_path / picture).stat().st_size > 1000

    def test_the_command_says_which_tasks_it_leaves_out(self, source, run, finished, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(command, "FULL", TINY)
        (tmp_path / "quality.csv").write_bytes(finished.store.path.read_bytes())
        folders = ["--model", source.model, "--results", str(tmp_path), "--outputs", str(source.outputs)]
        command.main(["--data", str(source.data), "--held-out", "later", "--report-only", *folders])
        assert "have no options to choose from: free" in capsys.readouterr().out
        assert (tmp_path / "quality.png").exists()

    def test_one_table_of_longer_training_runs_alone_at_the_rates_that_its_lines_have(
        self, source, run, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr(command, "FULL", TINY)
        settings = dataclasses.replace(TINY, tune=False, only=("longer",))
        plan = Plan(settings, run.setup, Store(tmp_path / "quality.csv"))
        finish(plan, run)
        longer = [line for line in MANY if MANY[line].table == "longer"]
        assert {(u.stage, u.line, u.seed) for u in plan.store.done} == set(product(["many"], longer, TINY.seeds))
        assert all(unit.rates == str(MANY[MANY[unit.line].like].rates) for unit in plan.store.done)
        docs = tmp_path / "quality.md"
        written = ["quality-longer", "quality-longer-best", "quality-tasks-longer"]
        tables = (f"<!-- {name} -->\nold {name}\n<!-- /{name} -->" for name in ("quality", *written))
        docs.write_text("\n".join(tables), encoding="utf-8")
        folders = ["--model", source.model, "--results", str(tmp_path), "--outputs", str(source.outputs)]
        wanted = ["--only", "longer", "--report-only", "--docs", str(docs)]
        command.main(["--data", str(source.data), "--held-out", "later", *wanted, *folders])
        text = docs.read_text(encoding="utf-8")
        assert "old quality\n" in text
        assert not any(f"old {name}" in text for name in written)
        assert all(f"| {line} |" in text for line in longer)


def test_settings_of_the_router_are_compared_with_the_router_that_they_change(finished):
    variants = {line for line in MANY if MANY[line].table == "main" and MANY[line].method.kind == "poly"}
    others = {line for line in MANY if MANY[line].table == "longer"}
    for table, compared, best in (("main", variants, lines.BEST), ("longer", others, f"{lines.BEST}, 9 x the steps")):
        found = report.multi_task(finished, table)
        rows = {row["method"]: row for row in report.best_table(finished, table)}
        assert set(rows) == compared - {best}
        means = {line: [fmean(tasks.values()) for tasks in found[line].values()] for line in found}
        for line, row in rows.items():
            difference = fmean(means[line]) - fmean(means[best])
            assert row["less MHR, 4 splits"].startswith(f"{round(difference, 1):+.1f} ")


def test_one_seed_has_no_error_bar_and_says_so(finished):
    found = report.multi_task(finished)
    one = {line: {0: accuracies[0]} for line, accuracies in found.items()}
    assert " ± " not in report._mean(one[lines.REFERENCE])
    assert " ± " in report._mean(found[lines.REFERENCE])


def test_the_best_routed_line_is_one_of_ours(finished):
    assert MANY[routing.best_routed(finished)].method.kind == "poly"


def test_units_are_told_apart_by_all_their_settings(tmp_path):
    store, unit = Store(tmp_path / "results.csv"), Unit("s", "many", "a line, with a comma", "0.1 0 1", "0 0 0", 0, 5)
    store.add(unit, [Result("t", 1.0, 2.0, 3, 4.0)])
    for name, value in (
        ("rates", "0.2 0 1"),
        ("seed", 1),
        ("steps", 6),
        ("shots", 16),
        ("draw", 2),
        ("source", "1 1 1"),
    ):
        assert dataclasses.replace(unit, **{name: value}) not in Store(store.path).done
    assert Store(store.path).done == {unit: [Result("t", 1.0, 2.0, 3, 4.0)]}
