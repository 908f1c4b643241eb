"""Which task each row of a batch has: what may be passed, the context that layers read, rows by task, `use_task`.

Knows tensors and the config, no layer. May be imported by everything but `config`, `compat` and `router`.
"""

__all__: list[str] = []
