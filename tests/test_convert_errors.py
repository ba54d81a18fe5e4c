"""What goes wrong with checkpoints: one line that names the file or tensor, exit status 2, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from convert_cases import TOOLS, convert, shell, without_progress
from safetensors.torch import load_file, save_file
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_megatron import small_spec

from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import parse_config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import open_source
from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE

SPEC = small_spec("llama")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf", SPEC, random_weights(SPEC))
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--tp", 2, "--pp", 2) == 0
    return tmp_path / "m"


def refused(capsys: pytest.CaptureFixture[str], tool: str, *arguments: object) -> str:
    """The one line on standard error of a refusal; checks the exit status and that nothing appeared."""
    out = next((Path(str(b)) for a, b in itertools.pairwise(arguments) if a == "--out"), None)
    existed = out is not None and out.exists()
    capsys.readouterr()
    assert convert(tool, *arguments) == 2
    lines = without_progress(capsys.readouterr().err)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    if out is not None:
        assert out.exists() == existed
        assert not out.with_name(f".{out.name}.incomplete").exists()
    return lines[0]


def test_a_safetensors_file_cut_anywhere_is_named(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hf / SINGLE_FILE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(whole)) // 2, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        line = refused(capsys, "hf_to_megatron", "--hf", hf, "--out", tmp_path / "m")
        assert f"{path}: damaged or not a safetensors file" in line, (cut, line)
    path.write_bytes(whole)
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m") == 0


def _edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / SINGLE_FILE)
        change(weights)
        save_file(weights, folder / SINGLE_FILE)

    return damage


def _set(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return _edit(lambda weights: weights.update({name: value}))


def _config(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def _missing_shard(folder: Path) -> None:
    write_checkpoint(folder, SPEC, random_weights(SPEC), files=3)
    (folder / SINGLE_FILE).unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def _junk_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


NORM = "model.layers.0.input_layernorm.weight"
BAD_HF: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (_missing_shard, "model-00002-of-00003.safetensors: missing"),
    "missing tensor": (_edit(lambda w: w.pop(NORM)), f"tensor '{NORM}' [12] is missing"),
    "float8": (_set(NORM, torch.ones(12).to(torch.float8_e4m3fn)), f"tensor '{NORM}' has dtype F8_E4M3"),
    "integers": (_set(NORM, torch.ones(12, dtype=torch.int64)), f"tensor '{NORM}' has dtype I64"),
    "several dtypes": (_set(NORM, torch.ones(12)), "several dtypes (torch.bfloat16, torch.float32): choose one with"),
    "other vocabulary": (_config(vocab_size=40), "'model.embed_tokens.weight' has shape [37, 12], config.json asks"),
    "other width": (_config(intermediate_size=48), "has shape [24, 12], config.json asks for [48, 12]"),
    "fewer layers": (_config(num_hidden_layers=3), "but config.json says num_hidden_layers=3"),
    "more layers": (_config(num_hidden_layers=5), "tensor 'model.layers.4.input_layernorm.weight' [12] is missing"),
    "biases of another family": (
        _set("model.layers.0.self_attn.q_proj.bias", torch.ones(16).bfloat16()),
        "'model.layers.0.self_attn.q_proj.bias' is there, but config.json describes a llama model, which has none",
    ),
    "tied to another head": (_config(tie_word_embeddings=True), "'lm_head.weight' differs from"),
    "no JSON": (_junk_config, "config.json: not valid JSON"),
    "no weights": (lambda folder: (folder / SINGLE_FILE).unlink(), f"neither {SINGLE_FILE} nor {INDEX_FILE}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "other architecture": (_config(architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_models_that_are_not_whole_or_not_of_their_config_are_refused(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = BAD_HF[case]
    damage(hf)
    line = refused(capsys, "hf_to_megatron", "--hf", hf, "--out", tmp_path / "m")
    assert message in line
    assert str(hf) in line


def test_tensors_that_no_table_knows_are_said_and_left_out(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _set("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))(hf)
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m") == 0
    said = capsys.readouterr().out
    assert "1 tensors are not of this model and are left out: 'model.layers.0.self_attn.rotary_emb.inv_freq'" in said


BAD_ARGUMENTS = {
    "--tp 3": "tensor_model_parallel_size=3 does not divide num_attention_heads=4",
    "--tp 8": "tensor_model_parallel_size=8",
    "--pp 3": "num_hidden_layers=4 does not divide",
    "--pp 2 --vpp 3": "num_hidden_layers=4 does not divide",
    "--vpp 2": "needs pipeline_model_parallel_size above 1",
    "--tp 0": "--tp=0: must be 1 or more",
    "--pp 2 --num-layers-in-first-pipeline-stage 4": "num_layers_in_first_pipeline_stage=4 leaves 0",
    "--make-vocab-size-divisible-by -1": "--make-vocab-size-divisible-by=-1: must be 1 or more",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_layouts_that_do_not_work_out_are_refused(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    line = refused(capsys, "hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", *arguments.split())
    assert BAD_ARGUMENTS[arguments] in line


def test_output_directories_that_cannot_be_are_refused(
    hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for tool, source in (("hf_to_megatron", "--hf"), ("megatron_to_hf", "--megatron")):
        folder = hf if source == "--hf" else megatron
        for out, message in (
            (tmp_path / "full", "already exists: choose another directory"),
            (tmp_path / "file", "already exists"),
            (tmp_path / "file" / "below", "cannot be written"),
            (folder / "inside", "is inside"),
            (Path("/proc/nothing/here"), "cannot be written"),
        ):
            assert message in refused(capsys, tool, source, folder, "--out", out)
    assert (tmp_path / "full" / "precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "empty") == 0


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB: the kernel refuses in the middle of a tensor."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a .pyc file that the limit cuts breaks later imports
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_in_the_middle_names_the_file_and_leaves_nothing(
    hf: Path, megatron: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], small_files: None
) -> None:
    for tool, source, file in (
        ("hf_to_megatron", ("--hf", hf), "__0_0.distcp"),
        ("megatron_to_hf", ("--megatron", megatron), SINGLE_FILE),
        ("megatron_to_megatron", ("--megatron", megatron), "__0_0.distcp"),
    ):
        line = refused(capfd, tool, *source, "--out", tmp_path / "out")
        assert file in line
        assert "File too large" in line


@pytest.mark.parametrize(("kib", "message"), [(8, "GB free: free some space"), (16, "No space left on device")])
def test_a_full_disk_is_found_before_the_first_byte_or_when_it_fills_up(
    hf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kib: int, message: str
) -> None:
    """A real small disk: too small for the weights, and too small only for what stands around them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        line = refused(capfd, "hf_to_megatron", "--hf", hf, "--out", disk / "m")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert message in line and str(disk) in line


def _metadata(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / ".metadata"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return damage


def flip(folder: Path) -> None:
    """Change one byte of a value; the archive's checksum tells."""
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    value = load_file(folder.parent / "hf" / SINGLE_FILE)["model.layers.0.input_layernorm.weight"]
    at = bytes(data).index(value.view(torch.uint8).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


class _Bomb:
    def __reduce__(self) -> tuple:
        return (print, ("a pickle from elsewhere was run",))


BAD_MEGATRON: dict[str, tuple[Callable[[Path], None], str]] = {
    "no .metadata": (lambda folder: (folder / ".metadata").unlink(), "has no .metadata"),
    "half a .metadata": (_cut(".metadata", 0.5), ".metadata: damaged"),
    "an empty .metadata": (_cut(".metadata", 0), ".metadata: damaged"),
    "junk for .metadata": (_metadata(lambda data: b"junk" * 100), ".metadata: damaged"),
    "another pickle": (_metadata(lambda data: pickle.dumps({"a": 1})), ".metadata: damaged"),
    "a pickle that calls": (_metadata(lambda data: pickle.dumps(_Bomb())), ".metadata: damaged"),
    "a missing file": (lambda folder: (folder / "__3_0.distcp").unlink(), "__3_0.distcp: missing, though .metadata"),
    "a truncated file": (_cut("__1_0.distcp", 0.9), "__1_0.distcp: truncated"),
    "an empty file": (_cut("__1_0.distcp", 0), "__1_0.distcp: truncated"),
    "one changed byte": (flip, "__0_0.distcp: tensor 'decoder.layers.self_attention.linear_qkv.layer_norm_weight'"),
    "no config": (lambda folder: (folder / "hf" / "config.json").unlink(), "has no hf/config.json"),
}


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_damaged_megatron_directories_are_refused(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = BAD_MEGATRON[case]
    damage(megatron)
    for tool in ("megatron_to_hf", "megatron_to_megatron"):
        line = refused(capsys, tool, "--megatron", megatron, "--out", tmp_path / "b")
        assert message in line
        assert str(megatron) in line
    assert "a pickle from elsewhere was run" not in capsys.readouterr().out


def test_a_checkpoint_of_another_config_is_refused(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spec, message in (
        ("vocabulary", replace(SPEC, vocab_size=99), "has 38 rows, config.json asks for vocab_size=99"),
        ("width", replace(SPEC, ffn_hidden_size=48), "has shape [4, 48, 12], config.json asks for [4, 96, 12]"),
        ("layers", replace(SPEC, num_layers=3), "[4, 12], config.json asks for [3, 12]"),
        ("family", small_spec("qwen2"), "'decoder.layers.self_attention.linear_qkv.bias' is missing"),
        ("tied", replace(SPEC, tied_embeddings=True), "'output_layer.weight' is stored, but config.json says tie"),
    ):
        folder = tmp_path / name
        write_checkpoint(folder, spec, {})
        arguments = ("--megatron", megatron, "--out", tmp_path / "b", "--hf-config", folder)
        assert message in refused(capsys, "megatron_to_hf", *arguments)


def test_directories_of_neither_kind_are_refused(
    hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, absent = tmp_path / "empty", tmp_path / "absent"
    empty.mkdir()
    for folder, message in ((empty, "not a dist_checkpointing directory"), (absent, "does not exist")):
        assert message in refused(capsys, "megatron_to_hf", "--megatron", folder, "--out", tmp_path / "b")
    assert "not a dist_checkpointing directory" in refused(
        capsys, "megatron_to_hf", "--megatron", hf, "--out", tmp_path / "b"
    )
    assert "has no config.json" in refused(capsys, "hf_to_megatron", "--hf", empty, "--out", tmp_path / "b")
    assert "neither a Hugging Face nor" in refused(capsys, "compare", hf, empty)
    step = tmp_path / "step_000001"
    step.mkdir()
    megatron.rename(step / "policy")
    line = refused(capsys, "megatron_to_hf", "--megatron", step, "--out", tmp_path / "b")
    assert f"give one of {step / 'policy'}" in line


def test_a_run_is_refused_before_it_starts_from_something_else_or_another_model(
    hf: Path, megatron: Path, tmp_path: Path
) -> None:
    config = tiny.config_tree(tmp_path, hf)
    config["model"]["megatron_checkpoint"] = str(hf)
    with pytest.raises(UserError, match=r"model\.megatron_checkpoint='.*hf' is not a dist_checkpointing directory"):
        check_config(parse_config(config), SPEC, 1)
    with pytest.raises(UserError, match=r"m: is of another model: ffn_hidden_size is 24, the config.s model has 48"):
        open_source(megatron, replace(SPEC, ffn_hidden_size=48))
    with open_source(megatron, SPEC) as source:
        assert "lm_head.weight" in source
        with pytest.raises(UserError, match=r"holds no 'score\.weight'"):
            source.check("score.weight", (1, 12))


def test_mistakes_in_arguments_need_no_torch(tmp_path: Path) -> None:
    """From a shell: the exit status, one line, and no import of torch, which takes seconds."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['torch'] = None; import hf_to_megatron as tool; "
        "sys.exit(tool.main(sys.argv[2:]))"
    )
    arguments = [sys.executable, "-c", code, str(TOOLS), "--hf", str(tmp_path / "none"), "--out", str(tmp_path / "m")]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tiny.REPOSITORY)}
    )
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'none'}: does not exist\n")


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import hf_to_megatron
from megatron_oreal.layout.megatron_writer import _Stream
write = _Stream.write
def killed(self, data):
    if self._path.name == "__1_0.distcp" and self._path.stat().st_size > 1_000_000:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
_Stream.write = killed
hf_to_megatron.main(sys.argv[2:])
"""
"""Ends in the middle of a tensor; a signal from outside comes too late when the sender has to wait for a processor."""


def test_a_killed_conversion_leaves_nothing_under_the_name_and_can_be_run_again(tmp_path: Path) -> None:
    spec = replace(small_spec("llama"), hidden_size=256, ffn_hidden_size=4096)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "hf", spec, weights)
    arguments = ["--hf", tmp_path / "hf", "--out", tmp_path / "m", "--tp", "2"]
    done = tiny._run([sys.executable, "-c", _KILLED, *map(str, [TOOLS, *arguments])])
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = tmp_path / ".m.incomplete" / "__1_0.distcp"
    assert half.stat().st_size > 1_000_000
    assert not (tmp_path / "m").exists()
    done = shell("hf_to_megatron", *arguments)
    assert done.returncode == 0, done.stderr
    assert not half.parent.exists()
    assert convert("compare", tmp_path / "hf", tmp_path / "m") == 0
