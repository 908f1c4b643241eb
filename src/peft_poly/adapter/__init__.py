"""What becomes of an adapter in a model: its targets, shared routers, growth and the few-shot regimes.

May be imported by `checkpoints`, the verbs, the model and everything above it.
"""

__all__: list[str] = []
