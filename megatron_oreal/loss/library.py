"""Finding the compiled loss kernels: the packaged library, else one compiled on the spot, else none, and why.

Environment:

``OREAL_KERNELS``
    ``auto`` (default): use what is found. ``0``: always the PyTorch path. ``1``: without kernels on a CUDA device it is
    an error. Anything else: path of a library to load; a host build of the kernels (tests/loss_host.py) serves CPU
    tensors.
``OREAL_CACHE``
    Folder of libraries compiled at run time; default ``$XDG_CACHE_HOME/megatron_oreal`` or
    ``~/.cache/megatron_oreal``. ``OREAL_NVCC``: see nvcc.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megatron_oreal.errors import UserError
from megatron_oreal.loss import nvcc
from megatron_oreal.loss.kernels import LABEL_OUTSIDE, Kernels, LibraryError, PackedCoefficients, TokenResults

__all__ = [
    "LABEL_OUTSIDE",
    "KernelChoice",
    "Kernels",
    "LibraryError",
    "PackedCoefficients",
    "TokenResults",
    "choose_kernels",
    "kernels_for",
    "packaged_library",
]


@dataclass(frozen=True)
class KernelChoice:
    """The kernels for a device, or None, and one line that says what is active and why."""

    kernels: Kernels | None
    line: str


def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels for tensors on ``device``, or None: use the PyTorch path. Cached; UserError: see OREAL_KERNELS."""
    return choose_kernels(device).kernels


def choose_kernels(device: torch.device) -> KernelChoice:
    """The same with its reason, for a log line."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _choose(device.type, index, os.environ.get("OREAL_KERNELS", "auto"))


@cache
def _choose(device_type: str, index: int | None, wanted: str) -> KernelChoice:
    if wanted == "0":
        return KernelChoice(None, "loss kernels: off (OREAL_KERNELS=0); PyTorch path")
    if wanted not in ("auto", "1"):
        return _explicit(Path(wanted), device_type, index)
    if device_type != "cuda":
        return KernelChoice(None, f"loss kernels: none for device {device_type}; PyTorch path")
    capability = torch.cuda.get_device_capability(index)
    reasons = []
    for find in (_packaged, _compiled_here):
        try:
            kernels, how = find(capability)
            _probe(kernels, index)
            return KernelChoice(kernels, f"loss kernels: {how}, {kernels.path}, sm {kernels.build_info['archs']}")
        except (LibraryError, nvcc.BuildError, OSError) as error:
            reasons.append(str(error))
    line = f"loss kernels: none ({'; '.join(reasons)}); PyTorch path"
    if wanted == "1":
        raise UserError(f"OREAL_KERNELS=1 but there are no {line}")
    return KernelChoice(None, line)


def _explicit(path: Path, device_type: str, index: int | None) -> KernelChoice:
    if not path.is_file():
        raise UserError(f"OREAL_KERNELS is {str(path)!r}; it must be auto, 0, 1 or the path of a library")
    try:
        kernels = Kernels(path)
        if kernels.device_type != device_type:
            line = f"loss kernels: {path} is for {kernels.device_type}; PyTorch path on {device_type}"
            return KernelChoice(None, line)
        _probe(kernels, index)
    except LibraryError as error:
        raise UserError(f"OREAL_KERNELS: {error}") from error
    return KernelChoice(kernels, f"loss kernels: {path} (OREAL_KERNELS)")


def _probe(kernels: Kernels, index: int | None) -> None:
    """Raises LibraryError unless kernels for CUDA run on the device: what loads may be too new for the driver."""
    with torch.cuda.device(index) if kernels.device_type == "cuda" else contextlib.nullcontext():
        kernels.probe()


def packaged_library() -> Path:
    """Where ``pip install`` puts the library."""
    return Path(__file__).with_name(nvcc.LIBRARY_NAME)


def _packaged(capability: tuple[int, int]) -> tuple[Kernels, str]:
    path = packaged_library()
    if not path.is_file():
        raise LibraryError("not built by pip install")
    kernels = Kernels(path)
    if kernels.build_info["sources"] != nvcc.source_hash():
        raise LibraryError(f"{path} is older than its sources; run pip install -e . again")
    if not runs_on(kernels.build_info["archs"].split(","), capability):
        raise LibraryError(f"{path} has no code for compute capability {capability[0]}.{capability[1]}")
    return kernels, "packaged"


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a library with these targets has machine code or portable code for a device."""
    number = capability[0] * 10 + capability[1]
    for arch in archs:
        match = re.fullmatch(r"(\d+)([af]?)(\+ptx)?", arch)
        if match is None:
            continue
        target, specific, portable = int(match.group(1)), match.group(2), match.group(3)
        if specific == "a":
            fits = number == target
        elif portable:
            fits = number >= target
        else:
            fits = number // 10 == target // 10 and number >= target
        if fits:
            return True
    return False


def _compiled_here(capability: tuple[int, int]) -> tuple[Kernels, str]:
    """Compile for this device into the cache, once for all processes of the machine."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        raise LibraryError("no nvcc to compile them here")
    if capability < (8, 0):
        raise LibraryError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")
    command = nvcc.compile_command(compiler, Path("library"), [arch], strict=False)
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:24]
    path = _cache_folder() / f"oreal-{key}.so"
    if not path.is_file():
        with _locked(path.with_suffix(".lock")):
            if not path.is_file():
                nvcc.compile_library(compiler, path, [arch])
    return Kernels(path), "compiled on this machine"


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron_oreal"
    folder = Path(os.environ.get("OREAL_CACHE", default)).expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks all of them compile, and the last rename wins."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
