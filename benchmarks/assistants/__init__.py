"""One chat model for many assistants: task-routed adapters beside one shared LoRA, on a real language model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the data, the model and the training are the demo's
