"""Settings every test runs under: no network, few threads, and process state put back afterwards."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


@pytest.fixture(autouse=True)
def _process_state():
    torch.manual_seed(0)
    dtype, environment = torch.get_default_dtype(), dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():  # what a Trainer says to accelerate outlives it
        del os.environ[name]
    torch.set_default_dtype(dtype)
    torch._dynamo.reset()
    if "matplotlib.pyplot" in sys.modules:  # pages that draw leave their pictures open
        sys.modules["matplotlib.pyplot"].close("all")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "transformers_door" in item.keywords and Version(MIN_PEFT_VERSION) > Version(peft.__version__):
            item.add_marker(pytest.mark.skip(reason=f"transformers wants PEFT {MIN_PEFT_VERSION} for its add_adapter"))
        if (newer := item.get_closest_marker("transformers_5")) and Version(transformers.__version__).major < 5:
            item.add_marker(
                pytest.mark.skip(reason=f"transformers {transformers.__version__} {newer.kwargs['reason']}")
            )
        if "slow" in item.keywords and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
