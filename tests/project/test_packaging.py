"""What is built is complete and says of itself what the README says; the Makefile and CI do what they promise.

Built are a source distribution and, from it, a wheel, with the setuptools that is here: nothing is downloaded.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import peft_poly
from peft_poly.compat import PEFT_VERSIONS

ROOT = Path(__file__).parents[2]
README, CITATION, VERSIONS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/citation.md", "docs/versions-and-limits.md")
)
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
VERBS = ["demo", "demo-llm", "serve", "test", "test-servers", "quality", "style", "docs", "bench", "bench-quick"]
VERBS += ["bench-quality", "bench-personal", "bench-tenants", "bench-assistants", "clean"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """A distribution of the project in `source`; its file lies in `target`."""
    lines = run(sys.executable, "-c", BUILD, f"build_{kind}", target, cwd=source).splitlines()
    return target / lines[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    return build("sdist", source, target)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    return target


def oldest_on_the_page() -> dict[str, str]:
    table = VERSIONS.partition("## Versions")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `?([\w-]+)`? \| ([\d.]+) \|", table, re.MULTILINE))


class TestDistributions:
    def test_the_wheel_has_every_module_and_the_typing_mark_and_no_more(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/peft_poly").glob("**/*.py")}
        assert packed == source | {"peft_poly/py.typed", "peft_poly_cli.py"}  # the grammar stands beside

    def test_the_licence_goes_along(self, wheel, sdist):
        with zipfile.ZipFile(wheel) as archive:
            assert any(name.endswith("LICENSE") for name in archive.namelist())
        with tarfile.open(sdist) as archive:
            assert any(name.endswith("/LICENSE") for name in archive.getnames())

    def test_the_metadata_say_what_it_is(self, metadata):
        assert metadata["Name"] == "peft-poly"
        assert metadata["Version"] == peft_poly.__version__
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Description-Content-Type"] == "text/markdown"
        assert metadata.get_payload().strip() == README.strip()
        assert set(metadata.get_all("Provides-Extra")) == {
            "demo",
            "dev",
            "docs",
            "llm",
            "plot",
            "quality",
            "serve",
            "test",
            "train",
        }

    def test_it_can_be_installed_on_the_pythons_that_ci_runs(self, metadata):
        allowed = SpecifierSet(metadata["Requires-Python"])
        assert not [version for version in PYTHONS if version not in allowed]
        assert "3.9" not in allowed
        classified = re.findall(r"Python :: (3\.\d+)", " ".join(metadata.get_all("Classifier")))
        assert classified == PYTHONS

    def test_the_bounds_on_peft_are_those_of_the_import_error(self, metadata):
        wanted = {
            req.name: req.specifier for req in map(Requirement, metadata.get_all("Requires-Dist")) if not req.marker
        }
        assert wanted["peft"] == Requirement(PEFT_VERSIONS).specifier

    def test_every_requirement_has_a_lower_bound_that_the_page_of_versions_has_too(self, metadata):
        oldest = oldest_on_the_page()
        for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
            bounds = [part.version for part in requirement.specifier if part.operator == ">="]
            assert len(bounds) == 1, requirement
            if not requirement.marker:
                stated = oldest[requirement.name]
                assert stated in requirement.specifier, requirement
                assert (stated + ".").startswith(bounds[0] + "."), f"{requirement} but the page has {stated}"

    def test_the_oldest_releases_can_be_tested_together(self):
        (file,) = re.findall(r"CONSTRAINTS=(\S+\.txt)", (ROOT / "Makefile").read_text(encoding="utf-8"))
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pinned = {pin.name: str(pin.specifier) for pin in map(Requirement, lines[1:])}
        for name, release in oldest_on_the_page().items():
            if name not in ("torch", "Python"):  # which TORCH and PYTHON say
                assert pinned[name] == f"=={release}"

    def test_the_dev_extra_has_all_the_others(self, metadata):
        by_extra: dict[str, set[str]] = {}
        for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
            if requirement.marker:
                extra = re.search(r'extra == "(\w+)"', str(requirement.marker))[1]
                by_extra.setdefault(extra, set()).add(requirement.name)
        assert by_extra["dev"] == set().union(*by_extra.values())

    def test_an_installed_copy_runs_by_itself(self, installed, tmp_path):
        assert (installed / "peft_poly/py.typed").exists()
        env = {**os.environ, "PYTHONPATH": str(installed)}
        code = "import peft_poly, peft_poly_cli as c; print(peft_poly.__file__); c.main(['--version'])"
        where, version = run(sys.executable, "-c", code, cwd=tmp_path, env=env).splitlines()
        assert Path(where).is_relative_to(installed)
        assert peft_poly.__version__ in version

    def test_the_command_line_is_installed(self, installed):
        script = "Scripts/peft-poly.exe" if os.name == "nt" else "bin/peft-poly"
        assert (installed / script).exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMakefile:
    def commands(self, verb: str, *settings: str) -> str:
        env = {"PATH": os.environ["PATH"]}  # nothing that a make around it was told
        return run("make", "--no-print-directory", "-n", verb, *settings, cwd=ROOT, env=env)

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_runs_and_is_listed(self, verb):
        assert self.commands(verb, "DATA=a-folder")
        assert re.search(rf"^{verb} +\w", run("make", "--no-print-directory", cwd=ROOT), re.MULTILINE)

    @pytest.mark.parametrize("verb", ["demo", "test", "quality", "style", "docs"])
    def test_a_verb_makes_its_environment_first_with_torch_before_the_rest(self, verb, tmp_path):
        lines = self.commands(verb, f"VENV={tmp_path}/env", "PYTHON=some-python", "TORCH=torch==9.9").splitlines()
        order = ["some-python -m venv", "pip install torch==9.9", 'pip install -e ".[']
        places = [next(i for i, line in enumerate(lines) if part in line) for part in order]
        assert places == sorted(places)
        assert places[-1] < len(lines) - 1

    def test_all_verbs_hold_back_the_same_releases_so_that_none_changes_what_another_installed(self, tmp_path):
        for verb in VERBS:
            lines = self.commands(verb, f"VENV={tmp_path}/env", "DATA=a-folder").splitlines()
            assert all(line.endswith(" -c constraints.txt") for line in lines if 'pip install -e ".[' in line)

    def test_the_quality_benchmark_asks_for_its_folder(self):
        made = subprocess.run(["make", "-n", "bench-quality"], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode != 0
        assert "make bench-quality DATA=folder" in made.stderr

    def test_the_tests_run_on_two_workers_of_one_thread_each(self):
        *_, last = self.commands("test", "PYTEST_ARGS=tests/test_router.py").splitlines()
        assert last.startswith("OMP_NUM_THREADS=1 ")
        assert " -n 2 " in last
        assert last.endswith(" tests/test_router.py")

    def test_cleaning_keeps_the_environment_and_what_examples_wrote(self):
        assert not re.search(r"rm -rf[^\n]*(\.venv|outputs)", self.commands("clean"))

    def test_the_verbs_of_the_readme_exist(self):
        named = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
        assert {"demo", "test"} <= named <= set(VERBS)


class TestContinuousIntegration:
    def test_the_script_runs_the_command_of_the_readme_and_keeps_its_exit_code(self):
        script = ROOT / ".ci/run"
        text = script.read_text(encoding="utf-8")
        assert os.access(script, os.X_OK)
        assert "make test" in text
        assert "set -euo pipefail" in text

    def test_the_workflow_runs_the_script_on_every_python(self):
        workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
        test = workflow["jobs"]["test"]
        assert test["strategy"]["matrix"]["python"] == PYTHONS
        assert ".ci/run" in [step.get("run") for step in test["steps"]]
        assert "make quality" in [step.get("run") for step in workflow["jobs"]["quality"]["steps"]]
        assert "make docs INTERSPHINX=1" in [step.get("run") for step in workflow["jobs"]["docs"]["steps"]]


def test_the_citation_has_what_its_format_requires_and_the_papers_as_the_docs_cite_them():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"authors", "message", "title"}  # all that the schema of 1.2.0 requires
    for cited in (citation, *citation["references"]):
        assert cited["type"] in ("software", "conference-paper")
        assert cited["title"]
        assert all(author.keys() >= {"family-names", "given-names"} or author["name"] for author in cited["authors"])
    for paper in citation["references"]:
        assert f"{{{paper['title']}}}" in CITATION
        assert all(f"{author['family-names']}, {author['given-names']}" in CITATION for author in paper["authors"])


def test_the_citation_has_the_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == peft_poly.__version__
    papers = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert papers == ["arXiv:2202.13914", "arXiv:2211.03831"]
    assert all(paper in CITATION for paper in papers)
    assert all(paper.removeprefix("arXiv:") in README for paper in papers)


def test_the_changelog_has_the_version():
    assert f"## [{peft_poly.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
