"""What a router has learned: numbers, pictures, a report.

Pictures and the report import matplotlib and scipy when they are drawn. May be imported by the command line.
"""

from .analysis import (
    GateMetrics,
    Metrics,
    Routing,
    effective_skills,
    layer_metrics,
    mean_metrics,
    nearest_tasks,
    read_routing,
    task_linkage,
    task_order,
    task_similarity,
    task_skill_matrix,
    top_skills,
)
from .plots import plot_dendrogram, plot_heat_map, plot_heat_maps, save_plots
from .report import write_report

__all__ = [
    "GateMetrics",
    "Metrics",
    "Routing",
    "effective_skills",
    "layer_metrics",
    "mean_metrics",
    "nearest_tasks",
    "plot_dendrogram",
    "plot_heat_map",
    "plot_heat_maps",
    "read_routing",
    "save_plots",
    "task_linkage",
    "task_order",
    "task_similarity",
    "task_skill_matrix",
    "top_skills",
    "write_report",
]
