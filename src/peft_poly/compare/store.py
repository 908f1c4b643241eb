"""What is done already: one JSON object a line, in a file that only grows, so that a stopped comparison goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .learning.training import Trained

__all__ = ["Store", "Unit"]


class Unit(NamedTuple):
    """One run, and all that its result depends on.

    Attributes:
        setup: fingerprint of data, encoder and settings.
        method: its name.
        lr: learning rate.
        seed: of everything that is drawn.
    """

    setup: str
    method: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Store:
    """The file of a comparison.

    Attributes:
        path: where it is; it need not exist.
    """

    path: Path

    def read(self) -> dict[Unit, Trained]:
        """What has been written; the last line of a run that was killed while writing it does not count."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return {
            Unit(*(line[name] for name in Unit._fields)): Trained(**{**line["found"], "right": _bits(line["found"])})
            for line in lines
        }

    def add(self, unit: Unit, trained: Trained) -> None:
        """Append a run, after what a killed one may have left of its line is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        right = "".join(str(int(hit)) for hit in trained.right)
        line = json.dumps({**unit._asdict(), "found": {**asdict(trained), "right": right}}) + "\n"
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def _bits(found: dict[str, str]) -> list[bool]:
    return [bit == "1" for bit in found["right"]]
