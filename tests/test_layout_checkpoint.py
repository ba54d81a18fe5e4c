"""Reading safetensors checkpoints into the shards of a rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout_megatron import small_spec
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    ModelSpec,
    SafetensorsSource,
    ShardLayout,
    hf_layout,
    hf_tensors,
    load_from_hf,
    megatron_layout,
)
from megatron_oreal.layout.blocks import to_slices
from megatron_oreal.layout.hf import INDEX_FILE, SINGLE_FILE, file_names, partition_files


def random_weights(spec: ModelSpec, *, reward_model: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Bfloat16 values; with this few elements nearly all differ, and each is compared bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_tensors(spec, reward_model=reward_model)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_checkpoint(folder: Path, spec: ModelSpec, weights: dict[str, Tensor], files: int = 1) -> None:
    from test_layout_families import transformers_config  # ranks that import this module need no transformers

    folder.mkdir(parents=True, exist_ok=True)
    transformers_config(spec).save_pretrained(folder)
    names = file_names(files)
    weight_map = {tensor: names[number % files] for number, tensor in enumerate(weights)}
    for name in names:
        save_file({key: value for key, value in weights.items() if weight_map[key] == name}, folder / name)
    if files > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def garbage(shard: ShardLayout, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: torch.full(shape, float("nan"), dtype=dtype).requires_grad_() for name, shape in shard.params}


def expected(shard: ShardLayout, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    want = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shard.params}
    for block in shard.blocks:
        want[block.param][to_slices(block.dest)] = weights[block.tensor][to_slices(block.source)]
    return want


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_live_parameters_are_filled_in_place_and_padding_is_zero(tmp_path: Path, tied: bool, files: int) -> None:
    spec = small_spec("qwen2", tied=tied)
    weights = random_weights(spec)
    write_checkpoint(tmp_path, spec, weights, files)
    for shard in megatron_layout(spec, tp=2, pp=2, vocab_divisor=16).shards:
        live = garbage(shard)
        before = {name: tensor.data_ptr() for name, tensor in live.items()}
        with SafetensorsSource(tmp_path) as source:
            load_from_hf(source, shard, live)
        assert_equal(live, expected(shard, weights))
        assert {name: tensor.data_ptr() for name, tensor in live.items()} == before


def test_each_rank_reads_only_the_bytes_that_it_holds(tmp_path: Path) -> None:
    spec = small_spec("qwen2")
    write_checkpoint(tmp_path, spec, random_weights(spec), files=3)
    layout = megatron_layout(spec, tp=2, pp=2)
    for shard in layout.shards:
        padding = sum(torch.empty(shape).numel() for _, shape in shard.params)
        padding -= sum(expected(shard, random_weights(spec))[b.param][to_slices(b.dest)].numel() for b in shard.blocks)
        with SafetensorsSource(tmp_path) as source:
            load_from_hf(source, shard, garbage(shard))
            assert source.bytes_read == 2 * (shard.num_elements() - padding)
            assert source.bytes_read < 0.5 * 2 * spec.num_parameters()


def test_parameters_of_another_dtype_are_cast(tmp_path: Path) -> None:
    spec = small_spec("llama")
    weights = random_weights(spec)
    write_checkpoint(tmp_path, spec, weights)
    shard = hf_layout(spec).shards[0]
    live = garbage(shard, torch.float32)
    with SafetensorsSource(tmp_path) as source:
        load_from_hf(source, shard, live)
    assert_equal(live, {name: value.float() for name, value in weights.items()})


def test_tied_checkpoints_with_and_without_a_stored_head_load_alike(tmp_path: Path) -> None:
    spec = small_spec("qwen3", tied=True)
    weights = random_weights(spec)
    write_checkpoint(tmp_path / "without", spec, weights)
    write_checkpoint(
        tmp_path / "with", spec, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    )
    last = megatron_layout(spec, tp=1, pp=2).shards[1]
    for folder in ("without", "with"):
        live = garbage(last)
        with SafetensorsSource(tmp_path / folder) as source:
            load_from_hf(source, last, live)
        assert torch.equal(live["output_layer.weight"], weights["model.embed_tokens.weight"])


def test_reward_model_starts_from_a_policy_with_a_zero_score(tmp_path: Path) -> None:
    spec = small_spec("qwen2")
    weights = random_weights(spec)
    write_checkpoint(tmp_path, spec, weights)
    shard = megatron_layout(spec, tp=2, pp=1, reward_model=True).shards[1]
    live = garbage(shard)
    with SafetensorsSource(tmp_path) as source:
        with pytest.raises(UserError, match=r"'score\.weight' \[1, 12\] is missing"):
            load_from_hf(source, shard, live)
        assert all(tensor.isnan().all() for tensor in live.values()), "a refused load must not touch the parameters"
        load_from_hf(source, shard, live, missing_ok={"score.weight"})
    assert_equal(live, expected(shard, weights | {"score.weight": torch.zeros(1, 12, dtype=torch.bfloat16)}))


def test_stored_score_is_loaded_even_where_it_may_be_missing(tmp_path: Path) -> None:
    spec = small_spec("qwen2")
    weights = random_weights(spec, reward_model=True)
    write_checkpoint(tmp_path, spec, weights)
    shard = megatron_layout(spec, tp=1, pp=1, reward_model=True).shards[0]
    live = garbage(shard)
    with SafetensorsSource(tmp_path) as source:
        load_from_hf(source, shard, live, missing_ok={"score.weight"})
    assert torch.equal(live["output_layer.weight"], weights["score.weight"])


def _drop(folder: Path, spec: ModelSpec) -> None:
    weights = load_file(folder / SINGLE_FILE)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / SINGLE_FILE)


def _smaller_vocabulary(folder: Path, spec: ModelSpec) -> None:
    save_file(random_weights(replace(spec, vocab_size=30)), folder / SINGLE_FILE)


def _float8(folder: Path, spec: ModelSpec) -> None:
    weights = load_file(folder / SINGLE_FILE)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / SINGLE_FILE)


def _truncate(folder: Path, spec: ModelSpec) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])


def _remove_weights(folder: Path, spec: ModelSpec) -> None:
    (folder / SINGLE_FILE).unlink()


def _index_to_nowhere(folder: Path, spec: ModelSpec) -> None:
    weight_map = dict.fromkeys(hf_tensors(spec), "model-00001-of-00009.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SINGLE_FILE).unlink()


def _index_of_other_files(folder: Path, spec: ModelSpec) -> None:
    write_checkpoint(folder, spec, random_weights(spec), files=2)


def _index_that_lies(folder: Path, spec: ModelSpec) -> None:
    weights = load_file(folder / SINGLE_FILE)
    del weights["lm_head.weight"]
    save_file(weights, folder / SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(hf_tensors(spec), SINGLE_FILE)}))


def _index_of_junk(folder: Path, spec: ModelSpec) -> None:
    (folder / INDEX_FILE).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"'model\.layers\.1\.mlp\.up_proj\.weight' \[24, 12\] is missing"),
        (
            _smaller_vocabulary,
            r"model\.safetensors: tensor 'model\.embed_tokens\.weight' has shape \[30, 12\].*\[37, 12\]",
        ),
        (_float8, r"model\.safetensors: tensor 'model\.norm\.weight' has dtype F8_E4M3"),
        (_truncate, r"model\.safetensors: damaged"),
        (_remove_weights, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        (_index_to_nowhere, r"model-00001-of-00009\.safetensors: missing, though"),
        (
            _index_of_other_files,
            r"holds model\.safetensors, which transformers reads, and model\.safetensors\.index",
        ),
        (_index_that_lies, r"model\.safetensors: tensor 'lm_head\.weight' is missing from the file"),
        (_index_of_junk, r"index\.json: not a safetensors index"),
    ],
)
def test_checkpoints_that_do_not_fit_are_one_line_errors(
    tmp_path: Path, damage: Callable[[Path, ModelSpec], None], message: str
) -> None:
    spec = small_spec("llama")
    write_checkpoint(tmp_path, spec, random_weights(spec))
    damage(tmp_path, spec)
    shard = hf_layout(spec).shards[0]
    with pytest.raises(UserError, match=message) as caught, SafetensorsSource(tmp_path) as source:
        load_from_hf(source, shard, garbage(shard))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_live_tensors_that_differ_from_the_layout_are_refused(tmp_path: Path) -> None:
    spec = small_spec("llama")
    write_checkpoint(tmp_path, spec, random_weights(spec))
    shard = hf_layout(spec).shards[0]
    with SafetensorsSource(tmp_path) as source:
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(1,\)"):
            load_from_hf(source, shard, garbage(shard) | {"model.norm.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match="is not among the live tensors"):
            load_from_hf(source, shard, {})


def test_files_of_a_checkpoint_stay_below_the_limit_and_keep_the_order() -> None:
    tensors = hf_tensors(small_spec("qwen2"))
    files = partition_files(tensors, 2, 2000)
    sizes = [{name: 2 * torch.Size(shape).numel() for name, shape in file.items()} for file in files]
    assert [name for file in files for name in file] == list(tensors)
    assert all(sum(file.values()) <= 2000 or len(file) == 1 for file in sizes)
    assert len(files) > 3
    assert file_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
