"""To disk and back: saving, loading, reading, conversion, export to plain LoRAs and from them.

May be imported by the verbs, the model and everything above it.
"""

__all__: list[str] = []
