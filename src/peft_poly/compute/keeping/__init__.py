"""What layers keep: from token to token within `generate`, and from call to call in a block of `model.serving()`.

May be imported by `compute.kinds` and all above it.
"""

__all__: list[str] = []
