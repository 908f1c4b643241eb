"""Files of the repository on the site: pages that are only an include of one, and links that lead to one.

So `[examples](../examples/README.md)` leads to the file where the repository is read, and to its page on the site. A
link to a script or a picture downloads it, and one to a folder is plain text.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "examples/README.md": "examples.md"}

INCLUDE = re.compile(r"^```\{include\} (?P<file>\S+)\n```$", re.MULTILINE)
FENCE = re.compile(r"^(`{3,}).*?^\1[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<before>!?\[(?P<text>[^\]]*)\])\((?P<path>(?![a-z]+:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def rebased(text, written_in, shown_in):
    """Markdown whose relative links, written for one folder, are made to lead to the same places from another."""

    def link(match):
        path = Path(os.path.normpath(written_in / match["path"]))
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir() or (path.suffix == ".md" and not name.startswith("docs/") and name not in PAGES):
            return match["text"]
        shown = ROOT / "docs" / PAGES[name] if name in PAGES else path
        return f"{match['before']}({os.path.relpath(shown, shown_in)}{match['anchor'] or ''})"

    done, end = [], 0
    for fence in FENCE.finditer(text):  # code is left as it is
        done += [LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, LINK.sub(link, text[end:])])


def read(app, docname, source):
    """Called by Sphinx with the text of each page."""
    folder = Path(app.env.doc2path(docname)).resolve().parent
    included = INCLUDE.search(source[0])
    if included is None:
        source[0] = rebased(source[0], folder, folder)
        return
    path = (folder / included["file"]).resolve()
    app.env.note_dependency(str(path))
    source[0] = rebased(path.read_text(encoding="utf-8"), path.parent, folder)


def setup(app):
    """Change pages as they are read."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
