"""Settings of the documentation site: `make docs` builds it, with every warning an error, and needs no network.

Links into the documentation of PEFT, transformers and torch need the inventories of those sites, which Sphinx fetches.
So they are made only when asked for, by `make docs INTERSPHINX=1`, as CI does, and for the sites that answer; else the
same names are plain code.
Names of this package must resolve either way.

`make docs SITE=https://... REPOSITORY=https://...` says where the site will lie, for its sitemap, and where the sources
do, for the links to the repository and to the text of each page; a workflow on GitHub knows the second itself.
"""

import os
import sys
import urllib.request
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent / "src"), str(DOCS / "_extensions")]

import peft_poly  # noqa: E402

project = "peft-poly"
author = "The peft-poly authors"
copyright = "the peft-poly authors"
version = release = peft_poly.__version__
language = "en-GB"
smartquotes_action = "D"  # dashes, which Sphinx itself writes as two hyphens; quotes stay as they are typed

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_help",
    "docstrings",
    "mathml",
    "parameters",
    "repository_files",
    "tables",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!peft_poly(\.\w+)*$)[\s\S]*"),  # all but names of this package
    ("py:.*", r"peft_poly\.compute\.kinds\..*"),  # internal: what stands behind `poly_type`
]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}  # GitHub renders these fences too
myst_heading_anchors = 4  # GitHub's anchors
suppress_warnings = ["myst.strikethrough"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
default_role = "py:obj"  # a name in backticks links to what is documented, and is plain code otherwise
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
highlight_language = "none"
toc_object_entries_show_parents = "hide"

INVENTORIES = {
    "peft": ("https://huggingface.co/docs/peft/main/en/", None),
    "python": ("https://docs.python.org/3/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
    "transformers": ("https://huggingface.co/docs/transformers/main/en/", None),
}


def answers(name, address):
    """Whether a site has its inventory at hand now; Sphinx warns of one that has not, and a warning ends the build."""
    try:
        with urllib.request.urlopen(f"{address}objects.inv", timeout=20):
            return True
    except OSError as error:
        print(f"no links into the documentation of {name}: {error}")
        return False


wanted = INVENTORIES if os.environ.get("INTERSPHINX") == "1" else {}
intersphinx_mapping = {name: place for name, place in wanted.items() if answers(name, place[0])}

html_theme = "furo"
pygments_dark_style = "one-dark"
html_title = f"peft-poly {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_show_sphinx = False
html_math_renderer = "mathml"
copybutton_selector = (
    "div:not(.highlight-text, .highlight-none) > div.highlight > pre"  # what is typed, not what is printed
)
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

if site := os.environ.get("SITE"):
    extensions.append("sphinx_sitemap")
    html_baseurl = site.rstrip("/") + "/"
    sitemap_url_scheme = "{link}"

repository = os.environ.get("REPOSITORY")
if not repository and "GITHUB_REPOSITORY" in os.environ:
    repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
if repository:
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
        "footer_icons": [{"name": "Repository", "url": repository, "html": "Repository", "class": "repository"}],
    }
