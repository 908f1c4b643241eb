"""Draws the diagram of the page "How routing works".

    python docs/images/how_routing_works.py > docs/images/how-routing-works.svg

A mixed pair has the colour that its mixing weights make of the colours of the skills.
"""

SKILLS = ("#1f9e89", "#3f78d0", "#a456d6", "#e2893c")
TASKS = {
    "rte": ((0.40, 0.25, 0.25, 0.10), (0.25, 0.50, 0.15, 0.10)),
    "sst2": ((0.60, 0.30, 0.05, 0.05), (0.05, 0.10, 0.25, 0.60)),
    "boolq": ((0.10, 0.10, 0.45, 0.35), (0.45, 0.15, 0.30, 0.10)),
}
CHOSEN = "sst2"

STYLE = """
  svg { --paper: #ffffff; --ink: #1c2530; --soft: #5a6675; --line: #8592a3; --frozen: #e9edf2; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #14181e; --ink: #e8ecf1; --soft: #a3afbd; --line: #7b8898; --frozen: #2a323d; } }
  text { font: 16px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
    fill: var(--ink); text-anchor: middle; }
  .code { font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; font-size: 15px; }
  .soft { fill: var(--soft); font-size: 14.5px; }
  .left { text-anchor: start; } .right { text-anchor: end; }
  .paper { fill: var(--paper); } .frozen { fill: var(--frozen); stroke: var(--line); }
  .arrow { fill: none; stroke: var(--line); stroke-width: 2; marker-end: url(#tip); }
  .wire { fill: none; stroke: var(--line); stroke-width: 2; }
  .tip { fill: var(--line); } .box { fill: none; stroke: var(--ink); stroke-width: 1.6; }
  .panel { fill: none; stroke: var(--line); stroke-dasharray: 4 4; }
  .cut { stroke: var(--paper); stroke-width: 3; }
"""


def rectangle(x, y, width, height, fill=None, classes="", opacity=1.0, radius=3):
    """One rectangle, coloured or styled by its class."""
    look = f'fill="{fill}" fill-opacity="{opacity:.2f}"' if fill else f'class="{classes}"'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" {look}/>'


def label(x, y, text, classes=""):
    """One line of text, in the middle of x unless its class says otherwise."""
    return f'<text x="{x}" y="{y}" class="{classes}">{text}</text>'


def path(points, classes="arrow"):
    """A line through points."""
    return f'<path class="{classes}" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def mixed(weights):
    """The colour that mixing weights make."""
    channels = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SKILLS]
    sums = (sum(w * channel[i] for w, channel in zip(weights, channels, strict=True)) for i in range(3))
    return "#" + "".join(f"{round(value):02x}" for value in sums)


def top():
    """Base layer, mixed pair and sum."""
    first, second = (mixed(weights) for weights in TASKS[CHOSEN])
    return [
        rectangle(20, 112, 24, 56, classes="frozen"),
        rectangle(20, 170, 24, 56, classes="frozen"),
        label(32, 100, "x", "code"),
        label(32, 246, "in", "soft"),
        rectangle(150, 24, 340, 52, classes="frozen", radius=6),
        label(320, 56, "base layer, frozen"),
        path([(44, 169), (180, 169)]),
        path([(90, 169), (90, 50), (146, 50)]),
        path([(490, 50), (572, 50), (572, 150)]),
        rectangle(184, 112, 44, 56, first),
        rectangle(184, 170, 44, 56, second),
        label(206, 104, "A_t (in, r)", "code"),
        path([(228, 169), (364, 169)]),
        label(296, 159, "· alpha / r", "code"),
        rectangle(368, 147, 56, 44, first),
        rectangle(426, 147, 56, 44, second),
        label(425, 136, "B_t (r, out)", "code"),
        path([(482, 169), (553, 169)]),
        '<circle cx="572" cy="169" r="16" class="box"/>',
        path([(564, 169), (580, 169)], "box"),
        path([(572, 161), (572, 177)], "box"),
        path([(588, 169), (618, 169)]),
        label(628, 174, "y", "code"),
    ]


def inventory():
    """The skills of the layer, and how they come to the mixed pair."""
    drawn = [rectangle(116, 282, 424, 140, classes="panel", radius=8)]
    for skill, colour in enumerate(SKILLS):
        x, y = 148 + 32 * skill, 298 + 24 * skill
        drawn += [rectangle(x, 298, 24, 40, colour), rectangle(x, 341, 24, 40, colour)]
        drawn += [rectangle(374, y, 50, 17, colour), rectangle(427, y, 50, 17, colour)]
    return [
        *drawn,
        path([(206, 282), (206, 232)]),
        path([(425, 282), (425, 197)]),
        label(216, 262, "mix A, split by split", "soft left"),
        label(435, 262, "mix B", "soft left"),
        label(214, 408, "A (h, k, in/h, r)", "code"),
        label(425, 411, "B (h, k, r, out/h)", "code"),
        label(320, 330, "k skills,", "soft"),
        label(320, 350, "cut into", "soft"),
        label(320, 370, "h splits", "soft"),
    ]


def router():
    """One row per task; the row of the chosen one leads to the inventory."""
    drawn = []
    for row, (task, splits) in enumerate(TASKS.items()):
        y = 494 + 32 * row
        drawn.append(label(166, y + 18, task, "code right"))
        for split, weights in enumerate(splits):
            for skill, weight in enumerate(weights):
                x = 182 + 148 * split + 33 * skill
                drawn.append(rectangle(x, y, 30, 26, SKILLS[skill], opacity=0.12 + 1.4 * weight))
        if task == CHOSEN:
            drawn += [
                rectangle(177, y - 4, 290, 34, classes="box", radius=6),
                path([(20, y + 13), (104, y + 13)]),
                label(20, y, "task t", "soft left"),
            ]
    return [
        *drawn,
        label(248, 482, "split 0", "soft"),
        label(396, 482, "split 1", "soft"),
        path([(320, 520), (320, 428)]),
        label(330, 452, "w (h, k)", "code left"),
        label(486, 530, "router:", "soft left"),
        label(486, 550, "a row for each task", "soft left"),
    ]


def draw():
    """The whole diagram."""
    lines = "\n".join([rectangle(0, 0, 640, 604, classes="paper", radius=10), *top(), *inventory(), *router()])
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 604" role="img">
<title>How routing works</title>
<desc>The router has a row of mixing weights for each task. The row of the task mixes the skills of the layer, split by
split, into one pair A_t and B_t. The input goes through the frozen base layer and through the pair; the outputs are
added.</desc>
<style>{STYLE}</style>
<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L10 5 L0 10 z" class="tip"/></marker></defs>
{lines}
</svg>
"""


if __name__ == "__main__":
    print(draw(), end="")
