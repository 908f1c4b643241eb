"""`command-help`: the arguments and options of a `peft-poly` command, read from the program itself."""

import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from peft_poly_cli import app as command_line


def prose(text):
    """Text in which options are code."""
    parts = re.split(r"(--[a-z][a-z-]*)", text)
    return [nodes.literal("", part) if part.startswith("--") else nodes.Text(part) for part in parts]


class CommandHelp(SphinxDirective):
    """The directive; its argument is the command's name."""

    required_arguments = 1

    def run(self):
        """A paragraph of what the command does, and a list of its arguments and options."""
        group = get_command(command_line)
        command = group.commands[self.arguments[0]]
        context = command.make_context("peft-poly " + self.arguments[0], [], resilient_parsing=True)
        text = command.help.partition("[dim]")[0].strip().replace("\n\n", "\n").splitlines()
        listed = nodes.definition_list()
        for parameter in command.get_params(context):
            name, what = parameter.get_help_record(context)
            name = re.sub(r" <(str|path)>$", "", name)  # some versions of typer write it behind an argument
            item = nodes.definition_list_item("", nodes.term("", "", nodes.literal("", name)))
            item += nodes.definition("", nodes.paragraph("", "", *prose(what)))
            listed += item
        return [nodes.paragraph("", "", *prose(" ".join(text))), listed]


def setup(app):
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
