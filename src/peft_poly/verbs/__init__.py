"""The verbs that a task-routed model has, mixins of `PolyModel`: on its tasks, and out of it.

May be imported by the model and everything above it.
"""

__all__: list[str] = []
