"""Task-routed adapters for Hugging Face PEFT: Polytropon (arXiv 2202.13914) and Multi-Head Routing (arXiv 2211.03831).

Importing the package registers the method `PEFT_POLY` with PEFT; nothing else happens on import.
"""

from . import compat

compat.check_peft()
compat.add_peft_type()

from .adapter.labelled.heads import TaskHeads  # noqa: E402
from .checkpoints.conversion import convert_checkpoint  # noqa: E402
from .checkpoints.export import export_lora  # noqa: E402
from .checkpoints.from_loras import from_loras  # noqa: E402
from .config import PolyConfig  # noqa: E402
from .layer import Linear, PolyLayer  # noqa: E402
from .model import PolyModel  # noqa: E402
from .registration import register  # noqa: E402
from .router import PolyRouter, Router, get_router  # noqa: E402
from .tasks.choosing import use_task  # noqa: E402
from .training.collator import DataCollatorWithTaskIds  # noqa: E402
from .training.metrics import PerTaskMetrics  # noqa: E402
from .training.optimizer import create_poly_optimizer  # noqa: E402
from .training.sampling import TaskSampler, TaskSamplingMixin  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "DataCollatorWithTaskIds",
    "Linear",
    "PerTaskMetrics",
    "PolyConfig",
    "PolyLayer",
    "PolyModel",
    "PolyRouter",
    "Router",
    "TaskHeads",
    "TaskSampler",
    "TaskSamplingMixin",
    "convert_checkpoint",
    "create_poly_optimizer",
    "export_lora",
    "from_loras",
    "get_router",
    "use_task",
]

register()
