"""Where the rows of a call are in the input of a layer: told by the call, followed through the operations of a model.

May be imported by the layer and everything above it.
"""

__all__: list[str] = []
