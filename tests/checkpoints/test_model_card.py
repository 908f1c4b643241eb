"""The model card: metadata, tasks, users' text, and loading lines that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from adapters import adapt, poly
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny import CASES, MLP, TASKS, first, llama

from peft_poly.checkpoints import saving

INPUTS = CASES["mlp"].inputs()
CARD = "README.md"


def adapter(**settings) -> PeftModel:
    torch.manual_seed(0)
    return adapt(MLP().eval(), poly("mlp", **settings))


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD, ignore_metadata_errors=False)


def test_the_card_has_the_metadata_that_the_hub_searches(tmp_path):
    model = adapter()
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(tmp_path)
    data = card_of(tmp_path).data
    assert data.library_name == "peft"
    assert data.base_model == "user/base"
    assert set(data.tags) == {"base_model:adapter:user/base", "multi-task", "peft-poly", "polytropon"}


def test_a_base_model_without_a_name_is_left_out_of_the_metadata(tmp_path):
    adapter().save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "base_model" not in text
    assert "base = ...  # the MLP that the adapter was trained on" in text


def test_a_causal_model_gets_its_pipeline_tag(tmp_path):
    adapt(llama(), poly("llama")).save_pretrained(tmp_path)
    assert card_of(tmp_path).data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"n_tasks": None, "task_names": TASKS}, ["| 0 | rte |", "| 1 | sst2 |", "| 2 | boolq |"]),
        ({"n_tasks": 2}, ["| 0 | 0 |", "| 1 | 1 |"]),
        ({"n_tasks": None, "task_names": ["yes|no", "two\nlines"]}, [r"| 0 | yes\|no |", "| 1 | two lines |"]),
    ],
)
def test_the_tasks_are_listed(tmp_path, settings, rows):
    adapter(**settings).save_pretrained(tmp_path)
    table = card_of(tmp_path).text.partition("## Tasks")[2].partition("## How")[0].strip().splitlines()
    assert table == ["| id | task |", "|---|---|", *rows]


def test_more_than_fifty_tasks_are_shortened(tmp_path):
    adapter(n_tasks=None, task_names=[f"task{i:03}" for i in range(73)]).save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert re.findall(r"task\d{3}", text.partition("## How")[0]) == [f"task{i:03}" for i in range(50)]
    assert "... and 23 more." in text
    assert "73 task(s)" in text


def test_the_card_names_the_method_and_its_sizes(tmp_path):
    adapter(r=2, n_skills=3, n_splits=1).save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "3 task(s) with one inventory of 3 LoRA skills of rank 2" in text
    assert "Polytropon (arXiv 2202.13914)" in text
    adapter(n_splits=2).save_pretrained(tmp_path)
    text = card_of(tmp_path).text
    assert "2 split(s): Multi-Head Routing (arXiv 2211.03831)" in text
    assert "Polytropon" not in text


def test_text_and_metadata_of_users_are_kept_while_our_section_is_renewed(tmp_path):
    adapter(n_tasks=None, task_names=["old"]).save_pretrained(tmp_path)
    path = tmp_path / CARD
    text = path.read_text().replace("# Task-routed adapter", "# Reading adapter\n\nRead this first.")
    text = text.replace("library_name: peft\n", "library_name: peft\nlicense: mit\nlanguage:\n- en\n")
    text = re.sub(r"^tags:\n", "tags:\n- finance\n", text, flags=re.MULTILINE)
    path.write_text(text + "\n## Limits\n\nKnown to be slow on Mondays.\n")
    for _ in range(2):
        adapter(n_tasks=None, task_names=["new"]).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "# Reading adapter\n\nRead this first." in card.text
    assert "## Limits\n\nKnown to be slow on Mondays." in card.text
    assert "| 0 | new |" in card.text
    assert "| 0 | old |" not in card.text
    assert [card.text.count(mark) for mark in (saving.BEGIN, saving.END, "## Tasks", "- PEFT ")] == [1, 1, 1, 1]
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert set(card.data.tags) == {"finance", "polytropon", *saving.TAGS}


def test_a_readme_without_our_section_keeps_its_text_and_gets_one(tmp_path):
    (tmp_path / CARD).write_text("# My run\n\nWritten before the first save.\n")
    adapter().save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.text.strip().startswith("# My run\n\nWritten before the first save.")
    assert card.text.count("## Tasks") == 1
    assert card.data.library_name == "peft"


# --------------------------------------------------------------------------------------------------- the loading lines
def loading_lines(folder: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card_of(folder).text, flags=re.DOTALL)
    return block


@pytest.mark.parametrize("case", ["llama", "t5", "bert"])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_loading_lines_of_the_card_run(tmp_path, case, name):
    CASES[case].make().save_pretrained(tmp_path / "base")
    original = type(CASES[case].make()).from_pretrained(tmp_path / "base")
    targets = CASES[case].target_modules[:2]
    model = adapt(original, poly(case, target_modules=targets, n_tasks=None, task_names=TASKS), adapter_name=name)
    model.save_pretrained(tmp_path / "adapter")
    lines = loading_lines(tmp_path / "adapter")
    assert lines.startswith("import peft_poly")
    assert lines.count('"..."') == 1
    names = {"inputs": CASES[case].inputs()}
    exec(lines.replace("...", str(tmp_path / "adapter")), names)
    assert torch.equal(first(names["outputs"]), first(model(**names["inputs"], task_ids="rte")))


def test_the_loading_lines_use_an_id_where_tasks_have_no_names(tmp_path):
    adapter().save_pretrained(tmp_path)
    lines = loading_lines(tmp_path).replace("base = ...", "base = make()").replace("...", str(tmp_path))
    names = {"inputs": INPUTS, "make": lambda: adapter().unload()}
    exec(lines, names)
    assert torch.equal(names["outputs"], adapter()(**INPUTS, task_ids=0))


class OwnLlama(transformers.LlamaForCausalLM):
    """A class that cannot be imported from transformers."""


def test_the_loading_lines_do_not_import_a_users_class_from_transformers(tmp_path):
    model = OwnLlama(llama().config)
    model.save_pretrained(tmp_path / "base")
    adapt(OwnLlama.from_pretrained(tmp_path / "base"), poly("llama")).save_pretrained(tmp_path / "adapter")
    lines = loading_lines(tmp_path / "adapter")
    assert "base = ...  # the OwnLlama" in lines
    assert "from transformers" not in lines
