"""What an interpreter needs before SGLang, or transformers beside SGLang's torchvision, runs without a GPU.

``tests/setup_sglang.sh`` installs it with a ``.pth`` line, so that every process of the environment has it, spawned
ones too. PyPI's torchvision is linked to CUDA: the operators that its import registers kernels for are declared first.
The stand-ins come last on the path, and only where SGLang is told to run on a CPU.
"""

import importlib.abc
import os
import sys
from pathlib import Path

_declared = []
"""torch.library objects undo their declarations when they are collected."""


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.version.cuda and not _declared:
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _declared.append(library)


def install() -> None:
    """Called by the ``.pth`` line, which ``site`` reads twice where lib64 is a link to lib."""
    if any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _BeforeTorchvision())
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        sys.path.append(str(Path(__file__).with_name("oreal_sglang_cpu_standins")))
