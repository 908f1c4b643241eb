"""The docstrings' Markdown habits, in the words of reStructuredText: code, fenced examples and indented diagrams."""

import re

CODE = re.compile(r"(?<![`:\w])`([^`]+)`(?![`\w])")
NAME = re.compile(r"[A-Za-z_][\w.]*")


def code_to_literals(line):
    """Turn what stands in backticks, and is no name that could be linked, into a literal."""
    return CODE.sub(lambda match: match[0] if NAME.fullmatch(match[1]) else f"``{match[1]}``", line)


def fences_to_directives(lines):
    """Turn fenced blocks into code-block directives."""
    language, done = None, []
    for line in lines:
        indent, text = line[: len(line) - len(line.lstrip())], line.lstrip()
        if not text.startswith("```"):
            done.append(line if language is None or not text else f"    {line}")
        elif language is None:
            language = {"py": "pycon"}.get(text[3:], text[3:] or "none")
            done += [f"{indent}.. code-block:: {language}", ""]
        else:
            language = None
            done.append("")
    return done


def diagrams_to_literals(lines):
    """Turn the indented paragraphs of a module's docstring into literal blocks."""
    done, inside = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside:
            done += ["::", ""]
        inside = indented or (inside and not line.strip())
        done.append(line)
    return done


def process(app, what, name, obj, options, lines):
    """Called by autodoc for each docstring, which it may change in place."""
    lines[:] = fences_to_directives(map(code_to_literals, lines))
    if what == "module":
        lines[:] = diagrams_to_literals(lines)


def setup(app):
    """Run before napoleon, which would read the fences as text."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
