"""GPUs, their driver and what connects them, read from torch, ``nvidia-smi`` and sysfs; no GPU memory is touched.

The functions that decide from text are pure; what other machines print is their test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from megatron_oreal.errors import UserError
from megatron_oreal.platform import choose_device
from megatron_oreal.preflight.result import Check, fail, ok, warning

MINIMUM_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}
"""CUDA major -> the oldest Linux driver for any of its minor versions (NVIDIA, CUDA Compatibility, Table 1)."""

_SMI_TIMEOUT_S = 60
_BUSY_BYTES = 2 * 2**30
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FOUND = re.compile(r"found version (\d+)")

Link = Literal["NVLink", "PCIe", "none"]


def torch_says() -> str | None:
    """Why torch cannot use CUDA, in its own words; None when it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "Torch not compiled with CUDA enabled"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no CUDA device is visible"


def driver_problem(torch_cuda: str | None, driver: str | None, said: str | None) -> str | None:
    """What to mend about the driver, None when it is not to blame. Pure.

    ``torch_cuda``: ``torch.version.cuda`` ("12.8"; None: a build without CUDA); ``driver``: NVML's version
    ("535.183.01"; None: none loaded); ``said``: torch's complaint, None when it sees its GPUs.
    """
    if said is None or torch_cuda is None:
        return None  # what works is new enough, with or without NVIDIA's compatibility packages
    major = int(torch_cuda.split(".")[0])
    least = MINIMUM_DRIVER.get(major)
    if (found := _FOUND.search(said)) is not None:
        number = int(found[1])  # as cudaDriverGetVersion counts: 12040 is 12.4
        has = f"supports CUDA {number // 1000}.{number % 1000 // 10}"
        named = f"{driver}, which {has}" if driver else f"one that {has}"
    elif driver and least and _numbers(driver) < _numbers(least):
        named = driver
    elif "803" in said:
        return (
            f"driver {driver or 'of an unknown version'}: its kernel module and libcuda.so are of different versions "
            "(CUDA error 803): reboot after the update, or take the CUDA compatibility package out of LD_LIBRARY_PATH"
        )
    elif "802" in said:
        return (
            f"driver {driver or 'of an unknown version'}: the system is not initialised (CUDA error 802): start "
            "nvidia-fabricmanager of the driver's version"
        )
    elif driver is None:
        return (
            f"no NVIDIA driver: torch is built for CUDA {torch_cuda}: install driver {least or 'for that'} or newer, "
            "and start containers with --gpus all"
        )
    else:
        return None
    return (
        f"driver {named}: torch is built for CUDA {torch_cuda}, which needs driver {least or 'for it'} or newer: "
        "update the driver, or install a torch build for an older CUDA"
    )


def installed_driver() -> str | None:
    """The version of the loaded NVIDIA driver, None without one."""
    answer = _smi("--query-gpu=driver_version", "--format=csv,noheader")
    if answer and re.fullmatch(r"[\d.]+", answer.split()[0]):
        return answer.split()[0]
    try:
        match = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match[1] if match else None


def check_gpus(requested: Literal["auto", "cuda", "cpu"], ranks_per_node: int) -> Iterator[Check]:
    """GPUs present, one a rank, and free; a driver that torch can work with."""
    if requested == "cpu":
        yield ok("gpus", "device=cpu: none needed")
        return
    said, driver = torch_says(), installed_driver()
    if said is not None:
        if _is_wanted(requested, driver) and (problem := driver_problem(torch.version.cuda, driver, said)):
            yield fail("driver", problem)
        yield _no_gpu(requested, said, driver)
        return
    yield ok("driver", f"{driver or 'of an unknown version'}, torch {torch.__version__} for CUDA {torch.version.cuda}")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    if count < ranks_per_node:
        yield fail("gpus", _too_few(count, ranks_per_node))
    elif len(names) > 1:
        yield warning("gpus", f"{count} GPUs of different kinds ({', '.join(names)}): the slowest sets the pace")
    else:
        yield ok("gpus", f"{count} x {names[0]} for {ranks_per_node} ranks")
    yield from _busy_gpus()


def require_gpus(requested: Literal["auto", "cuda", "cpu"], ranks_per_node: int) -> None:
    """Raise ``UserError`` where this node's ranks would not find the GPUs that they need; each rank would say so later.

    With ``auto`` a GPU that torch cannot use is a mistake too: training on a CPU is not what was wanted there.
    """
    said = torch_says() if requested != "cpu" else None
    if said is not None:
        driver = installed_driver()
        if _is_wanted(requested, driver):
            raise UserError(driver_problem(torch.version.cuda, driver, said) or _unseen(requested, said))
    if choose_device(requested) == "cuda" and torch.cuda.device_count() < ranks_per_node:
        raise UserError(_too_few(torch.cuda.device_count(), ranks_per_node))


def _is_wanted(requested: str, driver: str | None) -> bool:
    """Whether a GPU is asked for: by the config, or by being there without being hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return requested == "cuda" or (requested == "auto" and driver is not None and not hidden)


def _too_few(count: int, ranks_per_node: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    return (
        f"{count} GPUs are visible{limited} for --nproc-per-node={ranks_per_node}: start {count} ranks on every node, "
        "or make the others visible"
    )


def _no_gpu(requested: str, said: str, driver: str | None) -> Check:
    if _is_wanted(requested, driver):
        return fail("gpus", _unseen(requested, said))
    return warning("gpus", f"device=auto: torch sees no CUDA device ({_one_line(said)}): the run would use the CPU")


def _unseen(requested: str, said: str) -> str:
    return (
        f"device={requested}: torch sees no CUDA device ({_one_line(said)}): install a CUDA build of torch or make the "
        "GPUs visible, or set device=cpu to go on"
    )


def _one_line(said: str) -> str:
    return " ".join(said.split())[:200]


def _busy_gpus() -> Iterator[Check]:
    answer = _smi("--query-gpu=index,memory.used", "--format=csv,noheader,nounits")
    busy = busy_devices(answer or "")
    if busy:
        gpus = ", ".join(f"GPU {index}: {used / 2**30:.0f} GiB" for index, used in busy.items())
        yield warning(
            "gpus", f"memory is in use already ({gpus}): see nvidia-smi; end what is yours, or choose other GPUs"
        )


def busy_devices(answer: str) -> dict[int, int]:
    """Index -> bytes in use, of GPUs with more than 2 GiB in use; ``answer``: lines ``index, MiB``."""
    found = {}
    for line in answer.splitlines():
        index, _, used = line.partition(",")
        if index.strip().isdigit() and used.strip().isdigit() and int(used) * 2**20 > _BUSY_BYTES:
            found[int(index)] = int(used) * 2**20
    return found


def check_interconnect(device: str, nnodes: int, ranks_per_node: int) -> Iterator[Check]:
    """How the GPUs of this node are connected, and, for several nodes, whether there is RDMA between them."""
    if device == "cpu":
        yield ok("interconnect", "no GPUs: gloo over TCP")
        return
    if ranks_per_node > 1:
        answer = _smi("topo", "-m")
        slowest = slowest_links(answer or "", visible_gpus(ranks_per_node))
        if not slowest:
            yield warning("interconnect", "nvidia-smi topo -m does not say how the GPUs are connected: see --fabric")
        elif all(link.startswith("NV") for link in slowest):
            yield ok("interconnect", f"NVLink between all GPUs ({', '.join(slowest)})")
        else:
            yield warning(
                "interconnect",
                f"GPUs are connected by PCIe ({', '.join(slowest)}): keep parallel.tensor_model_parallel_size within "
                "GPUs that NVLink joins, or at 1",
            )
    if nnodes > 1:
        yield rdma(Path("/sys/class/infiniband"))


def link_kind(ranks_per_node: int) -> Link:
    """NVLink when it joins all pairs of the node's GPUs, else PCIe; none for a single one."""
    if ranks_per_node == 1:
        return "none"
    slowest = slowest_links(_smi("topo", "-m") or "", visible_gpus(ranks_per_node))
    return "NVLink" if slowest and all(link.startswith("NV") for link in slowest) else "PCIe"


def visible_gpus(count: int) -> list[int]:
    """The GPUs of a node's ranks as nvidia-smi numbers them: ``CUDA_VISIBLE_DEVICES`` where it has numbers."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [int(name) for name in named[:count]] if all(map(str.isdigit, named)) else list(range(count))


def slowest_links(topology: str, gpus: Sequence[int]) -> list[str]:
    """Kinds of links between these GPUs in ``nvidia-smi topo -m``, sorted; empty when it does not have them."""
    found = set()
    for line in _ANSI.sub("", topology).splitlines():
        words = line.split()
        row = re.fullmatch(r"GPU(\d+)", words[0]) if words else None
        if row and int(row[1]) in gpus and len(words) > max(gpus) + 1 and words[int(row[1]) + 1] == "X":
            found |= {words[gpu + 1] for gpu in gpus} - {"X"}
    return sorted(found)


def rdma(root: Path) -> Check:
    """What the RDMA devices under sysfs' ``infiniband`` say; NCCL takes TCP sockets where there are none."""
    active, down = rdma_ports(root)
    mend = "NCCL goes over TCP sockets, many times slower: see ibstat, or pass the devices into the container"
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return warning("rdma", f"NCCL_IB_DISABLE=1 in the environment: {mend.split(':')[0]}; unset it")
    if not active:
        return warning("rdma", f"no active RDMA port ({', '.join(down) or 'no devices'}): {mend}")
    text = ", ".join(active)
    return ok("rdma", f"{text}; not active: {', '.join(down)}" if down else text)


def rdma_ports(root: Path) -> tuple[list[str], list[str]]:
    """(active, inactive) ports as ``mlx5_0 400 Gb/sec (4X NDR)``."""
    active: list[str] = []
    down: list[str] = []
    for state in sorted(root.glob("*/ports/*/state")):
        name, rate = state.parents[2].name, state.with_name("rate")
        text = f"{name} {rate.read_text().strip()}" if rate.is_file() else name
        (active if "ACTIVE" in state.read_text() else down).append(text)
    return active, down


def _smi(*arguments: str) -> str | None:
    """What ``nvidia-smi`` prints, None when it is not there, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
