"""Draws the picture of the page "Design": the package floor by floor, from the imports of its files.

    python docs/images/the_house.py > docs/images/the-house.svg

A floor stands above all that it imports. The arcs are imports, from the upper floor to the lower.
"""

import ast
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src/peft_poly"
FRONT = ("__init__", "registration", "model", "layer", "router", "config", "compat", "recommended")
WIDTH, LEFT, NAME, LINE, GAP = 860, 118, 128, 19, 10

STYLE = """
  svg { --paper: #ffffff; --ink: #1c2530; --soft: #5a6675; --line: #8592a3; --wing: #e9edf2; --door: #dbeae6; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #14181e; --ink: #e8ecf1; --soft: #a3afbd; --line: #7b8898; --wing: #2a323d; --door: #24423b; } }
  text { font: 14.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
    fill: var(--ink); }
  .name { font-weight: 600; font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; }
  .rooms { fill: var(--soft); font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace;
    font-size: 13px; }
  .wing { fill: var(--wing); } .door { fill: var(--door); }
  .arc { fill: none; stroke: var(--line); stroke-opacity: 0.55; stroke-width: 1.3; }
"""


def rooms():
    """The files of each floor: a wing's by their names, a file at the front by itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 1:
            found.setdefault(parts[0], [])
        elif parts[-1] != "__init__":
            found.setdefault(parts[0], []).append("/".join(parts[1:]))
    found.pop("__main__", None)
    return found


def imports(floors):
    """Which floor imports which."""
    arrows = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                inside = parts[: len(parts) - node.level]
                for alias in node.names:
                    target = [*inside, *(node.module or alias.name).split(".")][0]
                    if target in floors and target != parts[0] and parts[0] in floors:
                        arrows.add((parts[0], target))
    return arrows


def stack(floors, arrows):
    """The floors from the top down, each above all that it imports."""
    height = {}

    def level(floor):
        if floor not in height:
            height[floor] = 1 + max((level(below) for above, below in arrows if above == floor), default=0)
        return height[floor]

    order = {name: place for place, name in enumerate(FRONT)}
    return sorted(floors, key=lambda floor: (-level(floor), order.get(floor, len(order)), floor))


def draw():
    """The picture."""
    floors = rooms()
    arrows = imports(floors)
    y, middle, parts = 12, {}, []
    for floor in stack(floors, arrows):
        lines = textwrap.wrap("  ".join(floors[floor]).replace(" ", "\u00a0").replace("\u00a0\u00a0", " "), 78) or [""]
        height = 14 + LINE * len(lines)
        look = "wing" if floors[floor] else "door"
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 12}" height="{height}" rx="4" class="{look}"/>')
        name = f"{floor}/" if floors[floor] else f"{floor}.py"
        parts.append(f'<text x="{LEFT + 12}" y="{y + 21}" class="name">{name}</text>')
        for index, line in enumerate(lines):
            parts.append(f'<text x="{LEFT + 12 + NAME}" y="{y + 21 + LINE * index}" class="rooms">{line}</text>')
        middle[floor] = y + height / 2
        y += height + GAP
    for above, below in sorted(arrows):
        start, end = middle[above], middle[below]
        bend = LEFT - min(104, 14 + (end - start) / 6)
        curve = f"M{LEFT} {start:g} C{bend:g} {start:g} {bend:g} {end:g} {LEFT} {end:g}"
        parts.append(f'<path class="arc" d="{curve}"/>')
    title = "The package floor by floor; each floor imports only from floors below it"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>"
    )


if __name__ == "__main__":
    print(draw())
