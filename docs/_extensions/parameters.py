"""Parameters in the reference: each with its default beside it, and an anchor of its own.

What every config of PEFT has goes behind the settings of ours, and what PEFT itself fills in goes away.
"""

import dataclasses
import inspect

from docutils import nodes
from peft import PeftConfig
from sphinx import addnodes

FILLED_IN_BY_PEFT = ("auto_mapping", "peft_type", "peft_version")


def ours_first(app, what, name, obj, options, signature, returned):
    """Called by autodoc for each signature: that of a config starts with its own settings, which go by keyword."""
    if what != "class" or not issubclass(obj, PeftConfig):
        return None
    own = inspect.signature(obj)
    general = [field.name for field in dataclasses.fields(PeftConfig)]
    shown = [own.parameters[name] for name in own.parameters if name not in FILLED_IN_BY_PEFT]
    shown.sort(key=lambda parameter: parameter.name in general and parameter.name != "task_type")
    by_keyword = [p.replace(kind=p.KEYWORD_ONLY, annotation=p.empty) for p in shown]
    return str(own.replace(parameters=by_keyword, return_annotation=own.empty)), returned


def of(signature):
    """The parameters that a signature has, each with its default, or None where it has none."""
    found = {}
    for parameter in signature.findall(addnodes.desc_parameter):
        name, _, default = parameter.astext().partition("=")
        found[name.partition(":")[0].strip(" *")] = default.strip() or None
    return found


def complete(signature, content):
    """Give each parameter that one entry of the reference lists its default and its anchor."""
    known = of(signature)
    for listed in content.children:
        for name in listed.findall(addnodes.literal_strong) if isinstance(listed, nodes.field_list) else ():
            line = name.parent
            if line.index(name) or name.astext() not in known:
                continue  # an error that is raised, or a name inside a text
            anchor = f"{signature['ids'][0]}.params.{name.astext()}"
            item = line.parent if isinstance(line.parent, nodes.list_item) else line
            item["ids"].append(anchor)
            item["classes"].append("parameter")
            line.append(nodes.reference("", "¶", refid=anchor, internal=True, classes=["headerlink"]))
            if default := known[name.astext()]:
                line[1:1] = [nodes.Text(" "), nodes.literal("", f"= {default}", classes=["default"])]


def process(app, doctree):
    """Called by Sphinx for each page that was read."""
    for entry in doctree.findall(addnodes.desc):
        if entry[0]["ids"]:
            complete(entry[0], entry[-1])


def setup(app):
    """Run when signatures are written and when pages are read."""
    app.connect("autodoc-process-signature", ours_first)
    app.connect("doctree-read", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
