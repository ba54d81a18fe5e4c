"""``megatron-oreal env``: what it says of packages that are there, broken, noisy, slow or absent."""

import json

import pytest
import tiny
import torch
from loss_host import host_library

from megatron_oreal import accelerators
from megatron_oreal.loss import nvcc
from megatron_oreal.loss.library import KernelChoice


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes a package of a name with a body, that this process and those it starts can import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, body: str) -> None:
        (tmp_path / f"{name}.py").write_text(body)

    return make


def part(name: str) -> accelerators.Part:
    return next(part for part in accelerators.survey().parts if part.name == name)


def test_a_package_that_works_is_active(packages, capfd):
    packages("sglang", "import sys; print('noise'); print('noise', file=sys.stderr)")
    assert part("SGLang").status == "active"
    assert "noise" not in "".join(capfd.readouterr())  # of this process others may be heard: what earlier tests left


def test_a_package_whose_import_fails_is_broken_with_its_last_words(packages):
    packages("sglang", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    found = part("SGLang")
    assert found.status == "broken"
    assert "libcuda.so.1: cannot open" in found.detail


def test_a_package_that_crashes_or_hangs_is_broken(packages, monkeypatch):
    packages("sglang", "import os; os.abort()")
    assert part("SGLang").status == "broken"
    packages("sglang", "import time; time.sleep(60)")
    monkeypatch.setattr(accelerators, "_IMPORT_SECONDS", 0.5)
    assert "takes over 0.5 s" in part("SGLang").detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_needs_a_gpu_is_not_imported_without_one(packages):
    packages("flash_attn", "raise SystemExit('imported')")
    found = part("flash-attn")
    assert (found.status, "no CUDA device" in found.detail) == ("idle", True)


def test_kernels_switched_off_are_idle_and_kernels_that_cannot_run_are_broken(monkeypatch, tmp_path):
    library = tmp_path / "_oreal.so"
    library.write_bytes(host_library().read_bytes())
    monkeypatch.setattr(accelerators, "packaged_library", lambda: library)
    monkeypatch.setattr(nvcc, "source_hash", lambda: "host")  # what the host build names as its sources
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for has_cuda in (True, False):
        monkeypatch.setenv("OREAL_KERNELS", "0")
        (found,) = accelerators._own_kernels(has_cuda)
        assert (found.status, "OREAL_KERNELS=0" in found.detail) == ("idle", True)
        monkeypatch.setenv("OREAL_KERNELS", "auto")
        found = accelerators._own_kernels(False)[0]
        assert (found.status, "OREAL_KERNELS" in found.detail) == ("idle", False)
    reason = f"{library} cannot run on this device: CUDA driver version is insufficient (code 35)"
    choice = KernelChoice(None, f"loss kernels: none ({reason}); PyTorch path")
    monkeypatch.setattr(accelerators, "choose_kernels", lambda device: choice)
    (found,) = accelerators._own_kernels(True)
    assert (found.status, reason in found.detail) == ("broken", True)
    monkeypatch.setenv("OREAL_KERNELS", "0")
    library.unlink()
    assert accelerators._own_kernels(True)[0].status == "missing"


def test_only_the_first_of_two_fused_adams_is_active(packages, tmp_path, monkeypatch):
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch" / "optimizers.py").write_text("FusedAdam = 1")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text("FusedAdam = 1")
    packages("amp_C", "")
    found = {part.name: part.status for part in accelerators._third_party(has_cuda=True)}
    assert found["TransformerEngine layers"] == "active"
    assert found["fused Adam (TransformerEngine)"] == "active"
    assert found["fused Adam (apex)"] == "idle"
    (tmp_path / "transformer_engine" / "pytorch" / "optimizers.py").write_text("raise ImportError('no')")
    found = {part.name: part.status for part in accelerators._third_party(has_cuda=True)}
    assert found["fused Adam (TransformerEngine)"] == "broken"
    assert found["fused Adam (apex)"] == "active"


def test_what_only_transformer_engine_calls_is_idle_without_it(packages, tmp_path):
    packages("flash_attn", "")
    packages("flash_attn_2_cuda", "")
    packages("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32 = 1")
    names = ("flash-attn", "fused weight gradient (apex)")
    for body, status in (("raise ImportError('no')", "idle"), ("", "active")):
        (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True, exist_ok=True)
        (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text(body)
        found = {part.name: part for part in accelerators._third_party(has_cuda=True)}
        for name in names:
            assert (found[name].status, "nothing calls it" in found[name].detail) == (status, status == "idle")


@pytest.mark.slow
def test_the_kernels_row_follows_the_choice_that_training_makes(monkeypatch):
    monkeypatch.setenv("OREAL_KERNELS", "/nonexistent")
    assert part("loss kernels").status == "broken"
    monkeypatch.delenv("OREAL_KERNELS")
    if not torch.cuda.is_available():
        assert part("loss kernels").status in ("idle", "missing")
        monkeypatch.setenv("OREAL_KERNELS", str(host_library()))
        assert part("loss kernels").status == "active"


def test_the_command_lists_every_part_with_what_replaces_it():
    done = tiny.cli("env", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = " ".join(part["name"] for part in found["parts"])
    for name in ("loss kernels", "TransformerEngine", "fused Adam", "fused weight gradient", "flash-attn", "SGLang"):
        assert name in names
    assert found["versions"]["torch"] == torch.__version__
    assert all(part["instead"] and part["detail"] for part in found["parts"])
    rows = [accelerators.Part(**row) for row in found["parts"]]  # not looked up again: an import may be slow just now
    text = accelerators.Environment(found["devices"], found["versions"], rows).as_text()
    for row in found["parts"]:
        assert row["name"] in text
        assert (row["status"] == "active") or f"instead: {row['instead']}" in text
