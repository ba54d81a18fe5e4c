"""What a figure was measured on: processor, GPUs, versions, commit, and what else the machine was doing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "sglang", "transformers", "numpy")
_TIMEOUT_S = 30


def processor() -> str:
    """Return the processor's model name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def processor_and_cores() -> str:
    """Return the same with the number of cores, as the benchmarks' results have it."""
    return f"{processor()}, {os.cpu_count()} cores"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Of Python and each distribution; None for one that is not installed. Imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this node, and its GPUs with the driver (an empty list without one)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"cpu": processor(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": _gpus()}


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each visible GPU: name, driver, memory, power limit; empty where it is not there."""
    keys = ("name", "driver_version", "memory.total", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which(command[0]) is None or visible == "":
        return []
    if visible is not None:
        command += ["-i", visible]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(keys, (cell.strip() for cell in row), strict=False)) for row in rows]


def load_average() -> list[float]:
    """Processes that wanted to run over the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the code that runs, with ``-dirty`` for one with changes; None outside a git checkout."""
    where = folder or Path(__file__).resolve().parents[2]
    if not (where / ".git").exists():
        return None
    command = ["git", "-C", str(where), "describe", "--always", "--abbrev=40", "--dirty", "--match=NOTHING"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
