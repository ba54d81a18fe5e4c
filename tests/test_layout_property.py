"""Random models and layouts: every element lands once where it belongs, nothing moves that need not, loads are even.

The oracles fuse and split whole tensors; what ranks lack is counted element by element; the lower bound of the busiest
sender goes over all sets of ranks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_layout_megatron import EMPTY, FAMILIES, Arrays, empty_shards, megatron_oracle, small_spec, unique_values
from test_layout_sglang import sglang_oracle

from megatron_oreal.layout import (
    Layout,
    ModelSpec,
    Plan,
    embedded_layout,
    hf_layout,
    make_plan,
    megatron_layout,
    sglang_layout,
    sglang_padded_vocab_size,
)
from megatron_oreal.layout.blocks import to_slices

GARBAGE = -7
HEADS = [(16, 4), (16, 2), (16, 16), (16, 1), (16, 8), (9, 3), (28, 4), (12, 3), (8, 2), (14, 2), (4, 4), (1, 1)]
"""Query heads and KV heads."""
KINDS = ["hf", "megatron", "sglang", "embedded"]
PAIRS = [("megatron", kind) for kind in KINDS] + [("sglang", "sglang"), ("sglang", "hf"), ("sglang", "embedded")]
"""Each is gone there and back."""


@dataclass(frozen=True)
class Side:
    """A layout, what every shard of it must hold, and the global ranks that hold each shard."""

    layout: Layout
    want: list[Arrays]
    ranks: dict[int, list[int]]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        shapes = [shard.shapes for shard in self.layout.shards]
        printer.text(f"{self.layout.label} on {self.ranks}: {shapes}")  # what hypothesis shows of a failing example

    def shard_of(self) -> dict[int, int]:
        return {rank: shard for shard, ranks in self.ranks.items() for rank in ranks}


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads, kv_heads = draw(st.sampled_from(HEADS))
    spec = small_spec(
        draw(st.sampled_from(FAMILIES)),
        tied=draw(st.booleans()),
        heads=heads,
        kv_heads=kv_heads,
        layers=draw(st.integers(1, 9)),
        vocab=draw(st.sampled_from([5, 37, 64, 96, 128, 130])),
    )
    ffn = 48 * 7 if heads % 7 == 0 else 48
    return replace(spec, hidden_size=4, ffn_hidden_size=ffn, head_dim=draw(st.sampled_from([2, 4])))


@st.composite
def splits(draw: st.DrawFn, layers: int, pp: int, chunks: int) -> list[list[int]]:
    """Any number of layers on any chunk, none included."""
    cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=pp * chunks - 1, max_size=pp * chunks - 1)))
    counts = [stop - start for start, stop in itertools.pairwise([0, *cuts, layers])]
    return [[counts[chunk * pp + stage] for chunk in range(chunks)] for stage in range(pp)]


@st.composite
def megatron_sides(draw: st.DrawFn, spec: ModelSpec, hf: Arrays, reward_model: bool) -> tuple[Layout, list[Arrays]]:
    fits = [
        tp
        for tp in range(16, 0, -1)
        if spec.num_heads % tp == 0
        and (spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0)
        and (spec.q_size + 2 * spec.kv_size) % tp == 0
        and spec.ffn_hidden_size % tp == 0
    ]
    tp, pp = draw(st.sampled_from(fits)), draw(st.integers(1, 8))
    vpp = draw(st.sampled_from([None, 2, 3])) if pp > 1 else None
    divisor = draw(st.sampled_from([1, 3, 16, 64]))
    impl = draw(st.sampled_from(["local", "transformer_engine"]))
    split = draw(splits(spec.num_layers, pp, vpp or 1))
    layout = megatron_layout(
        spec, tp=tp, pp=pp, vpp=vpp, vocab_divisor=divisor, transformer_impl=impl, reward_model=reward_model,
        layer_split=split,
    )  # fmt: skip
    want = megatron_oracle(spec, hf, tp, pp, vpp, divisor, impl == "transformer_engine", reward_model, split)
    return layout, want


@st.composite
def sglang_sides(draw: st.DrawFn, spec: ModelSpec, hf: Arrays) -> tuple[Layout, list[Arrays]]:
    fits = [
        tp
        for tp in range(16, 0, -1)
        if spec.num_heads % tp == 0
        and (spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0)
        and spec.ffn_hidden_size % tp == 0
    ]
    tp = draw(st.sampled_from(fits))
    padded = sglang_padded_vocab_size(spec.vocab_size, tp=tp, device="cpu")
    return sglang_layout(spec, tp=tp, device="cpu"), sglang_oracle(spec, hf, tp, padded)


@st.composite
def sides(draw: st.DrawFn, kind: str, spec: ModelSpec, hf: Arrays, reward_model: bool, world: int, first: int) -> Side:
    if kind == "megatron":
        layout, want = draw(megatron_sides(spec, hf, reward_model))
    elif kind == "sglang":
        layout, want = draw(sglang_sides(spec, hf))
    elif kind == "embedded":
        layout, want = embedded_layout(spec), sglang_oracle(spec, hf, 1, spec.vocab_size)
    else:
        layout, want = hf_layout(spec, reward_model=reward_model), [hf]
    count = len(layout.shards)
    replicas = draw(st.integers(1, max(1, world // count)))
    order = draw(st.permutations(range(first, first + max(world, count * replicas))))
    return Side(layout, want, {i: sorted(order[i * replicas : (i + 1) * replicas]) for i in range(count)})


@st.composite
def problems(draw: st.DrawFn, kinds: tuple[str, str], world: int) -> tuple[Side, Side, int | None]:
    reward_model = draw(st.booleans()) if set(kinds) <= {"hf", "megatron"} else False
    spec = draw(specs())
    hf = unique_values(spec, reward_model)
    source = draw(sides(kinds[0], spec, hf, reward_model, world, 0))
    dest = draw(sides(kinds[1], spec, hf, reward_model, world, draw(st.sampled_from([0, 0, 3]))))
    return source, dest, draw(st.sampled_from([None, 1, 2, 4, 8]))


def follow(plan: Plan, source: Side, dest: Side) -> None:
    """Carry the plan out and compare every destination rank with the oracle; padding of the source is garbage."""
    held = {rank: source.want[shard] for rank, shard in source.shard_of().items()}
    for rank, shard in source.shard_of().items():
        if source.layout.shards[shard].padding:
            held[rank] = {name: value.copy() for name, value in held[rank].items()}
            for name, rect in source.layout.shards[shard].padding:
                held[rank][name][to_slices(rect)] = GARBAGE
    result = {rank: empty_shards(dest.layout)[shard] for rank, shard in dest.shard_of().items()}
    for rank, rects in plan.zeros.items():
        for name, rect in rects:
            result[rank][name][to_slices(rect)] = 0
    for copy in plan.copies():
        target = result[copy.dst_rank][copy.dst_param][to_slices(copy.dst_rect)]
        assert (target == EMPTY).all(), f"{copy} writes an element again"
        target[...] = held[copy.src_rank][copy.src_param][to_slices(copy.src_rect)]
    for rank, shard in dest.shard_of().items():
        assert result[rank].keys() == dest.want[shard].keys()
        for name, value in dest.want[shard].items():
            np.testing.assert_array_equal(result[rank][name], value, err_msg=name)
        for name, alias in plan.aliases(rank).items():
            mine = source.want[source.shard_of()[rank]][alias]
            np.testing.assert_array_equal(mine, dest.want[shard][name], err_msg=f"{name} as {alias}")


def ids(arrays: Arrays) -> np.ndarray:
    return np.unique(np.concatenate([[0], *(value.ravel() for value in arrays.values())]))


def check_traffic(plan: Plan, source: Side, dest: Side, ranks_per_node: int | None) -> None:
    """Every rank receives what it lacks, once; across nodes only what no rank of the node holds."""
    stats = plan.statistics
    held = {rank: ids(source.want[shard]) for rank, shard in source.shard_of().items()}
    wanted = {rank: ids(dest.want[shard]) for rank, shard in dest.shard_of().items()}
    nothing = np.empty(0, np.int64)
    lacked = {r: np.setdiff1d(want, [0, *held.get(r, nothing)]) for r, want in wanted.items()}
    repeated = {r: sum((v != 0).sum() for v in dest.want[s].values()) for r, s in dest.shard_of().items()}
    if all(repeated[r] == (want != 0).sum() for r, want in wanted.items()):  # not a tied embedding twice on a rank
        sizes = {r: len(ids) for r, ids in lacked.items() if len(ids)}
        assert stats.received == stats.lacked == sizes
        assert stats.ratio == 1.0
    assert sum(stats.sent.values()) == sum(stats.received.values())
    if ranks_per_node is None:
        assert stats.cross_node is None
        return
    node_holds = defaultdict(lambda: nothing)
    for rank, elements in held.items():
        node_holds[rank // ranks_per_node] = np.union1d(node_holds[rank // ranks_per_node], elements)
    least = sum(len(np.setdiff1d(ids, node_holds[rank // ranks_per_node])) for rank, ids in lacked.items())
    crossing = sum(
        int(np.prod([stop - start for start, stop in copy.dst_rect]))
        for copy in plan.copies()
        if copy.src_rank // ranks_per_node != copy.dst_rank // ranks_per_node
    )
    assert crossing == stats.cross_node == least


def run(problem: tuple[Side, Side, int | None]) -> None:
    source, dest, ranks_per_node = problem
    plans = []
    for a, b in ((source, dest), (dest, source)):  # there and back: both ends are the oracle's
        plan = make_plan(a.layout, a.ranks, b.layout, b.ranks, ranks_per_node=ranks_per_node, cached=False)
        follow(plan, a, b)
        check_traffic(plan, a, b, ranks_per_node)
        plans.append(plan)
    if source.layout.shards == dest.layout.shards and source.ranks == dest.ranks:
        assert all(plan.statistics.nothing_moves for plan in plans)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@settings(max_examples=12, derandomize=True, **COMMON)
@given(data=st.data())
def test_every_element_is_written_once_and_the_way_back_is_the_identity(
    kinds: tuple[str, str], data: st.DataObject
) -> None:
    run(data.draw(problems(kinds, world=16)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@settings(max_examples=300, **COMMON)
@given(data=st.data())
def test_every_element_is_written_once_and_the_way_back_is_the_identity_many(
    kinds: tuple[str, str], data: st.DataObject
) -> None:
    run(data.draw(problems(kinds, world=32)))


def least_busiest(plan: Plan, source: Side, ranks_per_node: int | None) -> float:
    """Over all sets of ranks: what only they may send, divided by their number. The largest share is the optimum."""
    source_ranks = {shard: set(ranks) for shard, ranks in source.ranks.items()}
    demand: dict[frozenset[int], int] = defaultdict(int)
    local = set()
    for copy in plan.copies():
        if copy.src_rank == copy.dst_rank:
            local.add((copy.dst_rank, copy.dst_param, copy.dst_rect))
    for row in range(len(plan)):
        piece, dst = plan.pieces[plan.piece[row]], int(plan.dst_rank[row])
        if (dst, piece.param, piece.rect) in local:
            continue
        may = frozenset().union(*(source_ranks[holder.index] for holder in piece.holders))
        if ranks_per_node is not None:
            may = frozenset(rank for rank in may if rank // ranks_per_node == dst // ranks_per_node) or may
        demand[may] += piece.size
    ranks = sorted(frozenset().union(*demand)) if demand else []
    best = 0.0
    for count in range(1, len(ranks) + 1):
        for chosen in itertools.combinations(ranks, count):
            inside = sum(size for may, size in demand.items() if may <= set(chosen))
            best = max(best, inside / count)
    return best


def check_balance(problem: tuple[Side, Side, int | None]) -> None:
    source, dest, ranks_per_node = problem
    assume(sum(map(len, source.ranks.values())) <= 12)
    plan = make_plan(source.layout, source.ranks, dest.layout, dest.ranks, ranks_per_node=ranks_per_node, cached=False)
    best = least_busiest(plan, source, ranks_per_node)
    stats = plan.statistics
    piece = max((piece.size for piece in plan.pieces), default=0)
    assert stats.send_bound <= np.ceil(best)
    assert max(stats.sent.values(), default=0) <= 1.01 * best + piece


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@settings(max_examples=8, derandomize=True, **COMMON)
@given(data=st.data())
def test_busiest_sender_is_within_one_piece_and_one_percent_of_the_optimum(
    kinds: tuple[str, str], data: st.DataObject
) -> None:
    check_balance(data.draw(problems(kinds, world=8)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@settings(max_examples=300, **COMMON)
@given(data=st.data())
def test_busiest_sender_is_within_one_piece_and_one_percent_of_the_optimum_many(
    kinds: tuple[str, str], data: st.DataObject
) -> None:
    check_balance(data.draw(problems(kinds, world=12)))
