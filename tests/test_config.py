"""`PolyConfig`: its defaults are those of PEFT's own Poly, every check speaks, and it survives a trip through JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import peft
import pytest
from peft import PeftConfig
from peft.utils import PeftType

import peft_poly
from peft_poly import PolyConfig

NAMES = ["rte", "sst2", "boolq"]


def test_the_defaults_are_those_of_pefts_own_poly():
    ours, theirs = PolyConfig().to_dict(), peft.PolyConfig().to_dict()
    theirs.pop("peft_type")
    assert {name: ours[name] for name in theirs} == theirs


def test_the_further_defaults_change_nothing_in_the_equations():
    config = PolyConfig()
    assert (config.lora_alpha, config.lora_dropout) == (1, 0.0)
    assert (config.router_temperature, config.router_noise, config.router_granularity) == (1.0, True, "layer")
    assert config.task_names is config.layers_to_transform is config.layers_pattern is None


def test_it_is_the_config_of_the_new_method_and_not_of_poly():
    config = PolyConfig()
    assert config.peft_type == PeftType.PEFT_POLY == "PEFT_POLY"
    assert isinstance(config, PeftConfig)
    assert not isinstance(config, peft.PolyConfig)


@pytest.mark.parametrize("name", ["r", "n_tasks", "n_skills", "n_splits"])
@pytest.mark.parametrize("value", [0, -1, 2.0, 1.5, True, "4", [4], float("nan")])
def test_a_size_that_is_no_positive_integer_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be a positive integer, got "):
        PolyConfig(**{name: value})


def test_a_size_that_is_none_is_refused_or_filled_in_by_the_kind():
    with pytest.raises(ValueError, match=r"^`r` must be a positive integer, got None\.$"):
        PolyConfig(r=None)
    for kind, n_skills in (("poly", 4), ("gates", 1)):
        config = PolyConfig(poly_type=kind, n_skills=None, n_splits=None)
        assert (config.n_skills, config.n_splits) == (n_skills, 1)


@pytest.mark.parametrize("name", ["lora_alpha", "router_temperature"])
@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), True, "1", None])
def test_a_scale_that_is_no_positive_number_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` must be a positive number, got "):
        PolyConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, float("nan"), True, "0.1", None])
def test_a_dropout_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^`lora_dropout` must lie in \[0, 1\), got "):
        PolyConfig(lora_dropout=value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"poly_type": "mhr"}, r"^`poly_type` must be one of \['gates', 'poly'\], got 'mhr'\.$"),
        ({"router_noise": 1}, r"^`router_noise` must be True or False, got 1\.$"),
        ({"router_noise": None}, r"^`router_noise` must be True or False, got None\.$"),
        ({"init_weights": "kaiming"}, r"^`init_weights` must be one of \(True, False, 'mhr'\), got 'kaiming'\.$"),
        ({"init_weights": 1}, r"^`init_weights` must be one of \(True, False, 'mhr'\), got 1\.$"),
        ({"router_granularity": "head"}, r"one of \('layer', 'block', 'model'\), got 'head'\.$"),
        ({"router_granularity": None}, r"^`router_granularity` must be one of .*, got None\.$"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        PolyConfig(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"init_weights": True},
        {"init_weights": False},
        {"init_weights": "mhr"},
        {"router_granularity": "block"},
        {"router_granularity": "model"},
        {"router_noise": False},
        {"lora_dropout": 0},
        {"lora_dropout": 0.99},
        {"lora_alpha": 16},
        {"lora_alpha": 0.5},
        {"router_temperature": 0.1},
        {"r": 1, "n_tasks": 1, "n_skills": 1, "n_splits": 1},
    ],
)
def test_what_is_allowed_is_kept_as_it_was_given(setting):
    config = PolyConfig(**setting)
    assert {name: getattr(config, name) for name in setting} == setting


class TestTasks:
    def test_names_set_the_number_of_tasks(self):
        assert PolyConfig(task_names=NAMES).n_tasks == 3

    def test_without_names_there_is_one_task_unless_said_otherwise(self):
        assert PolyConfig().n_tasks == 1
        assert PolyConfig(n_tasks=7).n_tasks == 7

    def test_names_and_number_may_agree(self):
        assert PolyConfig(task_names=NAMES, n_tasks=3).n_tasks == 3

    @pytest.mark.parametrize("n_tasks", [1, 2, 4])
    def test_names_and_number_must_agree(self, n_tasks):
        with pytest.raises(ValueError, match=rf"^`n_tasks` is {n_tasks} but `task_names` has 3 entries\. Leave"):
            PolyConfig(task_names=NAMES, n_tasks=n_tasks)

    @pytest.mark.parametrize("names", [[], (), "rte", 3, {"rte": 0}, {"rte"}])
    def test_names_must_be_a_list(self, names):
        with pytest.raises(ValueError, match=r"^`task_names` must be a non-empty list of names, got "):
            PolyConfig(task_names=names)

    @pytest.mark.parametrize("bad", ["", "  ", "\n", None, 3])
    def test_every_name_must_be_a_string_with_something_in_it(self, bad):
        with pytest.raises(ValueError, match=r"^Every task name must be a non-empty string, got .* in \['rte', "):
            PolyConfig(task_names=["rte", bad])

    def test_repeated_names_are_refused_and_named(self):
        with pytest.raises(ValueError, match=r"^Task names must differ, but \['a', 'b'\] occur more than once"):
            PolyConfig(task_names=["b", "a", "c", "a", "b"])

    def test_the_config_keeps_a_list_of_its_own(self):
        names = list(NAMES)
        config = PolyConfig(task_names=names)
        names.append("late")
        assert config.task_names == NAMES

    def test_a_tuple_of_names_becomes_a_list(self):
        assert PolyConfig(task_names=tuple(NAMES)).task_names == NAMES


class TestTargets:
    @pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
    @pytest.mark.parametrize("given", [["q", "v"], ("q", "v"), {"q", "v"}])
    def test_names_become_a_set_as_in_all_peft_configs(self, name, given):
        assert getattr(PolyConfig(**{name: given}), name) == {"q", "v"}

    def test_a_regular_expression_stays_a_string(self):
        assert PolyConfig(target_modules=r".*\.q$").target_modules == r".*\.q$"

    @pytest.mark.parametrize("targets", [r".*\.q$", "all-linear"])
    @pytest.mark.parametrize(
        "extra", [{"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"layers_pattern": "h"}]
    )
    def test_only_a_list_of_names_is_narrowed_by_indices_as_peft_would_ignore_them(self, targets, extra):
        name = next(iter(extra))
        with pytest.raises(ValueError, match=rf"^`{name}` cannot be used when `target_modules` is a regular .* got '"):
            PolyConfig(target_modules=targets, **extra)

    def test_a_pattern_needs_indices(self):
        with pytest.raises(
            ValueError, match=r"^`layers_pattern` needs `layers_to_transform`, the indices of the blocks"
        ):
            PolyConfig(target_modules=["q"], layers_pattern="layers")

    @pytest.mark.parametrize("targets", [["q"], None], ids=["names", "default"])
    def test_indices_go_with_names_and_with_the_default_names(self, targets):
        config = PolyConfig(target_modules=targets, layers_to_transform=[0, 2], layers_pattern="layers")
        assert (config.layers_to_transform, config.layers_pattern) == ([0, 2], "layers")


FULL = {
    "task_type": "SEQ_CLS",
    "r": 3,
    "target_modules": ["q", "v"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["block"],
    "modules_to_save": ["classifier"],
    "init_weights": "mhr",
    "n_skills": 5,
    "n_splits": 2,
    "task_names": NAMES,
    "task_labels": dict.fromkeys(NAMES, 2),
    "lora_alpha": 2.5,
    "router_lr": 0.25,
    "unknown_task": "mean",
    "lora_dropout": 0.25,
    "router_temperature": 0.5,
    "router_noise": False,
    "router_granularity": "block",
}


class TestJson:
    def test_the_example_sets_every_field_to_something_else_than_its_default(self):
        own = {f.name for f in dataclasses.fields(PolyConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
        assert own - set(FULL) == {"poly_type", "n_tasks"}  # one has a single value, the other follows from the names
        defaults = PolyConfig()
        assert all(getattr(defaults, name) != value for name, value in FULL.items())

    @pytest.mark.parametrize("loader", [PeftConfig, PolyConfig], ids=["PeftConfig", "PolyConfig"])
    def test_every_field_survives(self, tmp_path, loader):
        config = PolyConfig(**FULL)
        config.save_pretrained(tmp_path)
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is PolyConfig
        assert loaded.to_dict() == config.to_dict()

    @pytest.mark.parametrize("init_weights", [True, False, "mhr"])
    def test_a_setting_of_mixed_type_survives(self, tmp_path, init_weights):
        PolyConfig(init_weights=init_weights).save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).init_weights is init_weights or init_weights == "mhr"
        assert PeftConfig.from_pretrained(tmp_path).init_weights == init_weights

    def test_the_file_is_plain_json_that_names_the_method(self, tmp_path):
        PolyConfig(**FULL).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (saved["peft_type"], saved["n_tasks"], saved["task_names"]) == ("PEFT_POLY", 3, NAMES)
        assert sorted(saved["target_modules"]) == ["q", "v"]

    def test_keys_of_a_later_version_are_dropped_with_a_warning(self, tmp_path):
        PolyConfig(**FULL).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "router_of_the_future": 42}))
        with pytest.warns(UserWarning, match="Unexpected keyword arguments.*router_of_the_future"):
            loaded = PeftConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() == PolyConfig(**FULL).to_dict()

    def test_keys_that_an_earlier_version_did_not_write_get_their_defaults(self, tmp_path):
        short = {"peft_type": "PEFT_POLY", "r": 4, "target_modules": ["q"], "n_tasks": 2}
        (tmp_path / "adapter_config.json").write_text(json.dumps(short))
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert (loaded.r, loaded.n_tasks, loaded.n_skills, loaded.lora_alpha) == (4, 2, 4, 1)

    def test_a_file_with_an_impossible_setting_is_refused(self, tmp_path):
        PolyConfig(**FULL).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "n_splits": 0}))
        with pytest.raises(ValueError, match="`n_splits` must be a positive integer, got 0"):
            PeftConfig.from_pretrained(tmp_path)


def test_peft_makes_it_from_a_dictionary():
    config = peft.get_peft_config({"peft_type": "PEFT_POLY", "r": 4, "task_names": NAMES})
    assert type(config) is PolyConfig
    assert (config.r, config.n_tasks) == (4, 3)


def test_a_copy_with_one_change_is_checked_too():
    config = PolyConfig(**FULL)
    assert dataclasses.replace(config, r=9).to_dict() == {**config.to_dict(), "r": 9}
    with pytest.raises(ValueError, match="`r` must be a positive integer"):
        dataclasses.replace(config, r=0)


@pytest.mark.parametrize("value", [np.int64(4), np.float32(4)])
def test_a_numpy_number_is_refused_as_json_would_refuse_it(value):
    with pytest.raises(ValueError, match="`r` must be a positive integer"):
        PolyConfig(r=value)


def test_every_field_is_described_for_argument_parsers_and_readers():
    own = {f.name: f for f in dataclasses.fields(PolyConfig)}
    for name in own.keys() - {f.name for f in dataclasses.fields(PeftConfig)}:
        assert own[name].metadata["help"].endswith("."), name
        assert f"\n    {name} (" in inspect.getdoc(peft_poly.PolyConfig), name
