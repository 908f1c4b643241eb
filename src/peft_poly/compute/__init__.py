"""How one adapted layer computes: mixing, paths, the autograd node, what is kept, base layers and merging.

Speaks of a layer by the parts it needs (`adapted.py`). May be imported by the layer and everything above it.
"""

__all__: list[str] = []
