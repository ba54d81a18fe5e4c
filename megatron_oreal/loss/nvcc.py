"""How the CUDA kernels are compiled: one recipe for ``pip install`` (setup.py) and for compiling at run time.

Standard library only and no import of the package: setup.py loads this file by its path, in a build environment that
has neither torch nor the package's other needs.

Environment (read by setup.py and, but for the first, at run time too):

``OREAL_BUILD_CUDA``
    ``auto`` (default): ``pip install`` compiles the kernels when there is an nvcc, and goes on without them when there
    is none or it fails. ``0``: never. ``1``: a missing nvcc, a compiler warning or a register spill fails the install.
``OREAL_CUDA_ARCHS``
    Targets, separated by ``;``: ``80;90a;100a;90+ptx`` (default; without 100a before CUDA 12.8, which does not know
    it). ``+ptx``: portable code for later GPUs.
``OREAL_NVCC``
    Path of nvcc; default: ``$CUDA_HOME/bin/nvcc``, the PATH, ``/usr/local/cuda/bin/nvcc``.

``python megatron_oreal/loss/nvcc.py`` compiles the packaged library in place, strictly, without an install.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
SOURCE = CSRC / "oreal_loss.cu"
LIBRARY_NAME = "_oreal.so"
DEFAULT_ARCHS = ("80", "90a", "100a", "90+ptx")

_BASE = [
    *("-std=c++17", "-O3", "-shared", "-cudart", "static", "-lineinfo", "--threads", "0"),
    *("-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"),
    *("-Xlinker", "--gc-sections", "-Xlinker", "--exclude-libs=ALL"),
]
_STRICT = [
    *("-Werror", "all-warnings", "-Xcompiler", "-Werror"),
    *("-Xptxas", "-Werror,-warn-spills,-warn-lmem-usage"),
]


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message has its output."""


def find_nvcc() -> str | None:
    """Path of the compiler, or None. ``OREAL_NVCC`` that names no executable counts as none."""
    if "OREAL_NVCC" in os.environ:
        return shutil.which(os.environ["OREAL_NVCC"])
    candidates = [
        os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


@cache
def nvcc_version(nvcc: str) -> str:
    """For example ``13.0.88``. Raises BuildError when the program does not answer like nvcc."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} --version failed: {error}") from error
    match = re.search(r"V(\d+\.\d+\.\d+)", output)
    if match is None:
        raise BuildError(f"{nvcc} --version names no version: {output.strip()[:200]!r}")
    return match.group(1)


def wanted_archs(nvcc: str) -> tuple[str, ...]:
    """``OREAL_CUDA_ARCHS``, or those of the default that this compiler knows."""
    text = os.environ.get("OREAL_CUDA_ARCHS", "")
    archs = tuple(part.strip() for part in text.replace(",", ";").split(";") if part.strip())
    if not archs:
        number = tuple(int(part) for part in nvcc_version(nvcc).split(".")[:2])
        archs = tuple(arch for arch in DEFAULT_ARCHS if arch != "100a" or number >= (12, 8))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+ptx)?", arch):
            raise BuildError(f"OREAL_CUDA_ARCHS names {arch!r}; write for example 80;90a;100a;90+ptx")
    return archs


def source_hash() -> str:
    """16 hex digits over the names and bytes of everything that is compiled."""
    digest = hashlib.sha256()
    for path in sorted([SOURCE, *CSRC.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compile_command(
    nvcc: str, output: Path, archs: Sequence[str], *, strict: bool, defines: Sequence[str] = ()
) -> list[str]:
    """The whole command line; ``defines`` are for the tuning benchmark, see oreal_loss.cu."""
    info = f"archs={','.join(archs)} sources={source_hash()} nvcc={nvcc_version(nvcc)}"
    targets = []
    for arch in archs:
        number = arch.removesuffix("+ptx")
        kind = "compute" if arch.endswith("+ptx") else "sm"
        targets += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
    return [
        *(nvcc, *_BASE, *(_STRICT if strict else []), *targets),
        *(f'-DOREAL_BUILD="{info}"', *(f"-D{define}" for define in defines)),
        *("-o", str(output), str(SOURCE)),
    ]


def compile_library(
    nvcc: str, output: Path, archs: Sequence[str], *, strict: bool = False, defines: Sequence[str] = ()
) -> str:
    """Compile to ``output`` atomically (a reader sees the old file, or the whole new one); returns what nvcc printed.

    Raises BuildError with the end of the compiler's output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        command = compile_command(nvcc, partial, archs, strict=strict, defines=defines)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        if done.returncode:
            raise BuildError(f"{nvcc} failed with status {done.returncode}: {text.strip()[-2000:]}")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return text


def main() -> int:
    """Compile beside this file; the exit status is 1 when that fails."""
    compiler = find_nvcc()
    if compiler is None:
        print("no nvcc found; set OREAL_NVCC", file=sys.stderr)
        return 1
    output = Path(__file__).with_name(LIBRARY_NAME)
    try:
        archs = wanted_archs(compiler)
        compile_library(compiler, output, archs, strict=True)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{output} sm {','.join(archs)} sources {source_hash()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
