"""README and guides cannot go stale: their Python runs, their links lead somewhere, the tests they name exist.

The blocks of a page run in the order of the page and share their names. A block that cannot run carries the reason in
a comment on the line before it: `<!-- not run: it needs two GPUs -->`.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted(page for page in (ROOT / "docs").glob("**/*.md") if "_build" not in page.parts)
PAGES = [ROOT / "README.md", *GUIDES]
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\s*\Z")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
TEST = re.compile(r"`(?P<file>(?:tests/)?(?:\w+/)*test_\w+\.py)(?:::(?P<name>[\w:]+))?`")

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(text: str) -> list[tuple[int, str, bool]]:
    """Line number, code, and whether it is to be run, of each Python block."""
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] in ("python", "py"):
            to_run = NOT_RUN.search(text[: match.start()]) is None
            found.append((text.count("\n", 0, match.start("code")), match["code"], to_run))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def strings_of_the_package() -> list[str]:
    """Every string in the source; `{}` stands for what a message fills in."""
    found = []
    for path in (ROOT / "src/peft_poly").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


PAGES_WITH_PYTHON = [
    page for page in PAGES if any(to_run for *_, to_run in python_blocks(page.read_text(encoding="utf-8")))
]


NEWER = {
    "docs/guides/preference-training.md": "goes with a TRL whose DPO hands no tasks on",
    "docs/guides/serving.md": "passes token types of a plain tokenizer on to generate",
}


def with_marks(page: Path) -> Any:
    name = str(page.relative_to(ROOT))
    marks = [pytest.mark.transformers_5(reason=NEWER[name])] if name in NEWER else []
    return pytest.param(page, id=name, marks=marks)


@pytest.mark.parametrize("page", map(with_marks, PAGES_WITH_PYTHON))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = types.ModuleType("page")  # classes that a page defines can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    for line, code, to_run in blocks:
        if to_run:
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), vars(module))


def test_there_is_python_in_the_readme_and_in_the_guides():
    assert ROOT / "README.md" in PAGES_WITH_PYTHON
    assert ROOT / "docs/start.md" in PAGES_WITH_PYTHON
    assert len([page for page in PAGES_WITH_PYTHON if page.parent.name == "guides"]) >= 5


def test_only_a_comment_with_a_reason_keeps_a_block_from_running():
    block = "```python\nraise SystemExit\n```\n"
    assert [to_run for *_, to_run in python_blocks(f"{block}<!-- not run: two GPUs -->\n\n{block}{block}")] == [
        True,
        False,
        True,
    ]
    assert [to_run for *_, to_run in python_blocks(f"<!-- not run: -->\n{block}<!-- not run -->\n{block}")] == [
        True,
        True,
    ]


def test_a_block_fails_at_the_line_of_its_page():
    ((line, code, _),) = python_blocks("# A page\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("\n" * line + code, "page.md", "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    text, broken = BLOCK.sub("", page.read_text(encoding="utf-8")), []
    for match in LINK.finditer(text):
        target = match["target"] or match["image"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@per_page
def test_every_test_that_a_page_names_exists(page):
    missing = []
    for match in TEST.finditer(page.read_text(encoding="utf-8")):
        path = ROOT / "tests" / match["file"].removeprefix("tests/")
        if not path.exists():
            missing.append(match[0])
        elif match["name"]:
            defined = re.findall(r"^\s*(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            missing += [match[0] for name in match["name"].split("::") if name not in defined]
    assert not missing


def test_each_row_of_the_feature_table_names_a_test():
    text = (ROOT / "docs/guides/from-pefts-poly.md").read_text(encoding="utf-8")
    table = text.partition("<!-- features -->")[2].partition("<!-- /features -->")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) >= 10
    assert not [row for row in rows if not TEST.search(row.rstrip("| ").rpartition("|")[2])]


def test_the_readme_is_three_screens_at_most():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_example_of_the_readme_has_fifteen_lines_at_most():
    _, code, to_run = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert to_run
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_start_page_shows_the_example_of_the_readme_and_the_table_of_the_demo():
    start, readme, examples = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/start.md", "README.md", "examples/README.md")
    )
    assert python_blocks(readme)[0][1] == python_blocks(start)[0][1]
    table = re.search(r"^Accuracy in % on the test rows.*?^```$", examples, re.DOTALL | re.MULTILINE)[0]
    assert table in start
    mean = re.search(r"^│ mean.*$", table, re.MULTILINE)[0].strip("│ ").replace("│", "|").split()
    assert " ".join(mean) in readme


def test_each_message_of_the_troubleshooting_page_is_one_of_ours():
    text = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    ours = text.partition("## Messages of other libraries")[0]
    messages = [fragment for _, fragment in re.findall(r"^### (`+) ?(.*?) ?\1$", ours, re.MULTILINE)]
    assert len(messages) == ours.count("\n### ") >= 20
    known = strings_of_the_package()
    assert not [message for message in messages if not any(message in string for string in known)]
