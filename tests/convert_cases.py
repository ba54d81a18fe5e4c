"""The tools of tools/checkpoint_convert in this process, and as users start them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import tiny

TOOLS = tiny.REPOSITORY / "tools" / "checkpoint_convert"


def tool(name: str) -> ModuleType:
    """``hf_to_megatron``, ``megatron_to_hf``, ``megatron_to_megatron`` or ``compare`` as a module."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)


def convert(name: str, *arguments: Any) -> int:
    """Exit status of a tool that runs in this process; on the ranks of a process group it is a team."""
    return tool(name).main([str(argument) for argument in arguments])


def shell(name: str, *arguments: Any, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """A tool as users start it: ``python X.py``, or ``torchrun X.py`` on so many processes."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]  # no name service
        start += [f"--nproc-per-node={ranks}"]
    return tiny._run([*start, str(TOOLS / f"{name}.py"), *map(str, arguments)])


def without_progress(stderr: str) -> list[str]:
    """The lines of standard error but those that tell every few seconds how far it is: on a slow machine only."""
    progress = re.compile(r"(write|compare): \d+/\d+ tensors( \(\d+ %\))?, ")
    return [line for line in stderr.splitlines() if not progress.match(line)]
