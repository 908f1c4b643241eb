"""The documentation site: it builds without a warning, names every public name, leads nowhere wrong, fetches nothing.

It is built once per test run, and looked at in a headless Chromium where there is one.
"""

from __future__ import annotations

import functools
import http.server
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from sphinx.util.inventory import InventoryFile

import peft_poly

ROOT = Path(__file__).parents[2]
PUBLIC = ("peft_poly", "peft_poly.insight")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
PAGES = (
    "index.html",
    "start.html",
    "how-routing-works.html",
    "guides/tasks.html",
    "reference/config.html",
    "benchmarks/speed.html",
)
PHONE, WIDE = 390, 1400
SITE, REPOSITORY = "https://example.org/peft-poly", "https://github.com/example/peft-poly"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site; the workers of one test run share it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared if "PYTEST_XDIST_WORKER" not in os.environ else shared.parent
    target = shared / "site"
    with FileLock(shared / "site.lock"):
        if not (target / "objects.inv").exists():
            command = [
                sys.executable,
                "-m",
                "sphinx",
                "-W",
                "--keep-going",
                "-q",
                "-b",
                "html",
                "-d",
                shared / "doctrees",
            ]
            env = {**os.environ, "INTERSPHINX": "0", "SITE": SITE, "REPOSITORY": REPOSITORY}
            done = subprocess.run(
                [*command, ROOT / "docs", target], capture_output=True, text=True, env=env, check=False
            )
            assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def documented(site):
    """What the reference defines: names of Python by kind, each with the page that has it."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", os.path.join)
    return {
        name: str(getattr(item, "uri", None) or item[2])
        for kind, names in inventory.items()
        if kind.startswith("py:")
        for name, item in names.items()
    }


class Links(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag in ("img", "script", "iframe", "source"):
            self.loaded.append(attrs.get("src") or "")
        elif tag == "link" and attrs.get("rel") != "canonical":
            self.loaded.append(attrs["href"])


@pytest.fixture(scope="session")
def pages(site):
    return {path: Links(path) for path in sorted(site.rglob("*.html"))}


class TestReference:
    @pytest.mark.parametrize("module", PUBLIC)
    def test_every_public_name_is_in_it(self, documented, module):
        assert not [name for name in importlib.import_module(module).__all__ if f"{module}.{name}" not in documented]

    @pytest.mark.parametrize("name", ["PolyModel", "PolyLayer", "Linear", "Router", "PolyRouter"])
    def test_every_method_that_a_class_has_of_this_package_is_in_it(self, documented, name):
        cls = getattr(peft_poly, name)
        ours = [base for base in cls.__mro__ if base.__module__.startswith("peft_poly")]
        methods = {
            key
            for base in ours
            for key, value in vars(base).items()
            if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
        }
        inherited = [base.__name__ for base in ours[1:]]
        missing = {
            key
            for key in methods - {"extra_repr"}
            if not any(f"peft_poly.{owner}.{key}" in documented for owner in (name, *inherited))
        }
        assert not missing

    def test_every_name_that_a_guide_imports_is_in_it(self, documented):
        imports = re.compile(r"^from (peft_poly[.\w]*) import (.+)$", re.MULTILINE)
        texts = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
        names = {
            f"{module}.{name}" for text in texts for module, all_ in imports.findall(text) for name in all_.split(", ")
        }
        assert names
        assert not names - documented.keys()

    def test_a_setting_can_be_looked_up(self, documented):
        assert documented["peft_poly.PolyConfig"].startswith("reference/config.html")

    def test_each_setting_has_its_default_beside_it_and_an_anchor(self, site, pages):
        page = site / "reference/config.html"
        own = inspect.signature(peft_poly.PolyConfig).parameters
        ours = [name for name in vars(peft_poly.PolyConfig)["__annotations__"] if name in own]
        assert not {f"peft_poly.PolyConfig.params.{name}" for name in ours} - pages[page].anchors
        text = re.sub("<.*?>", "", page.read_text(encoding="utf-8"))
        assert not [name for name in ours if f"{name} = {own[name].default!r} (" not in text.replace("&#39;", "'")]

    def test_the_settings_come_before_what_every_config_of_peft_has(self, site):
        text = re.sub("<.*?>", "", (site / "reference/config.html").read_text(encoding="utf-8"))
        signature = text.partition("class PolyConfig(")[2].partition(")")[0]
        assert signature.index("unknown_task=") < signature.index("revision=")
        assert "peft_version" not in signature

    def test_every_command_and_option_is_in_it(self, site):
        from typer.main import get_command

        from peft_poly_cli import app

        text = (site / "reference/command-line.html").read_text(encoding="utf-8")
        for name, command in get_command(app).commands.items():
            assert f'id="{name}"' in text
            options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
            assert not [option for option in options if option not in text]


class TestLinks:
    def test_every_link_inside_the_site_leads_to_a_page_and_an_anchor(self, site, pages):
        broken = []
        for page, content in pages.items():
            for link in content.links:
                parts = urlsplit(link)
                if parts.scheme or link == "#":
                    continue
                path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
                if not path.exists() or (
                    parts.fragment and path in pages and parts.fragment not in pages[path].anchors
                ):
                    broken.append(f"{page.relative_to(site)}: {link}")
        assert not broken

    def test_a_page_leads_to_its_text_in_the_repository(self, site, pages):
        links = pages[site / "guides/tasks.html"].links
        assert {REPOSITORY, f"{REPOSITORY}/edit/main/docs/guides/tasks.md"} <= set(links)

    def test_the_sitemap_has_every_page(self, site, pages):
        listed = re.findall("<loc>(.*?)</loc>", (site / "sitemap.xml").read_text(encoding="utf-8"))
        assert {f"{SITE}/{page.relative_to(site).as_posix()}" for page in pages} == set(listed)

    def test_every_page_says_the_version(self, pages):
        assert not [page for page in pages if f"peft-poly {peft_poly.__version__}" not in page.read_text("utf-8")]

    def test_nothing_is_loaded_from_elsewhere(self, pages):
        assert not [url for content in pages.values() for url in content.loaded if re.match(r"(https?:)?//", url)]

    def test_every_page_is_reached_from_the_start(self, site, pages):
        seen, pending = set(), [site / "start.html"]
        while pending:
            page = pending.pop()
            seen.add(page)
            targets = {(page.parent / unquote(urlsplit(link).path)).resolve() for link in pages[page].links}
            pending += [target for target in targets & pages.keys() if target not in seen and target not in pending]
        assert {page.relative_to(site).as_posix() for page in pages.keys() - seen} <= {"search.html"}


def test_the_diagram_is_what_its_script_draws():
    images = ROOT / "docs/images"
    drawn = subprocess.run(
        [sys.executable, images / "how_routing_works.py"], capture_output=True, text=True, check=True
    )
    assert drawn.stdout == (images / "how-routing-works.svg").read_text(encoding="utf-8")


def test_the_pictures_of_the_routing_are_those_of_the_notebook():
    images = ROOT / "docs/images"
    drawn = dict(runpy.run_path(str(images / "from_the_tour.py"))["pictures"]())
    assert drawn == {name: (images / name).read_bytes() for name in ("heat-map.png", "dendrogram.png")}


@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def resize(browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(browser, selector: str):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, selector))


class TestInABrowser:
    @pytest.mark.parametrize("width", [WIDE, PHONE])
    @pytest.mark.parametrize("page", PAGES)
    def test_a_page_fits_the_screen_and_complains_of_nothing(self, browser, address, page, width):
        resize(browser, width)
        browser.get(f"{address}/{page}")
        wait_for(browser, "h1")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert not [line for line in browser.get_log("browser") if "favicon" not in line["message"]]

    @pytest.mark.parametrize(("width", "box"), [(WIDE, "pre"), (WIDE, ".table-wrapper"), (PHONE, ".table-wrapper")])
    def test_no_table_scrolls_sideways_and_no_code_is_cut_off(self, browser, address, site, pages, width, box):
        resize(browser, width)
        too_wide = []
        for page in pages:
            browser.get(f"{address}/{page.relative_to(site).as_posix()}")
            too_wide += [(page.name, text) for text in browser.execute_script(
                f"return [...document.querySelectorAll('article {box}')]"
                ".filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText.slice(0, 80))"
            )]  # fmt: skip
        assert not too_wide

    def test_code_can_be_copied_and_output_cannot(self, browser, address):
        resize(browser, WIDE)
        browser.get(f"{address}/start.html")
        assert wait_for(browser, ".highlight-python button.copybtn")
        assert not browser.execute_script("return document.querySelectorAll('.highlight-text button.copybtn').length")

    def test_a_phone_shows_the_heading_beside_each_cell_of_a_wide_table(self, browser, address):
        resize(browser, PHONE)
        browser.get(f"{address}/guides/few-shot.html")
        label = "getComputedStyle(document.querySelector('table.wide td'), '::before').content"
        assert browser.execute_script(f"return {label}") == '"regime"'

    def test_the_start_page_leads_through_all_others(self, browser, address):
        resize(browser, WIDE)
        browser.get(f"{address}/start.html")
        assert "Start" in browser.title
        menu = browser.execute_script("return document.querySelector('.sidebar-tree').innerText")
        assert {"How routing works", "Guides", "Reference", "Benchmarks", "Citation"} <= set(menu.splitlines())
        code = browser.execute_script("return document.querySelector('.highlight-python').innerText")
        assert "task_ids=tasks" in code

    def test_search_finds_the_setting_and_leads_to_it(self, browser, address):
        browser.get(f"{address}/search.html?q=router_temperature")
        assert wait_for(browser, "#search-results li a[href*='reference/config.html']")  # results come one by one
        browser.get(f"{address}/search.html?q=PolyConfig")
        first, *_ = wait_for(browser, "#search-results li a")
        assert "reference/config.html" in first.get_attribute("href")

    def test_the_page_of_the_config_has_every_setting_and_its_default(self, browser, address):
        browser.get(f"{address}/reference/config.html")
        (signature,) = wait_for(browser, "dt#peft_poly\\.PolyConfig")
        assert "r=8" in signature.text
        assert "router_temperature=1.0" in signature.text
        described = {term.text for term in wait_for(browser, "dl.class dd li > p > strong:first-child")}
        ours = set(vars(peft_poly.PolyConfig)["__annotations__"])
        assert ours <= described

    def test_a_guide_shows_its_table_and_code(self, browser, address):
        browser.get(f"{address}/guides/tasks.html")
        assert wait_for(browser, "article table")
        assert any("add_tasks" in block.text for block in wait_for(browser, ".highlight-python"))

    def test_equations_and_the_diagram_are_drawn(self, browser, address):
        browser.get(f"{address}/how-routing-works.html")
        sizes = browser.execute_script(
            "const drawn = [...document.querySelectorAll('article math, article img')];"
            "return drawn.map(element => element.getBoundingClientRect().height);"
        )
        assert len(sizes) >= 8
        assert min(sizes) > 5
        for width in (WIDE, PHONE):
            resize(browser, width)
            cut = browser.execute_script(
                "const boxes = [...document.querySelectorAll('div.math')];"
                "return boxes.filter(box => box.scrollHeight > box.clientHeight).length;"
            )
            assert cut == 0
        assert "mfrac" in browser.execute_script("return document.querySelector('article').innerHTML")
