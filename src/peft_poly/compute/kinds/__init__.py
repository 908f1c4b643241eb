"""The kinds of adapter: what `PolyConfig.poly_type` chooses, each in a file, all in one registry.

A new kind is a file with a `Kind` in it, and its place in `KINDS`. May be imported by `compute` and all above it.
"""

from ...config import KINDS as SETTINGS
from .gates import Gates
from .kind import Kind
from .mixture import Mixture

__all__ = ["KINDS", "Kind"]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Mixture(), Gates())}
SETTINGS.update(KINDS)
