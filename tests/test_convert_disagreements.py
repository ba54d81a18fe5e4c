"""What would be wrong, or lost, without a word: configs, indexes and dtypes that do not go with the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_cases import convert
from safetensors.torch import load_file, save_file
from test_convert_errors import refused
from test_convert_roundtrip import read_with_torch
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_megatron import small_spec

from megatron_oreal.errors import UserError
from megatron_oreal.layout import MegatronSource, ModelSpec, RopeSpec, SafetensorsSource, open_source
from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE

SPEC = small_spec("llama")
NORM = "model.norm.weight"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf", SPEC, random_weights(SPEC))
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--tp", 2) == 0
    return tmp_path / "m"


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewritten(megatron: Path, out: Path, **changes: torch.Tensor) -> Path:
    """A checkpoint with other tensors under some keys, written by torch."""
    dcp.save(read_with_torch(megatron) | changes, checkpoint_id=str(out), no_dist=True)
    shutil.copytree(megatron / "hf", out / "hf")
    torch.save({"iteration": 3}, out / "common.pt")
    return out


def test_somebody_elses_metadata_json_does_not_make_a_directory_megatrons(hf: Path, megatron: Path) -> None:
    (hf / "metadata.json").write_text('{"quantization": null}')
    assert convert("compare", hf, megatron) == 0
    with open_source(hf, SPEC) as source:
        assert isinstance(source, SafetensorsSource)


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_leads_out_of_its_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], absolute: bool
) -> None:
    folder = tmp_path / "hf"
    write_checkpoint(folder, SPEC, random_weights(SPEC), files=2)
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", tmp_path / "other.safetensors")
    file = str(tmp_path / "other.safetensors") if absolute else "../other.safetensors"
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    line = refused(capsys, "hf_to_megatron", "--hf", folder, "--out", tmp_path / "m")
    assert f"{folder / INDEX_FILE}: says that 'model.embed_tokens.weight' is in {file!r}, outside" in line


def test_values_beyond_the_range_of_fp16_are_refused_not_made_infinite(
    hf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(hf / SINGLE_FILE)
    weights[NORM][3] = -(2.0**17)
    weights[NORM][4] = float("inf")  # as it was
    save_file(weights, hf / SINGLE_FILE)
    message = f"tensor '{NORM}': 1.311e+05 is beyond the range of float16 (at most 6.55e+04)"
    assert message in refused(capfd, "hf_to_megatron", "--hf", hf, "--out", tmp_path / "b", "--dtype", "fp16")
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--dtype", "fp32") == 0
    assert message in refused(capfd, "megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b",
                              "--dtype", "fp16")  # fmt: skip
    weights[NORM][3] = 60000.0
    save_file(weights, hf / SINGLE_FILE)
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "b", "--dtype", "fp16") == 0


def test_weights_of_several_dtypes_are_cut_anew_in_the_one_that_is_chosen(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "decoder.final_layernorm.weight"
    mixed = rewritten(megatron, tmp_path / "mixed", **{key: read_with_torch(megatron)[key].float()})
    arguments = ("--megatron", mixed, "--out", tmp_path / "b")
    line = refused(capsys, "megatron_to_megatron", *arguments)
    assert "(torch.bfloat16, torch.float32): choose one with --weights-only --dtype" in line
    assert convert("megatron_to_megatron", *arguments, "--weights-only", "--dtype", "bf16") == 0
    assert convert("compare", megatron, tmp_path / "b", "--weights-only") == 0


def test_a_language_model_is_not_written_with_the_config_of_a_classifier(
    hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever loads such a directory gets a random scalar head."""
    set_config(hf, architectures=["LlamaForSequenceClassification"])
    for tool in ("megatron_to_hf", "megatron_to_megatron"):
        more = ["--weights-only"] if tool == "megatron_to_megatron" else []
        arguments = ("--megatron", megatron, "--out", tmp_path / "b", "--hf-config", hf, *more)
        line = refused(capsys, tool, *arguments)
        assert f"{hf / 'config.json'}: architectures=['LlamaForSequenceClassification'] is a reward model's" in line


def test_a_classifier_without_its_head_is_refused_unless_a_new_one_is_asked_for(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_config(hf, architectures=["LlamaForSequenceClassification"])
    line = refused(capsys, "hf_to_megatron", "--hf", hf, "--out", tmp_path / "m")
    assert "tensor 'score.weight' [1, 12] is missing" in line
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--reward-model") == 0


def test_a_dtype_under_the_keys_of_both_transformers_is_set_under_both(hf: Path, tmp_path: Path) -> None:
    set_config(hf, dtype="float32", torch_dtype="float32")
    assert convert("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m") == 0
    written = json.loads((tmp_path / "m" / "hf" / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_compare_sees_a_head_in_float8_beside_a_tied_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = small_spec("llama", tied=True)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "a", spec, weights)
    head = weights["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path / "b", spec, weights | {"lm_head.weight": head})
    assert convert("compare", tmp_path / "a", tmp_path / "b") == 1
    assert "only in B: lm_head.weight [37, 12]" in capsys.readouterr().out


def test_a_tied_model_whose_config_does_not_say_so_is_refused_with_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec("llama", tied=True)
    write_checkpoint(tmp_path / "hf", spec, random_weights(spec))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    assert "'lm_head.weight' [37, 12] is missing" in line and "does not say tie_word_embeddings=true" in line


def test_a_cache_of_links_is_read_and_a_link_to_nowhere_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``huggingface_hub`` keeps a model: links from a snapshot to blobs."""
    write_checkpoint(tmp_path / "blobs", SPEC, random_weights(SPEC), files=2)
    (tmp_path / "blobs" / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert convert("hf_to_megatron", "--hf", snapshot, "--out", tmp_path / "m") == 0
    tokenizer = tmp_path / "m" / "hf" / "tokenizer.json"
    assert tokenizer.is_file() and not tokenizer.is_symlink()
    (tmp_path / "blobs" / "tokenizer.json").unlink()
    line = refused(capsys, "hf_to_megatron", "--hf", snapshot, "--out", tmp_path / "b")
    assert f"{snapshot / 'tokenizer.json'}: cannot be read" in line and "a link to nowhere" in line


def test_an_empty_mount_point_is_refused_before_the_weights_are_written(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rename at the end cannot replace it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        line = refused(capsys, "hf_to_megatron", "--hf", hf, "--out", disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert f"{disk}: is a mount point" in line


def test_rows_that_a_smaller_vocabulary_cuts_off_are_said(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = replace(SPEC, vocab_size=30)
    write_checkpoint(tmp_path / "config", smaller, {})
    for config, said in ((megatron / "hf", False), (tmp_path / "config", True)):
        capsys.readouterr()
        arguments = ("--megatron", megatron, "--out", tmp_path / "b", "--hf-config", config, "--dry-run")
        assert convert("megatron_to_hf", *arguments) == 0
        assert ("embeddings beyond vocab_size=30 are not zero" in capsys.readouterr().out) == said


def test_a_changed_bit_of_the_metadata_is_said_to_be_damage(megatron: Path) -> None:
    """Where a field is lost, or is another object, as well as where the pickle breaks."""
    path = megatron / ".metadata"
    whole = path.read_bytes()
    complaints: list[str] = []
    for at in range(len(whole) // 3, len(whole), 31):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            MegatronSource(megatron).check_all()
        except UserError as error:
            complaints.append(str(error))
    assert sum(".metadata: damaged" in line for line in complaints) > 50


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(SPEC, rope=RopeSpec(5e5)), r"is of another model: rope is RopeSpec\(theta=500000\.0"),
        (replace(SPEC, tied_embeddings=True), "is of another model: tied_embeddings is True"),
        (replace(SPEC, norm_eps=1e-5), "is of another model: norm_eps is 1e-05"),
    ],
)
def test_a_run_does_not_read_the_weights_of_another_config(tmp_path: Path, other: ModelSpec, message: str) -> None:
    """A frozen reference of the same shapes, whose logits would be others."""
    write_checkpoint(tmp_path, other, random_weights(other))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, SPEC)


def test_a_run_does_not_drop_biases_that_its_config_does_not_know(hf: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(hf / SINGLE_FILE) | {bias: torch.ones(16).bfloat16()}, hf / SINGLE_FILE)
    with pytest.raises(UserError, match=r"q_proj\.bias' is there, but config\.json describes a llama model"):
        open_source(hf, SPEC)
