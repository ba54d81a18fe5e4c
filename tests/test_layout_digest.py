"""Digests: equal for equal weights in any layout, and different after every fault that resharding is prone to."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_layout_checkpoint import expected, random_weights
from test_layout_megatron import small_spec
from torch import Tensor

from megatron_oreal.layout import (
    Digester,
    DigestError,
    DigestReport,
    Layout,
    RankGrid,
    embedded_layout,
    hf_layout,
    megatron_layout,
)
from megatron_oreal.layout.blocks import to_slices
from megatron_oreal.layout.digest import CHUNK_ELEMENTS, _Hasher

Ranks = dict[int, dict[str, Tensor]]
GRID = RankGrid(tp=2, pp=2, dp=2)
SPEC = small_spec("qwen2", tied=True)
SOURCE = megatron_layout(SPEC, tp=2, pp=2, vocab_divisor=16)
ENGINE = embedded_layout(SPEC)
LAYER = "model.layers.1."


def everywhere(layout: Layout, ranks: dict[int, tuple[int, ...]], weights: dict[str, Tensor]) -> Ranks:
    """Rank to its own copy of its shard."""
    return {rank: expected(layout.shards[index], weights) for index, held in ranks.items() for rank in held}


class World:
    """Eight trainer ranks and an engine replica on each, in one process: what ranks gather is put together here."""

    def __init__(self, wire_dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.weights = random_weights(SPEC, seed=seed)
        engines = {0: tuple(range(8))}
        self.source = everywhere(SOURCE, GRID.replicas(), self.weights)
        self.dest = everywhere(ENGINE, engines, self.weights)
        self.digester = Digester(SOURCE, GRID.replicas(), ENGINE, engines, wire_dtype=wire_dtype)

    def compare(self, version: int = 7) -> DigestReport | str:
        return self.digester.compare({rank: self.vector(rank, version) for rank in range(8)})

    def vector(self, rank: int, version: int) -> np.ndarray:
        source = self.digester.hash_source(rank, self.source[rank])
        dest = self.digester.hash_dest(rank, self.dest[rank])
        return torch.cat([torch.tensor([version]), dest[:1], source, dest[1:]]).numpy()


def test_equal_weights_agree_and_have_one_digest_in_every_layout() -> None:
    reports = [World().compare()]
    for layout in (megatron_layout(SPEC, tp=1, pp=1, vocab_divisor=8), hf_layout(SPEC), ENGINE):
        weights = random_weights(SPEC)
        shard = expected(layout.shards[0], weights)
        digester = Digester(layout, {0: [0]}, ENGINE, {0: [0]}, wire_dtype=torch.bfloat16)
        reports.append(digester.check(0, 7, shard, expected(ENGINE.shards[0], weights)))
    assert all(isinstance(report, DigestReport) for report in reports)
    assert len({report.digest for report in reports}) == 1  # type: ignore[union-attr]
    assert all(report.tensors == reports[0].tensors for report in reports)  # type: ignore[union-attr]
    assert World(seed=1).compare().digest != reports[0].digest  # type: ignore[union-attr]


def test_digest_is_the_sum_of_its_definition() -> None:
    """Against Python integers: word * R[row] * C[column] modulo 2^64 over the pairs of elements of one tensor."""
    report = World().compare()
    assert isinstance(report, DigestReport)
    name = "model.embed_tokens.weight"
    words = random_weights(SPEC)[name].view(torch.int32).tolist()
    rows, columns = splitmix64(1 << 62, len(words)), splitmix64(2 << 62, len(words[0]))
    total = sum(words[i][j] * (rows[i] | 1) * (columns[j] | 1) for i in range(len(words)) for j in range(len(words[0])))
    assert report.tensors[name] == total % 2**64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_digests_of_any_cut_add_up(dtype: torch.dtype) -> None:
    """Cuts at odd columns, in odd strides and at odd offsets, which fall inside a word, included."""
    hasher = _Hasher(dtype, 64)
    values = torch.randn(7, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[2, 3], values[3, 4] = -0.0, math.nan
    whole = hasher.digest(values, ((3, 10), (2, 22)))
    for cut in (1, 4, 7, 19):
        shards = values[:, :cut].clone(), values[:, cut:].clone()
        assert hasher.digest(shards[0], ((3, 10), (2, 2 + cut))) + hasher.digest(
            shards[1], ((3, 10), (2 + cut, 22))
        ) == whole, cut  # fmt: skip
        parts = hasher.digest(values[:, :cut], ((3, 10), (2, 2 + cut))), hasher.digest(
            values[:, cut:], ((3, 10), (2 + cut, 22))
        )  # fmt: skip
        assert sum(parts) == whole, cut
    assert hasher.digest(values[:2], ((3, 5), (2, 22))) + hasher.digest(values[2:], ((5, 10), (2, 22))) == whole


def splitmix64(seed: int, count: int) -> list[int]:
    mask, values = 2**64 - 1, []
    for index in range(1, count + 1):
        z = (seed + index * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(z ^ (z >> 31))
    return values


def test_python_splitmix64_here_is_the_published_one() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


Held = dict[str, Tensor]
FFN, HEAD = SPEC.ffn_hidden_size, SPEC.head_dim
NORM = LAYER + "post_attention_layernorm.weight"
QKV, BIAS = LAYER + "self_attn.qkv_proj.weight", LAYER + "self_attn.qkv_proj.bias"
GATE_UP, DOWN, OUT = (
    LAYER + "mlp.gate_up_proj.weight",
    LAYER + "mlp.down_proj.weight",
    LAYER + "self_attn.o_proj.weight",
)


def exchange(one: Tensor, other: Tensor) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)


def rows(tensor: Tensor, number: int, size: int) -> Tensor:
    return tensor[number * size : (number + 1) * size]


def shift(tensor: Tensor) -> None:
    tensor[1:] = tensor[:-1].clone()


FAULTS: dict[str, tuple[str, Callable[[Held], object]]] = {
    "two rows exchanged": ("mlp.down_proj", lambda t: exchange(t[DOWN][0], t[DOWN][5])),
    "two columns exchanged": ("mlp.down_proj", lambda t: exchange(t[DOWN][:, 3], t[DOWN][:, 4])),
    "two elements exchanged": ("mlp.down_proj", lambda t: exchange(t[DOWN][2, 3], t[DOWN][3, 2])),
    "two query heads exchanged": ("q_proj.weight", lambda t: exchange(rows(t[QKV], 0, HEAD), rows(t[QKV], 3, HEAD))),
    "a key for a value head": ("k_proj.weight", lambda t: exchange(rows(t[QKV], 4, HEAD), rows(t[QKV], 6, HEAD))),
    "two heads of the bias exchanged": (
        "q_proj.bias",
        lambda t: exchange(rows(t[BIAS], 1, HEAD), rows(t[BIAS], 2, HEAD)),
    ),
    "gate and up exchanged": ("mlp.gate_proj", lambda t: exchange(rows(t[GATE_UP], 0, FFN), rows(t[GATE_UP], 1, FFN))),
    "a block transposed": ("o_proj", lambda t: t[OUT][:8, :8].copy_(t[OUT][:8, :8].T.clone())),
    "a block one row too low": ("mlp.gate_proj", lambda t: shift(t[GATE_UP][:9])),
    "a block one column to the right": ("o_proj", lambda t: shift(t[OUT][:, :9].T)),
    "a tensor never written": ("post_attention_layernorm", lambda t: t[NORM].zero_()),
    "one row never written": ("embed_tokens", lambda t: t["model.embed_tokens.weight"][36].fill_(math.nan)),
    "all signs turned": ("mlp.down_proj", lambda t: t[DOWN].neg_()),
    "last bits rounded away": ("mlp.up_proj", lambda t: rows(t[GATE_UP], 1, FFN).view(torch.int16).bitwise_and_(-2)),
    "scaled by a little": ("mlp.down_proj", lambda t: t[DOWN].mul_(1.01)),
    "two layers exchanged": (
        "model.layers.1.mlp.down_proj",
        lambda t: exchange(t[DOWN], t["model.layers.2.mlp.down_proj.weight"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_engine_is_found_and_named(fault: str) -> None:
    world = World()
    tensor, spoil = FAULTS[fault]
    spoil(world.dest[5])
    said = world.compare()
    assert isinstance(said, str)
    assert "version 7 did not arrive" in said
    assert tensor in said.split("on rank")[0]
    assert "on rank 5 " in said
    assert said.endswith("ranks 5")
    assert "\n" not in said


def test_stale_weights_are_found_tensor_by_tensor() -> None:
    """A step changes everything a little; every single tensor that keeps its last version is found."""
    world = World()
    stale = world.dest[3]
    fresh = {name: value + value.abs() * 2**-7 for name, value in world.weights.items()}
    replicas = GRID.replicas()
    world.source, world.dest = everywhere(SOURCE, replicas, fresh), everywhere(ENGINE, {0: tuple(range(8))}, fresh)
    assert isinstance(world.compare(), DigestReport)
    for name in stale:
        kept, world.dest[3][name] = world.dest[3][name], stale[name]
        said = world.compare()
        assert isinstance(said, str), name
        assert "rank 3 " in said
        world.dest[3][name] = kept


@pytest.mark.parametrize("bit", range(16))
def test_every_bit_of_an_element_counts(bit: int) -> None:
    world = World()
    target = world.dest[0][DOWN].view(torch.int16)
    target[2, 5] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert "down_proj" in str(world.compare())


def test_zeros_and_nans_are_compared_by_their_bits() -> None:
    world = World()
    for rank in range(8):
        for held in (world.source[rank], world.dest[rank]):
            for name, value in held.items():
                if name.endswith(("final_layernorm.weight", "model.norm.weight")):
                    value[:3] = torch.tensor([math.nan, -0.0, math.inf])
    assert isinstance(world.compare(), DigestReport)
    world.dest[6]["model.norm.weight"][1] = 0.0
    assert "'model.norm.weight' [0:12] on rank 6 " in str(world.compare())


def test_a_data_parallel_replica_that_drifted_is_named() -> None:
    """Replicas of a shard, here of TP rank 1 on the last stage, are ranks 5 and 7; only one of them is sent."""
    for drifted in GRID.replicas()[3]:
        world = World()
        world.source[drifted]["decoder.layers.0.mlp.linear_fc2.weight"][0, 0] += 1
        said = str(world.compare())
        assert "differ between data-parallel replicas" in said
        assert "model.layers.2.mlp.down_proj.weight" in said
        assert "rank 5 " in said and "rank 7" in said


def test_tensor_parallel_copies_that_drifted_are_reported_and_engines_may_hold_either() -> None:
    world = World()
    norm = "decoder.layers.0.input_layernorm.weight"
    for rank in (1, 3):  # TP rank 1 of both replicas of the first stage
        world.source[rank][norm][0] += 1
    report = world.compare()
    assert isinstance(report, DigestReport)
    assert report.drifted == ("model.layers.0.input_layernorm.weight",)
    world.dest[4]["model.layers.0.input_layernorm.weight"].copy_(world.source[1][norm])
    assert isinstance(world.compare(), DigestReport)
    world.dest[4]["model.layers.0.input_layernorm.weight"][0] += 5
    assert "input_layernorm" in str(world.compare())


def test_a_rank_with_another_version_is_named() -> None:
    world = World()
    vectors = {rank: world.vector(rank, 7 + (rank == 6)) for rank in range(8)}
    assert world.digester.compare(vectors) == "rank 6 publishes version 8, rank 0 version 7"


def test_padding_of_the_destination_must_be_zero() -> None:
    padded = megatron_layout(SPEC, tp=1, pp=1, vocab_divisor=16)
    weights = random_weights(SPEC)
    source, dest = expected(ENGINE.shards[0], weights), expected(padded.shards[0], weights)
    digester = Digester(ENGINE, {0: [0]}, padded, {0: [0]}, wire_dtype=torch.bfloat16)
    digester.check(0, 1, source, dest)
    dest["embedding.word_embeddings.weight"][SPEC.vocab_size + 2, 3] = -0.0
    with pytest.raises(DigestError, match=r"version 1 .* 1 elements of padding are not zero on rank 0"):
        digester.check(0, 1, source, dest)


@pytest.mark.parametrize("trainer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", [torch.float32, torch.bfloat16])
def test_values_are_compared_as_they_are_on_the_wire(trainer: torch.dtype, engine: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in random_weights(SPEC).items()}
    shard = ENGINE.shards[0]
    source = {block.param: torch.zeros(shard.shapes[block.param]) for block in shard.blocks}
    for block in shard.blocks:
        source[block.param][to_slices(block.dest)] = weights[block.tensor][to_slices(block.source)]
    source = {name: value.to(trainer) for name, value in source.items()}
    dest = {name: value.bfloat16().to(engine).clone() for name, value in source.items()}
    digester = Digester(ENGINE, {0: [0]}, ENGINE, {0: [0]}, wire_dtype=torch.bfloat16)
    assert digester.check(0, 0, source, dest).bytes_read == sum(v.nbytes for h in (source, dest) for v in h.values())
    dest[DOWN][1, 2] *= 1 + 2**-6
    with pytest.raises(DigestError, match="down_proj"):
        digester.check(0, 0, source, dest)


def test_temporaries_are_bounded_and_chunks_do_not_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for chunk in (1, 7, 50, 2**18):
        monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk)
        world = World()
        reports.append(world.compare())
        (scratch,) = world.digester._hasher.scratch.values()
        assert scratch.numel() <= max(chunk, FFN, SPEC.vocab_size)
        world.digester.release()
        assert not world.digester._hasher.scratch
    assert all(report == reports[0] for report in reports)


def test_threads_may_share_one() -> None:
    world = World()
    want = [world.vector(rank, 7).tolist() for rank in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda rank: world.vector(rank % 8, 7).tolist(), range(160))
        assert all(each == want[number % 8] for number, each in enumerate(found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_digest_of_a_gpu_is_that_of_the_cpu() -> None:
    world = World()
    want = world.compare()
    for ranks in (world.source, world.dest):
        for rank, held in ranks.items():
            ranks[rank] = {name: value.cuda() for name, value in held.items()}
    vectors = {}
    for rank in range(8):
        source = world.digester.hash_source(rank, world.source[rank]).cpu()
        dest = world.digester.hash_dest(rank, world.dest[rank]).cpu()
        vectors[rank] = torch.cat([torch.tensor([7]), dest[:1], source, dest[1:]]).numpy()
    assert world.digester.compare(vectors) == want
