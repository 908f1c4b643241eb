"""Tables that a phone can show: each cell knows the heading of its column, so that a row may become a card."""

from docutils import nodes
from sphinx.writers.html5 import HTML5Translator

MOST_COLUMNS = 3  # a table of more is shown row by row on a narrow screen; site.css does it


def process(app, doctree):
    """Called by Sphinx for each page that was read."""
    for table in doctree.findall(nodes.table):
        rows = [[entry for entry in row if isinstance(entry, nodes.entry)] for row in table.findall(nodes.row)]
        if not rows or len(rows[0]) <= MOST_COLUMNS:
            continue
        table["classes"].append("wide")
        headings = [entry.astext() for entry in rows[0]]
        for row in rows[1:]:
            for heading, entry in zip(headings, row, strict=True):
                entry["heading"] = heading


class Translator(HTML5Translator):
    """Writes the heading of a cell as an attribute that CSS can show."""

    def starttag(self, node, tagname, *args, **attributes):
        """Write the first tag of an element."""
        if tagname == "td" and "heading" in node:
            attributes["data-heading"] = node["heading"]
        return super().starttag(node, tagname, *args, **attributes)


def setup(app):
    """Run when pages are read and written."""
    app.connect("doctree-read", process)
    app.set_translator("html", Translator)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
