"""How the methods of a comparison are made and trained: encoder, adapters, one trainer for all."""

__all__: list[str] = []
