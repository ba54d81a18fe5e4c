"""Building, finding and refusing the kernels' libraries, on a machine without a GPU."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_host import host_library

from megatron_oreal.errors import UserError
from megatron_oreal.loss import library, nvcc
from megatron_oreal.loss.kernels import ABI_VERSION, Kernels, LibraryError

ROOT = Path(__file__).parents[1]
FUNCTIONS = {
    *("oreal_abi_version", "oreal_build_info", "oreal_error_string", "oreal_probe", "oreal_row_statistics"),
    *("oreal_combine", "oreal_gradient", "oreal_token_weights"),
}


@pytest.fixture
def packaged() -> Path:
    path = library.packaged_library()
    if not path.is_file() and os.environ.get("OREAL_BUILD_CUDA") != "1":
        pytest.skip("installed without an nvcc")
    return path


def fake_nvcc(folder: Path, body: str, version: str = "13.0.1") -> str:
    path = folder / "nvcc"
    head = f'if [ "$1" = --version ]; then echo "release, V{version}"; exit; fi'
    path.write_text(f"#!/bin/sh\n{head}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc")
def test_the_packaged_library_has_every_target_and_belongs_to_these_sources(packaged):
    info = Kernels(packaged).build_info
    assert info["device"] == "cuda"
    assert info["archs"].split(",") == list(nvcc.wanted_archs(nvcc.find_nvcc()))
    assert info["sources"] == nvcc.source_hash()


def test_the_packaged_library_exports_our_functions_alone_and_needs_no_torch(packaged):
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", packaged], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in exported.splitlines() if " T " in line} == FUNCTIONS
    needed = subprocess.run(["objdump", "-p", packaged], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"NEEDED\s+(\S+)", needed)
    assert not re.findall(r"NEEDED\s+\S*(?:torch|cudart|python)\S*", needed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_launch_without_a_gpu_is_an_error_with_cudas_own_words(packaged):
    kernels = Kernels(packaged)
    kernels.device_type = "cpu"  # so that the call goes through to the launch
    with pytest.raises(RuntimeError, match=r"oreal_row_statistics: .*(CUDA|device).* \(code \d+\)"):
        kernels.row_statistics(
            torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), vocab_start=0, vocab_size=8, temperature=1.0
        )
    with pytest.raises(UserError, match=r"logits is torch\.float32 on cpu"):
        Kernels(packaged).row_statistics(
            torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), vocab_start=0, vocab_size=8, temperature=1.0
        )


@pytest.fixture
def driverless(monkeypatch):
    """A GPU of compute capability 9.0 by name, on a machine whose driver cannot run anything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return library._choose.__wrapped__


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_library_that_loads_but_cannot_launch_is_not_used(packaged, driverless, monkeypatch, tmp_path):
    with pytest.raises(LibraryError, match=r"cannot run on this device: .*CUDA.* \(code \d+\)"):
        Kernels(packaged).probe()
    monkeypatch.setenv("OREAL_NVCC", str(tmp_path / "absent"))
    choice = driverless("cuda", 0, "auto")
    assert choice.kernels is None
    assert re.search(r"_oreal\.so cannot run on this device: .*CUDA.* no nvcc .*; PyTorch path$", choice.line)
    for wanted in ("1", str(packaged)):
        with pytest.raises(UserError, match=r"OREAL_KERNELS.* cannot run on this device"):
            driverless("cuda", 0, wanted)


@pytest.mark.skipif(torch.cuda.is_available() or nvcc.find_nvcc() is None, reason="no nvcc, or a GPU")
def test_kernels_compiled_here_are_not_used_either_when_they_cannot_launch(driverless, monkeypatch, tmp_path):
    monkeypatch.setenv("OREAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "packaged_library", lambda: tmp_path / "absent.so")
    choice = driverless("cuda", 0, "auto")
    assert choice.kernels is None
    assert re.search(r"cache/oreal-\w+\.so cannot run on this device", choice.line)


def test_a_library_of_another_abi_is_refused(tmp_path):
    source = f'extern "C" int oreal_abi_version() {{ return {ABI_VERSION + 1}; }}'
    path = tmp_path / "other.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source.encode(), check=True)
    with pytest.raises(
        LibraryError, match=f"ABI version {ABI_VERSION + 1}, this package needs {ABI_VERSION}; build it"
    ):
        Kernels(path)


def test_what_is_no_library_of_ours_is_refused(tmp_path):
    text = tmp_path / "text.so"
    text.write_text("not a library")
    for path in (text, tmp_path / "absent.so", Path(shutil.which("true") or "/bin/true")):
        with pytest.raises(LibraryError, match="cannot be loaded"):
            Kernels(path)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),  # machine code runs on later minor versions
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100a", (10, 3), False),  # "a": exactly this one
        ("100f", (10, 3), True),
        ("90+ptx", (12, 0), True),
        ("90+ptx", (8, 9), False),
        ("80,90a,100a,90+ptx", (7, 5), False),
    ],
)
def test_which_devices_a_library_runs_on(archs, capability, runs):
    assert library.runs_on(archs.split(","), capability) is runs


def test_the_choice_of_a_library(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert library.kernels_for(cpu) is None
    assert "PyTorch path" in library.choose_kernels(cpu).line
    monkeypatch.setenv("OREAL_KERNELS", str(host_library()))
    assert library.kernels_for(cpu).path == host_library()
    assert library.kernels_for(cpu) is library.kernels_for(cpu)
    monkeypatch.setenv("OREAL_KERNELS", "0")
    assert library.kernels_for(cpu) is None
    for value, message in (
        (str(tmp_path / "x.so"), "it must be auto, 0, 1 or the path"),
        (__file__, "cannot be loaded"),
    ):
        monkeypatch.setenv("OREAL_KERNELS", value)
        with pytest.raises(UserError, match=message):
            library.kernels_for(cpu)


def test_a_packaged_library_older_than_its_sources_is_not_used(packaged, monkeypatch):
    assert library._packaged((9, 0))[1] == "packaged"
    with pytest.raises(LibraryError, match=r"no code for compute capability 7\.5"):
        library._packaged((7, 5))
    monkeypatch.setattr(nvcc, "source_hash", lambda: "0" * 16)
    with pytest.raises(LibraryError, match="older than its sources"):
        library._packaged((9, 0))


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc")
def test_compiling_for_a_device_happens_once_and_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("OREAL_CACHE", str(tmp_path / "cache"))
    first, how = library._compiled_here((9, 0))
    assert how == "compiled on this machine"
    assert first.build_info["archs"] == "90a"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(nvcc, "compile_library", lambda *_: pytest.fail("compiled again"))
    assert library._compiled_here((9, 0))[0].path == first.path
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".so"]


def test_a_compiler_that_fails_leaves_nothing_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("OREAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OREAL_NVCC", fake_nvcc(tmp_path, "echo boom >&2; exit 3"))
    with pytest.raises(nvcc.BuildError, match="failed with status 3: boom"):
        library._compiled_here((9, 0))
    assert not list((tmp_path / "cache").glob("*.so"))
    assert not list((tmp_path / "cache").glob("*.tmp"))
    with pytest.raises(LibraryError, match=r"7\.5 is below 8\.0"):
        library._compiled_here((7, 5))
    monkeypatch.setenv("OREAL_NVCC", str(tmp_path / "absent"))
    with pytest.raises(LibraryError, match="no nvcc"):
        library._compiled_here((9, 0))


def test_the_cache_is_keyed_by_sources_compiler_and_target(monkeypatch, tmp_path):
    monkeypatch.setenv("OREAL_CACHE", str(tmp_path / "cache"))
    # a compiler that "compiles" by copying the host build to the name after -o
    body = f'while [ "$1" != -o ]; do shift; done; cp {host_library()} "$2"'
    monkeypatch.setenv("OREAL_NVCC", fake_nvcc(tmp_path, body))
    paths = [library._compiled_here(capability)[0].path for capability in ((9, 0), (8, 0), (9, 0))]
    assert paths[0] == paths[2] != paths[1]
    monkeypatch.setattr(nvcc, "source_hash", lambda: "0" * 16)
    assert library._compiled_here((9, 0))[0].path not in paths


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py far enough to choose whether to compile."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_setup_refuses_what_it_cannot_do(tmp_path):
    done = setup_py(OREAL_BUILD_CUDA="yes")
    assert done.returncode and "OREAL_BUILD_CUDA is 'yes'; it must be auto, 0 or 1" in done.stderr
    done = setup_py(OREAL_BUILD_CUDA="1", OREAL_NVCC=str(tmp_path / "absent"))
    assert done.returncode and "OREAL_BUILD_CUDA=1 but there is no nvcc" in done.stderr
    for environment in (
        {"OREAL_BUILD_CUDA": "0"},
        {"OREAL_BUILD_CUDA": "auto", "OREAL_NVCC": str(tmp_path / "absent")},
    ):
        done = setup_py(**environment)
        assert done.returncode == 0, done.stderr


def build_ext(tmp_path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            tmp_path / "lib",
            "--build-temp",
            tmp_path / "t",
        ],
        cwd=ROOT,
        env=os.environ | {"OREAL_BUILD_CUDA": mode, "OREAL_NVCC": fake_nvcc(tmp_path, "echo boom >&2; exit 3")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failing_compiler_fails_a_required_build_and_not_an_automatic_one(tmp_path):
    required, automatic = build_ext(tmp_path, "1"), build_ext(tmp_path, "auto")
    assert required.returncode and "failed with status 3: boom" in required.stderr
    assert automatic.returncode == 0
    assert "the PyTorch path will be used" in automatic.stderr + automatic.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_targets_are_checked_and_known_to_the_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("OREAL_CUDA_ARCHS", raising=False)
    for version, archs in (("12.4.131", ("80", "90a", "90+ptx")), ("12.8.61", nvcc.DEFAULT_ARCHS)):
        folder = tmp_path / version
        folder.mkdir()
        assert nvcc.wanted_archs(fake_nvcc(folder, "exit 1", version)) == archs
    monkeypatch.setenv("OREAL_CUDA_ARCHS", "90a; 120+ptx")
    assert nvcc.wanted_archs("unused") == ("90a", "120+ptx")
    monkeypatch.setenv("OREAL_CUDA_ARCHS", "sm_90")
    with pytest.raises(nvcc.BuildError, match="OREAL_CUDA_ARCHS names 'sm_90'"):
        nvcc.wanted_archs("unused")
