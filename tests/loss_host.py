"""The host build of the loss kernels: the CUDA kernels' own source, compiled by g++, thread after thread on the CPU."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from megatron_oreal.loss.kernels import Kernels
from megatron_oreal.loss.nvcc import CSRC

HOST_SOURCE = "oreal_host.cpp"
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC")


def compile_host(
    folder: Path, *, threads: int = 256, bytes_in_flight: int = 128, last_thread_first: bool = False
) -> Path:
    """Compile the sources in ``folder``; the result is kept between runs under a name made of all that went into it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, *FLAGS, f"-DOREAL_THREADS={threads}", f"-DOREAL_BYTES={bytes_in_flight}"]
    command.append(f"-DOREAL_LAST_THREAD_FIRST={int(last_thread_first)}")
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([folder / HOST_SOURCE, *folder.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"oreal-host-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{digest.hexdigest()[:20]}.so"
    if not library.is_file():
        partial = cache / f"{library.name}.{os.getpid()}"
        subprocess.run([*command, "-o", str(partial), str(folder / HOST_SOURCE)], check=True)
        os.replace(partial, library)
    return library


@functools.cache
def host_library(threads: int = 256, bytes_in_flight: int = 128) -> Path:
    """Path of the host build with this many threads a block and bytes in flight a thread."""
    return compile_host(CSRC, threads=threads, bytes_in_flight=bytes_in_flight)


@functools.cache
def host_kernels(threads: int = 256, bytes_in_flight: int = 128) -> Kernels:
    """The same, loaded; takes CPU tensors."""
    return Kernels(host_library(threads, bytes_in_flight))
