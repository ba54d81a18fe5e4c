"""GPUs that can be planned for: peak rates by the vendor's data sheet, memory as the CUDA driver reports it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_oreal.errors import UserError, nearest
from megatron_oreal.planner.types import GIB

GBIT = 1e9 / 8


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are peaks; bandwidths are bytes a second in one direction.

    ``memory_bytes``: what ``cudaMemGetInfo`` calls the total, which is a few per cent below the data sheet's decimal
    gigabytes. ``flops``: dense bf16 operations a second. ``nvlink``: to the other GPUs of the node (PCIe where there
    is no NVLink). ``network``: to other nodes, for each GPU: the adapters of the vendor's reference system, which
    sites undercut; ``--network-gbps`` overrides it. ``pcie``: to host memory.
    """

    name: str
    memory_bytes: int
    flops: float
    hbm: float
    nvlink: float
    network: float
    pcie: float
    source: str

    def with_overrides(self, memory_gib: float | None = None, network_gbps: float | None = None) -> Device:
        """The same with another memory (GiB) or network (Gbit/s a GPU)."""
        changed = self
        if memory_gib is not None:
            changed = replace(changed, memory_bytes=int(memory_gib * GIB))
        if network_gbps is not None:
            changed = replace(changed, network=network_gbps * GBIT)
        return changed


_ALL = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5: 80 GB, 3.35 TB/s, bf16 1,979 TFLOP/s with sparsity, half of it
    # without; NVLink 900 GB/s in both directions together; PCIe 5 128 GB/s. DGX H100: one 400 Gb/s ConnectX-7 a GPU.
    Device("h100", int(79.1 * GIB), 989.5e12, 3.35e12, 450e9, 400 * GBIT, 64e9, "NVIDIA H100 SXM data sheet; DGX H100"),
    # NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, all else as H100.
    Device("h200", int(139.7 * GIB), 989.5e12, 4.8e12, 450e9, 400 * GBIT, 64e9, "NVIDIA H200 SXM data sheet; DGX H200"),
    # NVIDIA A100 80GB data sheet, SXM4: 2,039 GB/s, bf16 312 TFLOP/s dense, NVLink 600 GB/s both directions, PCIe 4
    # 64 GB/s. DGX A100: one 200 Gb/s ConnectX-6 a GPU.
    Device(
        "a100-80g", int(79.1 * GIB), 312e12, 2.039e12, 300e9, 200 * GBIT, 32e9, "NVIDIA A100 SXM data sheet; DGX A100"
    ),
    # NVIDIA DGX B200 data sheet, of 8 GPUs: 1,440 GB, 64 TB/s, 14.4 TB/s of NVLink; HGX B200: bf16 4.5 PFLOP/s a GPU
    # with sparsity. One 400 Gb/s ConnectX-7 a GPU.
    Device("b200", int(178.3 * GIB), 2250e12, 8e12, 900e9, 400 * GBIT, 64e9, "NVIDIA HGX and DGX B200 data sheets"),
    # NVIDIA H20 data sheet: 96 GB, 4.0 TB/s, bf16 148 TFLOP/s dense, NVLink 900 GB/s, PCIe 5; network as HGX H100.
    Device("h20", int(95.0 * GIB), 148e12, 4.0e12, 450e9, 400 * GBIT, 64e9, "NVIDIA H20 data sheet; HGX network"),
    # NVIDIA L40S data sheet: 48 GB with ECC, 864 GB/s, bf16 362.05 TFLOP/s dense, PCIe 4 64 GB/s, no NVLink. The
    # reference system has one 200 Gb/s adapter for two GPUs.
    Device("l40s", int(44.4 * GIB), 362.05e12, 0.864e12, 32e9, 100 * GBIT, 32e9, "NVIDIA L40S data sheet; OVX L40S"),
)
DEVICES = {device.name: device for device in _ALL}


_TORCH_NAMES = {
    r"\bH100\b": "h100",
    r"\bH200\b": "h200",
    r"\bA100\b.*80GB": "a100-80g",
    r"\bB200\b": "b200",
    r"\bH20\b": "h20",
    r"\bL40S\b": "l40s",
}
_OTHER_VARIANTS = re.compile(r"PCIe|NVL|MIG", re.IGNORECASE)
"""Of the same names, with other peaks."""


def device_of_name(name: str) -> Device | None:
    """The GPU that ``torch.cuda.get_device_name`` calls ``name``; None for one that is not in the table."""
    if _OTHER_VARIANTS.search(name):
        return None
    return next((DEVICES[key] for pattern, key in _TORCH_NAMES.items() if re.search(pattern, name)), None)


def find_device(name: str) -> Device:
    """Look a GPU up; ``UserError`` with the known names when there is none."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"--gpu {name!r} is not known{nearest(name.lower(), DEVICES)}; --help names all")
    return device
