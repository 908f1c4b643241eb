"""Tasks with labels of their own: a head for each, where it is in a classifier, the loss of its kind of labels.

May be imported by the rest of `adapter` and everything above it.
"""

__all__: list[str] = []
