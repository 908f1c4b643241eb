"""The kinds of adapter (`PolyConfig.poly_type`), and what each computes with.

May be imported by `compute` and everything above it.
"""

__all__: list[str] = []
