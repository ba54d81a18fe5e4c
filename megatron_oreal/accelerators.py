"""``megatron-oreal env``: every accelerated part, whether this machine uses it, and what stands in for a missing one.

Third-party parts are imported in processes of their own: an import that prints, hangs or crashes is a row of the table,
not the end of the command. Parts that are not installed, or need a GPU that is not there, cost no import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform as host
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from megatron_oreal import __version__
from megatron_oreal.errors import UserError
from megatron_oreal.loss import nvcc
from megatron_oreal.loss.kernels import ABI_VERSION, Kernels, LibraryError
from megatron_oreal.loss.library import choose_kernels, packaged_library

_IMPORT_SECONDS = 120
_PACKAGES = ("torch", "megatron-core", "transformers", "triton", "numpy")

Status = Literal["active", "idle", "missing", "broken"]


@dataclass(frozen=True)
class Part:
    """One accelerated part.

    ``status``: ``active``, in use on this machine; ``idle``, installed but without its device, switched off, behind a
    better one or without the layers that call it; ``missing``; ``broken``, installed but not to be loaded or run.
    ``detail``: version, path or reason. ``instead``: what does its work when it is not active. ``use``: what training
    uses it for, and by which config key.
    """

    name: str
    status: Status
    detail: str
    instead: str
    use: str = ""


@dataclass(frozen=True)
class Environment:
    """Devices by name (empty without CUDA), versions by package, and the parts."""

    devices: list[str]
    versions: dict[str, str]
    parts: list[Part]

    def as_json(self) -> str:
        """One JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """The same for a reader."""
        lines = [f"devices   {', '.join(self.devices) or 'no CUDA device: everything runs on the CPU'}"]
        lines += [f"versions  {', '.join(f'{name} {number}' for name, number in self.versions.items())}", ""]
        widths = [max(len(getattr(part, field)) for part in self.parts) for field in ("name", "status")]
        for part in self.parts:
            lines.append(f"{part.name:<{widths[0]}}  {part.status:<{widths[1]}}  {part.detail}")
            if part.use:
                lines.append(f"{'':<{widths[0]}}  {'':<{widths[1]}}  for: {part.use}")
            if part.status != "active":
                lines.append(f"{'':<{widths[0]}}  {'':<{widths[1]}}  instead: {part.instead}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Package:
    """A third-party part: ``module`` must be found, ``test`` must run; ``instead`` and ``use`` as in Part.

    ``needs_layers``: only TransformerEngine's layers call it.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    test: str
    instead: str
    use: str
    needs_cuda: bool = True
    needs_layers: bool = False


_THIRD_PARTY = (
    _Package(
        "TransformerEngine layers",
        "transformer_engine",
        ("transformer-engine", "transformer_engine"),
        "import transformer_engine.pytorch",
        "torch-native layers (parallel.transformer_impl: local)",
        "linear, norm and attention kernels in bf16; parallel.transformer_impl: auto, transformer_engine",
    ),
    _Package(
        "fused Adam (TransformerEngine)",
        "transformer_engine",
        ("transformer-engine", "transformer_engine"),
        "from transformer_engine.pytorch.optimizers import FusedAdam",
        "apex's, else torch's AdamW",
        "the optimizer step of both models, and use_precision_aware_optimizer; always, before apex",
    ),
    _Package(
        "fused Adam (apex)",
        "apex",
        ("apex",),
        "import amp_C; from apex.optimizers import FusedAdam",
        "TransformerEngine's, else torch's AdamW",
        "the optimizer step of both models; always, where TransformerEngine is not",
    ),
    _Package(
        "fused weight gradient (apex)",
        "fused_weight_gradient_mlp_cuda",
        ("apex",),
        "import fused_weight_gradient_mlp_cuda as m; m.wgrad_gemm_accum_fp32",
        "a weight gradient of its own, then added to main_grad",
        "weight gradients added to main_grad inside their GEMM; parallel.gradient_accumulation_fusion: auto, true",
        needs_layers=True,
    ),
    _Package(
        "flash-attn",
        "flash_attn",
        ("flash-attn",),
        "import flash_attn_2_cuda, flash_attn",
        "TransformerEngine's cuDNN attention, or torch's in torch-native layers",
        "attention over packed sequences in TransformerEngine; parallel.attention_backend: auto, flash",
        needs_layers=True,
    ),
    _Package(
        "flash-attn 3 (Hopper)",
        "flash_attn_interface",
        ("flash-attn-3", "flash_attn_3"),
        "import flash_attn_interface",
        "flash-attn, or TransformerEngine's cuDNN attention",
        "the same on Hopper; parallel.attention_backend: auto, flash",
        needs_layers=True,
    ),
    _Package(
        "SGLang",
        "sglang",
        ("sglang",),
        "import sglang",
        "the embedded engine (rollout.engine: embedded)",
        "generation; rollout.engine: sglang",
        needs_cuda=False,
    ),
)


def survey() -> Environment:
    """Look at this machine, without a change to it (but kernels for its GPU may be compiled into the cache)."""
    has_cuda = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if has_cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        devices.append(f"{properties.name} (sm_{properties.major}{properties.minor}, {gib:.0f} GiB)")
    parts = [*_own_kernels(has_cuda), *_third_party(has_cuda)]
    return Environment(devices, _versions(has_cuda), parts)


def _own_kernels(has_cuda: bool) -> list[Part]:
    instead = "the same passes in PyTorch (loss/vocab_parallel.py)"
    path = packaged_library()
    try:
        choice = choose_kernels(torch.device("cuda" if has_cuda else "cpu"))
    except UserError as error:
        return [Part("loss kernels", "broken", str(error), instead)]
    reason = choice.line.removeprefix("loss kernels: ")
    if choice.kernels is not None:
        return [Part("loss kernels", "active", f"{reason}, ABI {ABI_VERSION}", instead)]
    off = os.environ.get("OREAL_KERNELS") == "0"
    if has_cuda:
        installed: Status = "idle" if off else "broken"
        return [Part("loss kernels", installed if path.is_file() else "missing", reason, instead)]
    if not path.is_file():
        compiler = nvcc.find_nvcc()
        mend = f"pip install compiles them with {compiler}" if compiler else "no nvcc found (set OREAL_NVCC)"
        return [Part("loss kernels", "missing", f"not built; {mend}", instead)]
    try:
        info = Kernels(path).build_info
    except LibraryError as error:
        return [Part("loss kernels", "broken", str(error), instead)]
    stale = "" if info["sources"] == nvcc.source_hash() else ", older than its sources: pip install -e . again"
    setting = ", switched off by OREAL_KERNELS=0" if off else ""
    detail = f"no CUDA device{setting}; {path}, sm {info['archs']}, nvcc {info['nvcc']}, ABI {ABI_VERSION}{stale}"
    return [Part("loss kernels", "broken" if stale else "idle", detail, instead)]


def _third_party(has_cuda: bool) -> list[Part]:
    """All tests at once, each in its own process."""
    running: list[tuple[_Package, Part | subprocess.Popen[str]]] = []
    for package in _THIRD_PARTY:
        number = _version(*package.distributions)
        if importlib.util.find_spec(package.module) is None:
            running.append((package, Part(package.name, "missing", "not installed", package.instead, package.use)))
        elif package.needs_cuda and not has_cuda:
            idle = Part(package.name, "idle", f"{number}, no CUDA device", package.instead, package.use)
            running.append((package, idle))
        else:
            command = [sys.executable, "-c", package.test]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            running.append((package, subprocess.Popen(command, text=True, **pipes)))  # type: ignore[call-overload]
    parts = [
        state if isinstance(state, Part) else replace(_tested(package, state), use=package.use)
        for package, state in running
    ]
    by_name = {part.name: part for part in parts}
    if by_name["TransformerEngine layers"].status != "active":
        callees = {package.name for package in _THIRD_PARTY if package.needs_layers}
        for index, part in enumerate(parts):
            if part.name in callees and part.status == "active":
                detail = f"{part.detail}, without TransformerEngine's layers nothing calls it"
                parts[index] = replace(part, status="idle", detail=detail)
    engine, apex = by_name["fused Adam (TransformerEngine)"], by_name["fused Adam (apex)"]
    if engine.status == apex.status == "active":  # Megatron's order of preference
        parts[parts.index(apex)] = replace(
            apex, status="idle", detail=f"{apex.detail}, TransformerEngine's comes first"
        )
    return parts


def _tested(package: _Package, process: subprocess.Popen[str]) -> Part:
    number = _version(*package.distributions)
    try:
        _, errors = process.communicate(timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Part(package.name, "broken", f"{number}: import takes over {_IMPORT_SECONDS} s", package.instead)
    if process.returncode:
        last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return Part(package.name, "broken", f"{number}: {last[:200]}", package.instead)
    return Part(package.name, "active", number, package.instead)


def _versions(has_cuda: bool) -> dict[str, str]:
    found = {"megatron-oreal": __version__, "python": host.python_version()}
    found |= {name: _version(name, default="not installed") for name in _PACKAGES}
    found["CUDA of torch"] = torch.version.cuda or "none (CPU build)"
    if has_cuda:
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        found["cuDNN"] = str(torch.backends.cudnn.version())
    compiler = nvcc.find_nvcc()
    try:
        found["nvcc"] = nvcc.nvcc_version(compiler) if compiler else "none"
    except nvcc.BuildError:
        found["nvcc"] = f"{compiler} does not answer"
    return found


def _version(*distributions: str, default: str = "unknown version") -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return default
