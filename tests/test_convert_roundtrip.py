"""Hugging Face -> Megatron -> Hugging Face, Megatron -> Megatron and compare, in this process, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_cases import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_layout_checkpoint import random_weights, write_checkpoint
from test_layout_families import transformers_config
from test_layout_megatron import FAMILIES, small_spec

from megatron_oreal.layout import ModelSpec, hf_tensors, load_model_spec, padded_vocab_size
from megatron_oreal.layout.blocks import contains, full_rect, intersect, rect_size
from megatron_oreal.layout.distcp import read_metadata
from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE
from megatron_oreal.layout.megatron_checkpoint import global_layout, stacked_key
from megatron_oreal.layout.megatron_writer import MegatronTarget, plan_files

LAYOUTS = {
    "TP1": "--tp 1 --pp 1",
    "TP2": "--tp 2 --pp 1 --make-vocab-size-divisible-by 16",
    "TP4-above-the-KV-heads": "--tp 4 --pp 1",
    "TP2-PP2": "--tp 2 --pp 2",
    "TP4-PP2": "--tp 4 --pp 2",
    "PP2-VPP2": "--tp 1 --pp 2 --vpp 2",
    "PP2-uneven": "--tp 2 --pp 2 --num-layers-in-first-pipeline-stage 1",
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    have = stored(folder)
    assert have.keys() == weights.keys()
    assert [name for name in weights if have[name].dtype != weights[name].dtype] == []
    assert [name for name in weights if not torch.equal(have[name], weights[name])] == []


def make_hf(folder: Path, spec: ModelSpec, files: int = 1) -> dict[str, torch.Tensor]:
    weights = random_weights(spec)
    write_checkpoint(folder, spec, weights, files)
    (folder / "tokenizer_config.json").write_text('{"marker": 1}')
    return weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_to_megatron_and_back_is_the_identity(tmp_path: Path, family: str, tied: bool, layout: str) -> None:
    """Read from one file or three, written as one file or many."""
    many = layout in ("TP2", "PP2-VPP2")
    weights = make_hf(tmp_path / "hf", small_spec(family, tied=tied), files=3 if many else 1)
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", *LAYOUTS[layout].split()) == 0
    size = "3KB" if many else "5GB"
    assert convert("megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b", "--shard-size", size) == 0
    assert_same_tensors(tmp_path / "b", weights)
    assert (tmp_path / "b" / SINGLE_FILE).exists() != many
    assert (tmp_path / "b" / INDEX_FILE).exists() == many
    assert load_model_spec(tmp_path / "b") == load_model_spec(tmp_path / "hf")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == {"marker": 1}


ODD = {
    "9 heads, 3 KV heads, TP 3 PP 2": (
        replace(small_spec("llama", tied=True, heads=9, kv_heads=3), hidden_size=36),
        "--tp 3 --pp 2",
    ),
    "6 heads, 3 KV heads, TP 1 PP 4": (small_spec("qwen2", heads=6, kv_heads=3), "--tp 1 --pp 4"),
    "16 heads, 2 KV heads, TP 8 PP 4": (small_spec("qwen3", heads=16, kv_heads=2), "--tp 8 --pp 4"),
    "8 heads, 8 KV heads, TP 8 PP 2 VPP 2": (small_spec("qwen2", heads=8, kv_heads=8), "--tp 8 --pp 2 --vpp 2"),
    "vocabulary smaller than its padding": (small_spec("llama", vocab=5), "--tp 4 --make-vocab-size-divisible-by 32"),
}


@pytest.mark.parametrize("case", ODD)
def test_one_process_converts_for_more_ranks_than_there_are(tmp_path: Path, case: str) -> None:
    spec, layout = ODD[case]
    weights = make_hf(tmp_path / "hf", spec)
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", *layout.split()) == 0
    assert convert("megatron_to_megatron", "--megatron", tmp_path / "m", "--out", tmp_path / "n", "--pp", 2) == 0
    assert convert("megatron_to_hf", "--megatron", tmp_path / "n", "--out", tmp_path / "b") == 0
    assert_same_tensors(tmp_path / "b", weights)
    assert convert("compare", tmp_path / "m", tmp_path / "n") == 0


def _fits(spec: ModelSpec, tp: int) -> bool:
    """Whether Megatron-core cuts attention for ``tp`` ranks."""
    kv = spec.num_kv_heads
    return spec.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0) and (spec.q_size + 2 * spec.kv_size) % tp == 0


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    reward_model=st.booleans(),
    heads_of=st.sampled_from(
        [(1, 1), (1, 4), (1, 16), (2, 1), (2, 2), (2, 8), (3, 2), (4, 2), (4, 4), (8, 2), (16, 1)]
    ),
    pp=st.sampled_from([1, 2, 4, 8]),
    vpp=st.sampled_from([None, 2]),
    divisor=st.sampled_from([1, 8, 128]),
    parts=st.integers(1, 5),
    data=st.data(),
)
def test_planned_chunks_hold_every_element_of_every_stored_tensor_once(
    family: str, tied: bool, reward_model: bool, heads_of: tuple[int, int], pp: int, vpp: int | None, divisor: int,
    parts: int, data: st.DataObject,
) -> None:  # fmt: skip
    kv_heads, group = heads_of
    spec = small_spec(family, tied=tied, heads=kv_heads * group, kv_heads=kv_heads, layers=16)
    spec = replace(spec, ffn_hidden_size=32)
    tp = data.draw(st.sampled_from([size for size in (1, 2, 4, 8, 16) if _fits(spec, size)]))
    target = MegatronTarget(tp, pp, vpp if pp > 1 else None, divisor, None, reward_model)
    files = plan_files(spec, target, parts)
    assert len({file.name for file in files}) == len(files)
    padded = padded_vocab_size(spec.vocab_size, tp=tp, vocab_divisor=divisor)
    whole = global_layout(spec, padded, reward_model)
    chunks: dict[str, list] = {}
    for file in files:
        for chunk in file.chunks:
            chunks.setdefault(chunk.key, []).append(chunk)
    assert set(chunks) == {stacked_key(name)[0] for name, _ in whole.params}
    for name, shape in whole.params:
        key, row = stacked_key(name)
        bounds = full_rect(shape) if row is None else ((row, row + 1), *full_rect(shape))
        mine = [chunk for chunk in chunks[key] if intersect(chunk.rect, bounds)]
        assert all(contains(bounds, chunk.rect) for chunk in mine)
        assert sum(chunk.elements for chunk in mine) == rect_size(bounds)
        for i, one in enumerate(mine):
            assert not any(intersect(one.rect, other.rect) for other in mine[i + 1 :])
    sources = [(block.tensor, block.source) for file in files for chunk in file.chunks for block in chunk.blocks]
    assert len(sources) == len(set(sources))
    wanted = hf_tensors(spec, reward_model=reward_model)
    assert sum(rect_size(rect) for _, rect in sources) == sum(rect_size(full_rect(shape)) for shape in wanted.values())


def test_uneven_stages_stand_in_their_own_files(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", small_spec("llama", layers=6))
    stages = "--pp 3 --num-layers-in-first-pipeline-stage 1 --num-layers-in-last-pipeline-stage 2"
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", *stages.split()) == 0
    metadata = read_metadata(tmp_path / "m")
    layers: dict[str, set[int]] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn == "decoder.layers.mlp.linear_fc2.weight":
            layers.setdefault(info.relative_path, set()).add(index.offset[0])
    assert layers == {"__0_0.distcp": {0}, "__1_0.distcp": {1, 2, 3}, "__2_0.distcp": {4, 5}}


def test_reward_model_gets_a_zero_head_and_keeps_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = small_spec("qwen2")
    weights = make_hf(tmp_path / "hf", spec)
    arguments = ("--tp", 2, "--reward-model")
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", *arguments) == 0
    said = capsys.readouterr().out
    assert "no 'score.weight': the scalar head starts at zero" in said
    assert "1 tensors are not of this model and are left out: 'lm_head.weight'" in said
    assert convert("megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b") == 0
    del weights["lm_head.weight"]
    assert_same_tensors(tmp_path / "b", weights | {"score.weight": torch.zeros(1, 12, dtype=torch.bfloat16)})
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]
    score = torch.randn(1, 12).bfloat16()
    save_file(weights | {"score.weight": score}, tmp_path / "b" / SINGLE_FILE)
    assert convert("hf_to_megatron", "--hf", tmp_path / "b", "--out", tmp_path / "m2", "--pp", 2) == 0
    assert convert("megatron_to_hf", "--megatron", tmp_path / "m2", "--out", tmp_path / "b2") == 0
    assert_same_tensors(tmp_path / "b2", weights | {"score.weight": score})


def test_dtype_is_rounded_once_and_recorded(tmp_path: Path) -> None:
    spec = small_spec("qwen3")
    weights = {name: torch.randn(value.shape) for name, value in random_weights(spec).items()}
    write_checkpoint(tmp_path / "hf", spec, weights)
    to = ("--hf", tmp_path / "hf", "--out", tmp_path / "m", "--dtype", "bf16")
    assert convert("hf_to_megatron", *to) == 0
    assert convert("megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b") == 0
    assert_same_tensors(tmp_path / "b", {name: value.bfloat16() for name, value in weights.items()})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == "bfloat16"
    assert convert("compare", tmp_path / "hf", tmp_path / "b") == 1
    assert convert("compare", tmp_path / "hf", tmp_path / "b", "--dtype", "bf16") == 0


def read_with_torch(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, global, by torch.distributed.checkpoint's own reader."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    tensors = {
        key: torch.full(value.size, float("nan"), dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if hasattr(value, "size")
    }
    dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def test_torch_reads_what_was_written_and_other_forms_of_it_are_read(tmp_path: Path) -> None:
    """``non_homogeneous_layers`` keys, and the names of a spec without Megatron's key map, written by torch."""
    spec = small_spec("qwen3")
    weights = make_hf(tmp_path / "hf", spec)
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", "--tp", 2, "--pp", 2) == 0
    per_layer = {}
    for key, value in read_with_torch(tmp_path / "m").items():
        for layer in range(spec.num_layers) if ".layers." in key else [None]:
            name = key if layer is None else key.replace(".layers.", f".layers.{layer}.")
            name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            per_layer[name] = value if layer is None else value[layer].clone()
    up = per_layer["decoder.layers.1.mlp.linear_fc1.weight"][spec.ffn_hidden_size :]
    assert torch.equal(up, weights["model.layers.1.mlp.up_proj.weight"])
    dcp.save(per_layer, checkpoint_id=str(tmp_path / "torch"), no_dist=True)
    arguments = ("--megatron", tmp_path / "torch", "--hf-config", tmp_path / "hf", "--out", tmp_path / "b")
    assert convert("megatron_to_hf", *arguments) == 0
    assert_same_tensors(tmp_path / "b", weights)


def test_dry_run_says_what_would_be_read_and_written_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec("llama")
    make_hf(tmp_path / "hf", spec)
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--hf", tmp_path / "hf", "--out", tmp_path / "m", "--tp", 2, "--pp", 2)
    assert convert("hf_to_megatron", *arguments, "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert re.findall(r"(__\d_0\.distcp)  tp (\d) pp (\d)", said) == [
        ("__0_0.distcp", "0", "0"),
        ("__1_0.distcp", "1", "0"),
        ("__2_0.distcp", "0", "1"),
        ("__3_0.distcp", "1", "1"),
    ]
    elements = spec.num_parameters() + 2 * spec.hidden_size  # one row of padding in either table
    read, written = re.search(r"process 0: reads ([\d.]+) kB, writes ([\d.]+) kB in 4 files", said).groups()
    assert float(written) == pytest.approx(2 * elements / 1000, rel=0.01)
    assert float(read) == pytest.approx(2 * spec.num_parameters() / 1000, rel=0.01)
    assert convert("hf_to_megatron", *arguments) == 0
    capsys.readouterr()
    back = ("--megatron", tmp_path / "m", "--out", tmp_path / "b", "--shard-size", "3KB", "--dry-run")
    assert convert("megatron_to_hf", *back) == 0
    assert convert("megatron_to_megatron", "--megatron", tmp_path / "m", "--out", tmp_path / "n", "--dry-run") == 0
    assert not (tmp_path / "b").exists() and not (tmp_path / "n").exists()
    assert capsys.readouterr().out.count("dry run: nothing was written") == 2


def test_compare_finds_a_single_planted_element_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec("qwen2")
    weights = make_hf(tmp_path / "a", spec)
    assert convert("hf_to_megatron", "--hf", tmp_path / "a", "--out", tmp_path / "m", "--tp", 2, "--pp", 2) == 0
    for name, position in (
        ("model.layers.3.self_attn.v_proj.weight", (7, 11)),
        ("model.layers.0.mlp.up_proj.weight", (23, 0)),
        ("model.embed_tokens.weight", (36, 5)),
    ):
        changed = {key: value.clone() for key, value in weights.items()}
        changed[name][position] += 0.5
        write_checkpoint(tmp_path / "b", spec, changed)
        for a, b in (("m", "b"), ("a", "b")):
            capsys.readouterr()
            assert convert("compare", tmp_path / a, tmp_path / b) == 1
            (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("values: ")]
            was, now = float(weights[name][position]), float(changed[name][position])
            assert line == (
                f"values: {name}: 1 of {weights[name].numel()} elements differ, at most by {abs(now - was):.6g}; "
                f"the first at {list(position)}: {was!r} in A, {now!r} in B"
            )


def test_compare_reports_missing_extra_shape_dtype_zero_signs_and_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec("llama")
    weights = make_hf(tmp_path / "a", spec)
    nan = torch.full((12,), float("nan"), dtype=torch.bfloat16)
    zeros = torch.zeros(12, dtype=torch.bfloat16)
    one = weights | {"model.norm.weight": nan, "model.layers.0.input_layernorm.weight": zeros}
    two = one | {
        "model.layers.0.input_layernorm.weight": -zeros,
        "model.layers.1.mlp.down_proj.weight": weights["model.layers.1.mlp.down_proj.weight"].float(),
        "model.layers.2.mlp.down_proj.weight": torch.zeros(3, 4).bfloat16(),
        "surplus.weight": zeros.clone(),
    }
    del two["lm_head.weight"]
    write_checkpoint(tmp_path / "a", spec, one)
    write_checkpoint(tmp_path / "b", spec, two)
    capsys.readouterr()
    assert convert("compare", tmp_path / "a", tmp_path / "b") == 1
    said = capsys.readouterr().out.splitlines()
    assert "only in A: lm_head.weight [37, 12]" in said
    assert "only in B: surplus.weight [12]" in said
    assert "shape: model.layers.2.mlp.down_proj.weight: [12, 24] in A, [3, 4] in B" in said
    assert "dtype: model.layers.1.mlp.down_proj.weight: bfloat16 in A, float32 in B" in said
    values = [line for line in said if line.startswith("values:")]
    assert len(values) == 1, values  # the NaN are equal to themselves, the widened tensor has the same values
    assert "layers.0.input_layernorm.weight: 12 of 12 elements differ, at most by 0; the first at [0]: 0.0" in values[0]
    assert convert("compare", tmp_path / "a", tmp_path / "a") == 0


def test_tied_checkpoints_with_and_without_a_stored_head_are_equal(tmp_path: Path) -> None:
    spec = small_spec("qwen3", tied=True)
    weights = make_hf(tmp_path / "a", spec)
    write_checkpoint(tmp_path / "b", spec, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert convert("hf_to_megatron", "--hf", tmp_path / "b", "--out", tmp_path / "m", "--pp", 2) == 0
    for pair in (("a", "b"), ("b", "a"), ("m", "b"), ("b", "m"), ("a", "m")):
        assert convert("compare", *(tmp_path / name for name in pair)) == 0


def test_configs_of_transformers_survive(tmp_path: Path) -> None:
    """What the converters do not understand in config.json (torch_dtype of transformers 4 too) is carried over."""
    spec = small_spec("qwen2")
    write_checkpoint(tmp_path / "hf", spec, random_weights(spec))
    config = transformers_config(spec).to_dict() | {"custom": [1, 2]}
    config.pop("dtype", None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert convert("hf_to_megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m") == 0
    assert convert("megatron_to_hf", "--megatron", tmp_path / "m", "--out", tmp_path / "b", "--dtype", "fp32") == 0
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["custom"] == [1, 2]
    assert written["torch_dtype"] == "float32"
