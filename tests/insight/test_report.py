"""The HTML report, read with an HTML parser and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy.cluster import hierarchy
from test_analysis import gates_of, random_gates, random_routing, routing_of

from peft_poly import PolyConfig
from peft_poly.insight import analysis
from peft_poly.insight.analysis import Routing
from peft_poly.insight.report import MOST_TASKS, render_report, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = ["<script>alert(1)</script>", "a & b", "\"quoted\" 'name'", "{{ 7 * 7 }}", "Übung/子.1"]


class Page(HTMLParser):
    """A page's tags with their attributes, the texts of each kind of tag, and its tables' rows, cell by cell."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def with_config(routing, **settings):
    config = PolyConfig(task_names=list(routing.task_names), n_splits=2, **settings)
    return Routing(routing.task_names, routing.weights, routing.probabilities, config)


def named(names, **settings):
    routing = random_routing(n_tasks=len(names), **settings)
    return Routing(tuple(names), routing.weights, routing.probabilities)


class TestPage:
    def test_the_summary_says_what_the_adapter_is(self):
        routing = with_config(random_routing(), r=16, base_model_name_or_path="google/flan-t5-large")
        page = Page(render_report(routing, title="Routing of mine"))
        assert page.texts["title"] == page.texts["h1"] == ["Routing of mine"]
        summary = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
        assert summary == {
            "base model": "google/flan-t5-large", "adapter": "PEFT_POLY", "tasks": "5", "skills": "4", "splits": "2",
            "rank": "16", "routers": "3",
        }  # fmt: skip

    def test_every_number_of_the_mean_heat_map_is_there_in_the_order_of_the_tree(self):
        routing = random_routing()
        page = Page(render_report(routing))
        matrix = analysis.task_skill_matrix(routing)[analysis.task_order(routing)]
        assert page.texts["td"][:20] == [f"{value:.2f}" for value in matrix.flatten().tolist()]

    def test_the_layers_metrics_are_there(self):
        routing = random_routing()
        page = Page(render_report(routing))
        shown = {row[0]: row[1:] for row in page.rows}
        expected = {"mean of 3": analysis.mean_metrics(routing), **analysis.layer_metrics(routing)}
        for name, metrics in expected.items():
            numbers = [metrics.discreteness, metrics.sparsity, metrics.usage, metrics.effective_skills]
            assert [float(cell) for cell in shown[name]] == pytest.approx(numbers, abs=0.005)

    def test_each_task_has_its_top_skills_and_its_nearest_task(self):
        routing = routing_of([[[0.1, 0.4, 0.5]], [[0.1, 0.3, 0.6]], [[0.9, 0.1, 0.0]]], names=["rte", "cb", "sst2"])
        page = Page(render_report(routing))
        effective = f"{analysis.effective_skills(routing)[0]:.2f}"
        assert ["rte", "2 (0.50), 1 (0.40), 0 (0.10)", effective, "cb (0.98)"] in page.rows

    def test_the_tree_has_a_leaf_per_task_and_a_branch_per_join(self):
        routing = random_routing(n_tasks=6)
        page = Page(render_report(routing))
        drawn = hierarchy.dendrogram(analysis.task_linkage(routing), no_plot=True)
        assert page.texts["li"] == drawn["ivl"]
        lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
        ends = [[float(point.split(",")[0]) for point in line.split()] for line in lines]
        for end, branch in zip(ends, drawn["dcoord"], strict=True):
            assert end == pytest.approx([99 * value for value in branch], abs=0.01)

    def test_a_chosen_task_is_shown_layer_by_layer(self):
        routing = random_routing()
        page = Page(render_report(routing, task=3))
        assert "3, layer by layer" in page.texts["h2"]
        expected = [f"{value:.2f}" for value in analysis.task_skill_matrix(routing, "layer2")[3].tolist()]
        assert ["layer2", *expected] in page.rows

    def test_of_gates_it_says_nothing_of_skills_or_mixing(self):
        routing = random_gates(n_tasks=4)
        page = Page(render_report(routing, task=1))
        said = [text for tag, texts in page.texts.items() if tag != "style" for text in texts]
        assert not re.search("skill|mix|split|probabilit|even share", " ".join(said), re.I)
        summary = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
        assert {name: summary[name] for name in ("tasks", "rank", "routers")} == {
            "tasks": "4", "rank": "6", "routers": "3",
        }  # fmt: skip
        metrics = analysis.mean_metrics(routing)
        numbers = [f"{x:.3f}" for x in (metrics.distance, metrics.between, metrics.negative)]
        assert ["mean of 3", *numbers, f"{metrics.effective_ranks:.2f}"] in page.rows

    def test_gates_below_one_have_a_colour_of_their_own(self):
        page = Page(render_report(gates_of([[0.5, 1.5], [1.0, 1.0]])))
        shown = [(tag[1].get("class", "").split(), tag[1]["style"]) for tag in page.tags if "--w" in str(tag[1])]
        assert shown == [(["below", "dark"], "--w:1.00"), (["dark"], "--w:1.00"), ([], "--w:0.00"), ([], "--w:0.00")]

    def test_one_task_has_no_tree(self):
        page = Page(render_report(random_routing(n_tasks=1)))
        assert "Tree of tasks" not in page.texts["h2"]
        assert "svg" not in page.texts

    def test_of_very_many_tasks_the_first_are_shown(self):
        page = Page(render_report(random_routing(n_tasks=MOST_TASKS + 5, n_layers=1)))
        assert "Tree of tasks" not in page.texts["h2"]
        assert any("... and 5 more tasks" in text for text in page.texts["p"])

    def test_nothing_is_fetched_and_nothing_runs(self):
        html = render_report(with_config(random_routing()), task=0)
        assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=", html)
        page = Page(html)
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object"}
        policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"

    def test_markup_in_names_is_text(self):
        html = render_report(named(NASTY), title="<b>bold</b> & more", task=0)
        page = Page(html)
        assert "script" not in page.texts
        assert page.texts["h1"] == ["<b>bold</b> & more"]
        assert set(page.texts["li"]) == set(NASTY)
        assert {name for name in page.texts["th"] if name in NASTY} == set(NASTY)
        assert {a["title"] for tag, a in page.tags if tag == "li"} == set(NASTY)
        assert "49" not in page.texts["li"]

    def test_an_unknown_task_is_refused(self):
        with pytest.raises(ValueError, match=r"\[0, 4\], got 9"):
            render_report(random_routing(), task=9)


class TestFile:
    def test_it_is_utf8_and_alone(self, tmp_path):
        path = write_report(named(NASTY), tmp_path / "new" / "report.html", title="Übung")
        assert "<title>Übung</title>" in path.read_text(encoding="utf-8")
        assert list(path.parent.iterdir()) == [path]

    def test_a_failure_leaves_the_report_that_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        path.write_text("old")
        monkeypatch.setattr("os.replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(random_routing(), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def browse(page: Path, profile: Path, *options: str) -> str:
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [BROWSER, "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", f"--user-data-dir={profile}"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome to open the report in")
class TestInABrowser:
    def test_the_rendered_page_says_what_the_routing_says(self, tmp_path):
        routing = named(NASTY)
        path = write_report(routing, tmp_path / "report.html", title="Routing of <mine>", task=1)
        page = Page(browse(path, tmp_path / "profile", "--dump-dom"))
        assert page.texts["h1"] == ["Routing of <mine>"]
        headings = ["Tasks by skills", "a & b, layer by layer", "Tree of tasks", "Tasks", "Layers"]
        assert page.texts["h2"] == headings
        assert set(page.texts["li"]) == set(NASTY)
        assert "script" not in page.texts
        assert sum(tag == "polyline" for tag, _ in page.tags) == len(NASTY) - 1
        values = [f"{value:.2f}" for value in analysis.task_skill_matrix(routing).flatten().tolist()]
        assert sorted(page.texts["td"][: len(values)]) == sorted(values)
        assert f"{analysis.mean_metrics(routing).discreteness:.3f}" in page.texts["td"]

    @pytest.mark.parametrize("width", [500, 1280])
    def test_nothing_is_wider_than_the_window(self, tmp_path, width):
        names = [f"a-task-with-a-name-that-is-too-long-for-any-telephone-{i}" for i in range(4)]
        report = write_report(named(names, n_skills=32), tmp_path / "report.html", task=0)
        measure = f"""<!doctype html><body style="margin:0"><script>
            const frame = document.createElement("iframe");
            frame.style = "width:{min(width, 390) if width == 500 else width}px;height:900px;border:0";
            frame.srcdoc = {as_script(report.read_text(encoding="utf-8"))};
            frame.onload = () => {{
              const root = frame.contentDocument.documentElement;
              document.body.dataset.over = root.scrollWidth - root.clientWidth; }};
            document.body.append(frame);</script>"""
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(measure, encoding="utf-8")
        dom = browse(wrapper, tmp_path / "profile", f"--window-size={width},900", "--dump-dom")
        assert 'data-over="0"' in dom


def as_script(text: str) -> str:
    return json.dumps(text).replace("</", "<\\/")


def test_the_report_of_one_skill_says_first_that_nothing_is_routed():
    said = "There is one skill, so nothing is routed"
    assert said in render_report(random_routing(n_skills=1))
    assert said not in render_report(random_routing(n_skills=2))
    assert said not in render_report(random_gates(r=1))
