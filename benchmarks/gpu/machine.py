"""What the GPU benchmarks share: a description of the machine, its two ceilings, and how a time is taken."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Device, driver, clocks and versions, as they are now; the card's settings are left alone."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        line = f"nvidia-smi: {error}"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "nvidia_smi": dict(zip(query.split(","), (part.strip() for part in line.split(",")), strict=False)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def attention_backend() -> str:
    """SGLang's ``attention_backend`` here: FA3 on Hopper where SGLang's kernel package has that library, else Triton.

    SGLang itself chooses FA3 on every Hopper, and ends where the package was made without it.
    """
    kernels = importlib.util.find_spec("sgl_kernel")
    folders = [] if kernels is None else kernels.submodule_search_locations or []
    built = any(found for folder in folders for found in Path(folder).glob("flash_ops*.so"))
    return "fa3" if built and torch.cuda.get_device_capability()[0] == 9 else "triton"


def time_ms(
    function: Callable[[], object], *, before: Callable[[], object] | None = None, repeats: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Milliseconds of ``function`` between two events: median, least, greatest; ``before`` runs untimed each time."""
    times = []
    for repeat in range(warmup + repeats):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if repeat >= warmup:
            times.append(start.elapsed_time(end))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ceilings() -> dict[str, float]:
    """Measured limits: a device-to-device copy (bytes read plus written) and a bf16 matrix product, on random data."""
    return {"copy_tb_per_s": copy_bandwidth(), "gemm_tflop_per_s": product_rate()}


def copy_bandwidth(elements: int = 2**31) -> float:
    """TB/s of a bf16 copy, read plus written."""
    source = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
    for part in source.split(2**28):
        part.normal_()
    target = torch.empty_like(source)
    return 4 * elements / time_ms(lambda: target.copy_(source))["median"] / 1e9


def product_rate(size: int = 8192) -> float:
    """TFLOP/s of a square bf16 matrix product."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / time_ms(lambda: a @ b)["median"] / 1e9
