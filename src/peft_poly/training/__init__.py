"""Training with tasks: the optimizer, the collator, sampling, metrics, and what a `Trainer` learns.

May be imported by the registration and the command line.
"""

from .collator import DataCollatorWithTaskIds
from .metrics import PerTaskMetrics, TaskPrediction
from .optimizer import create_poly_optimizer, poly_parameter_groups
from .sampling import TaskSampler, TaskSamplingMixin, task_probabilities

__all__ = [
    "DataCollatorWithTaskIds",
    "PerTaskMetrics",
    "TaskPrediction",
    "TaskSampler",
    "TaskSamplingMixin",
    "create_poly_optimizer",
    "poly_parameter_groups",
    "task_probabilities",
]
