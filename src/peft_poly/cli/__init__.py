"""`peft-poly`: the work behind the commands, tables, and how the program speaks.

May be imported by nothing but the program.
"""

__all__: list[str] = []
