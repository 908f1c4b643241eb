"""Whether routing pays on tasks of one's own: the rivals trained alike, a table with intervals, a verdict in words.

May be imported by the command line.
"""

from .comparison import Comparison, Settings
from .learning.encoder import default_encoder
from .runs import compare_methods
from .table import as_numbers, comparison_table
from .verdict import verdict

__all__ = ["Comparison", "Settings", "as_numbers", "compare_methods", "comparison_table", "default_encoder", "verdict"]
