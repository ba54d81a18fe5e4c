"""Plans: complete, minimal, balanced, and the same on every rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout_megatron import empty_shards, place, small_spec

from megatron_oreal.errors import UserError
from megatron_oreal.layout import (
    Block,
    Layout,
    ModelSpec,
    Plan,
    RankGrid,
    RopeSpec,
    ShardLayout,
    embedded_layout,
    hf_layout,
    make_plan,
    megatron_layout,
    sglang_layout,
)
from megatron_oreal.layout.blocks import Rect, intersect, rect_size, shift, to_slices
from megatron_oreal.layout.plan import _cached_plan

SHAPE = (7, 5)


@st.composite
def grids(draw: st.DrawFn) -> Layout:
    """One HF tensor cut by a random grid, its cells dealt out to ranks, some to several, one parameter a cell."""
    cuts = [sorted({0, size} | draw(st.sets(st.integers(1, size - 1), max_size=3))) for size in SHAPE]
    ranks = 3
    held: list[list[Block]] = [[] for _ in range(ranks)]
    for rows in zip(cuts[0], cuts[0][1:], strict=False):
        for columns in zip(cuts[1], cuts[1][1:], strict=False):
            dest = ((0, rows[1] - rows[0]), (0, columns[1] - columns[0]))
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                held[rank].append(Block("w", (rows, columns), f"cell{rows}{columns}", dest))
    return Layout("grid", tuple(shard_of(blocks) for blocks in held))


def shard_of(blocks: list[Block]) -> ShardLayout:
    params = tuple((block.param, tuple(stop for _, stop in block.dest)) for block in blocks)
    return ShardLayout(params, (("w", SHAPE),) if blocks else (), tuple(blocks))


@settings(max_examples=150, deadline=None)
@given(source=grids(), dest=grids(), replicas=st.integers(1, 3))
def test_any_grid_to_any_grid_fills_every_element_once(source: Layout, dest: Layout, replicas: int) -> None:
    hf = {"w": np.arange(1, 1 + np.prod(SHAPE)).reshape(SHAPE)}
    count = len(source.shards)
    holders = {i: [i + r * count for r in range(replicas)] for i in range(count)}
    plan = make_plan(source, holders, dest, {j: j for j in range(count)})
    result = empty_shards(dest)
    held = place(source, hf)
    for copy in plan.copies():
        target = result[copy.dst_rank][copy.dst_param][to_slices(copy.dst_rect)]
        assert (target == -1).all()
        target[...] = held[copy.src_rank % count][copy.src_param][to_slices(copy.src_rect)]
    for got, want in zip(result, place(dest, hf), strict=True):
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    check_traffic(plan, source, dest)


def check_traffic(plan: Plan, source: Layout, dest: Layout) -> None:
    """Count element by element what each destination rank needs and its own first-replica shard does not hold."""
    stats = plan.statistics
    assert stats.lacked == stats.received
    lacks = {}
    for rank, shard in enumerate(dest.shards):
        own = np.zeros(SHAPE, bool)
        for block in source.shards[rank].blocks:
            own[to_slices(block.source)] = True
        lacks[rank] = sum(int((~own[to_slices(block.source)]).sum()) for block in shard.blocks)
    assert stats.received == {rank: count for rank, count in lacks.items() if count}
    assert sum(stats.sent.values()) == sum(stats.received.values())
    assert max(stats.sent.values(), default=0) >= stats.send_bound


def spec_32b() -> ModelSpec:
    return ModelSpec("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))


def test_each_rank_receives_exactly_what_it_lacks_and_the_senders_share_evenly() -> None:
    spec = replace(spec_32b(), num_layers=12)
    grid = RankGrid(tp=8, pp=4, dp=4)
    source, dest = megatron_layout(spec, tp=8, pp=4), embedded_layout(spec)
    plan = make_plan(source, grid.replicas(), dest, {0: list(range(grid.world_size))}, cached=False)
    stats = plan.statistics
    whole = dest.shards[0].num_elements()
    assert whole == spec.num_parameters()
    for rank in range(grid.world_size):
        assert stats.received[rank] + stats.local[rank] == whole
        assert stats.local[rank] == source.shards[grid.model_index(rank)].num_elements()
    assert max(stats.sent.values()) <= 1.01 * stats.send_bound


def test_equal_layouts_move_nothing_and_copy_whole_parameters() -> None:
    spec = small_spec("qwen2", heads=8, kv_heads=4)
    layout = megatron_layout(spec, tp=2, pp=2, vocab_divisor=8)
    plan = make_plan(layout, {i: [i] for i in range(4)}, layout, {i: i for i in range(4)})
    assert plan.statistics.sent == {}
    assert plan.statistics.pairs == plan.statistics.messages == plan.statistics.rectangles == 0
    assert plan.statistics.nothing_moves
    assert len(plan) == sum(len(shard.params) for shard in layout.shards)


def spec_7b() -> ModelSpec:
    return ModelSpec("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))


def to_engines(spec: ModelSpec, grid: RankGrid, engine_tp: int, divisor: int = 1, node: int | None = None) -> Plan:
    """The policy to engines of neighbouring ranks all over the world."""
    source = megatron_layout(spec, tp=grid.tp, pp=grid.pp, vocab_divisor=divisor, transformer_impl="transformer_engine")
    everyone = {index: list(range(index, grid.world_size, engine_tp)) for index in range(engine_tp)}
    dest = sglang_layout(spec, tp=engine_tp)
    return make_plan(source, grid.replicas(), dest, everyone, ranks_per_node=node, cached=False)


@pytest.mark.parametrize("spec", [spec_7b(), spec_32b()], ids=["7B", "32B"])
def test_nothing_moves_where_megatron_and_sglang_hold_the_same_bytes(spec: ModelSpec) -> None:
    tp = spec.num_kv_heads  # one query group a rank
    grid = RankGrid(tp=tp, pp=1, dp=2)
    plan = to_engines(spec, grid, tp)
    assert plan.statistics.nothing_moves
    assert "nothing moves" in plan.describe(2)
    assert (plan.zeros, plan.statistics.sent, plan.statistics.lacked) == ({}, {}, {})
    for rank in range(grid.world_size):
        aliases = plan.aliases(rank)
        assert len(aliases) == len(plan.dest_shards[rank].params) == len(plan.source_shards[rank].params)
        assert aliases["lm_head.weight"] == "output_layer.weight"
        assert aliases["model.layers.3.self_attn.qkv_proj.bias"] == "decoder.layers.3.self_attention.linear_qkv.bias"
    # another padding of the vocabulary moves its two tables, and those alone
    padded = to_engines(spec, grid, tp, divisor=1024 // tp)
    assert padded.source_shards[0].shapes["output_layer.weight"] == (152576 // tp, spec.hidden_size)
    assert not padded.statistics.nothing_moves
    assert set(padded.dest_shards[0].shapes) - set(padded.aliases(0)) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(("divisor", "shared"), [(1, False), (16, True), (32, True), (64, False)])
def test_vocabulary_padding_chosen_as_sglangs_lets_memory_be_shared(divisor: int, shared: bool) -> None:
    spec = small_spec("qwen2", heads=8, kv_heads=4, vocab=101)  # SGLang holds 128 rows
    plan = to_engines(spec, RankGrid(tp=4, pp=1, dp=1), 4, divisor)
    assert plan.statistics.nothing_moves is shared
    assert ("model.embed_tokens.weight" in plan.aliases(3)) is shared
    assert plan.aliases(3)["model.norm.weight"] == "decoder.final_layernorm.weight"


def test_a_parameter_is_shared_only_whole_and_in_place() -> None:
    spec = small_spec("qwen2", heads=8, kv_heads=4)
    plan = to_engines(spec, RankGrid(tp=2, pp=1, dp=1), 2)
    names = {name.rsplit("layers.0.")[-1] for name in plan.aliases(0) if ".layers.0." in name}
    assert names == {"input_layernorm.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
                     "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}  # fmt: skip
    assert plan.aliases(99) == {}
    moved = make_plan(megatron_layout(spec, tp=2, pp=1), {0: [0], 1: [1]}, sglang_layout(spec, tp=2), {0: 1, 1: 0})
    assert all("norm" in name for name in moved.aliases(0))


def test_the_same_elements_in_another_order_are_not_shared() -> None:
    halves = ((0, 2), (0, 5)), ((2, 4), (0, 5))
    straight = ShardLayout((("p", (4, 5)),), (("w", SHAPE),), tuple(Block("w", half, "p", half) for half in halves))
    swapped = [Block("w", half, "p", other) for half, other in zip(halves, reversed(halves), strict=True)]
    crossed = replace(straight, blocks=tuple(swapped))
    for dest, aliases in ((straight, {"p": "p"}), (crossed, {})):
        plan = make_plan(Layout("a", (straight,)), {0: [0]}, Layout("b", (dest,)), {0: 0})
        assert plan.aliases(0) == aliases
        assert plan.statistics.nothing_moves is bool(aliases)


@pytest.mark.parametrize(
    ("spec", "sizes", "engine_tp", "node"),
    [
        (spec_7b(), (4, 1, 8), 1, 8),
        (spec_7b(), (4, 1, 8), 2, 2),  # half a replica a node
        (spec_32b(), (8, 4, 4), 8, 8),  # a stage a node
        (spec_32b(), (8, 4, 4), 4, 16),
    ],
)
def test_across_nodes_goes_only_what_no_rank_of_the_node_holds(
    spec: ModelSpec, sizes: tuple[int, int, int], engine_tp: int, node: int
) -> None:
    spec = replace(spec, num_layers=8, vocab_size=1024)
    grid = RankGrid(*sizes)
    plan = to_engines(spec, grid, engine_tp, node=node)
    stats = plan.statistics
    crossing = 0
    for copy in plan.copies():
        if copy.src_rank // node != copy.dst_rank // node:
            crossing += rect_size(copy.dst_rect)
            mates = range(copy.dst_rank // node * node, copy.dst_rank // node * node + node)
            held = [
                block
                for shard in {id(plan.source_shards[mate]): plan.source_shards[mate] for mate in mates}.values()
                for block in shard.blocks
            ]
            wanted = _sources(plan.dest_shards[copy.dst_rank].blocks, copy.dst_param, copy.dst_rect)
            tensors = {tensor for tensor, _ in wanted}
            near = [(b.tensor, b.source) for b in held if b.tensor in tensors]
            assert all(intersect(rect, other) is None for name, rect in wanted for t, other in near if t == name)
    assert stats.cross_node == crossing
    assert (crossing == 0) is (grid.pp == 1 and node >= grid.tp)
    assert stats.ratio == 1.0
    # keeping to the node costs no balance
    assert max(stats.sent.values()) <= 1.01 * stats.send_bound + max(piece.size for piece in plan.pieces)


def _sources(blocks: tuple[Block, ...], param: str, rect: Rect) -> list[tuple[str, Rect]]:
    found = []
    for block in blocks:
        if block.param == param and (common := intersect(block.dest, rect)) is not None:
            found.append(
                (block.tensor, shift(common, (s[0] - d[0] for s, d in zip(block.source, block.dest, strict=True))))
            )
    return found


def test_nodes_change_the_sender_and_never_what_arrives() -> None:
    spec = small_spec("qwen3", layers=8)
    source, dest = megatron_layout(spec, tp=1, pp=1), embedded_layout(spec)
    plain, near = (
        make_plan(source, {0: [0, 4]}, dest, {0: [1, 2, 3, 5, 6, 7]}, ranks_per_node=node) for node in (None, 4)
    )
    assert plain.statistics.received == near.statistics.received
    assert plain.statistics.cross_node is None
    assert {(copy.src_rank, copy.dst_rank) for copy in near.copies()} == {(r // 4 * 4, r) for r in (1, 2, 3, 5, 6, 7)}
    assert any(copy.src_rank // 4 != copy.dst_rank // 4 for copy in plain.copies())
    assert near.statistics.cross_node == 0


def test_messages_are_runs_of_memory_contiguous_on_both_sides() -> None:
    spec = small_spec("qwen2", heads=8, kv_heads=2, vocab=37)
    plan = to_engines(spec, RankGrid(tp=4, pp=2, dp=1), 2, divisor=8)
    messages = largest = rectangles = 0
    for copy in plan.copies():
        if copy.src_rank == copy.dst_rank:
            continue
        rectangles += 1
        places = []
        for shards, rank, param, rect in (
            (plan.source_shards, copy.src_rank, copy.src_param, copy.src_rect),
            (plan.dest_shards, copy.dst_rank, copy.dst_param, copy.dst_rect),
        ):
            shape = shards[rank].shapes[param]
            places.append(np.arange(int(np.prod(shape))).reshape(shape)[to_slices(rect)].ravel())
        breaks = np.flatnonzero((np.diff(places[0]) != 1) | (np.diff(places[1]) != 1))
        runs = np.diff([-1, *breaks, len(places[0]) - 1])
        messages += len(runs)
        largest = max(largest, runs.max())
    stats = plan.statistics
    assert (stats.messages, stats.largest_message, stats.rectangles) == (messages, largest, rectangles)
    assert stats.pairs == len({(c.src_rank, c.dst_rank) for c in plan.copies() if c.src_rank != c.dst_rank})
    assert messages > rectangles > stats.pairs


def test_statistics_scale_to_bytes_and_fit_on_a_screen() -> None:
    plan = to_engines(spec_32b(), RankGrid(tp=8, pp=4, dp=4), 8, node=8)
    elements, sizes = plan.statistics, plan.statistics.in_bytes(2)
    assert sizes.received == {rank: 2 * count for rank, count in elements.received.items()}
    assert (sizes.cross_node, sizes.send_bound) == (2 * elements.cross_node, 2 * elements.send_bound)
    assert (sizes.messages, sizes.pairs, sizes.ratio) == (elements.messages, elements.pairs, 1.0)
    text = plan.describe(2)
    assert len(text.splitlines()) <= 10
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith("Megatron tp=8 pp=4 -> SGLang tp=8: 1.05 TB on 128 ranks\n")
    assert f"at most {max(sizes.received.values()) / 1e9:.3g} GB a rank; 1.00 of what the ranks lack" in text
    assert f"cross-node {sizes.cross_node / 1e9:.3g} GB" in text


def test_equal_tensor_parallel_sizes_need_only_the_same_rank_of_the_other_stages() -> None:
    spec = spec_32b()
    grid = RankGrid(tp=8, pp=2, dp=1)
    source, dest = megatron_layout(spec, tp=8, pp=2), megatron_layout(spec, tp=8, pp=1)
    plan = make_plan(source, grid.replicas(), dest, {j: [j, j + 8] for j in range(8)})
    pairs = {(copy.src_rank, copy.dst_rank) for copy in plan.copies()}
    assert pairs == {(src, dst) for src in range(16) for dst in (src, (src + 8) % 16)}


def test_data_parallel_replicas_share_the_sending() -> None:
    spec = small_spec("llama", layers=40)
    source, dest = megatron_layout(spec, tp=1, pp=1), embedded_layout(spec)
    plan = make_plan(source, {0: [0, 1, 2, 3]}, dest, {0: [4, 5, 6, 7, 8, 9]})
    stats = plan.statistics
    assert stats.send_bound == 6 * spec.num_parameters() // 4
    assert sorted(stats.sent) == [0, 1, 2, 3]
    assert stats.send_bound <= max(stats.sent.values()) <= 1.01 * stats.send_bound + max(p.size for p in plan.pieces)
    assert stats.pairs < 4 * 6


def test_plan_is_the_same_in_another_process_with_another_hash_seed() -> None:
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": f"{folder}:{folder.parent}"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.strip() == _fingerprint()


def test_plans_and_layouts_survive_pickling_and_are_cached_by_value() -> None:
    spec = small_spec()
    source, dest = megatron_layout(spec, tp=2, pp=2, vocab_divisor=8), embedded_layout(spec)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    plan = make_plan(source, RankGrid(2, 2, 1).replicas(), dest, {0: [0]})
    hits = _cached_plan.cache_info().hits
    assert make_plan(again, RankGrid(2, 2, 1).replicas(), dest, {0: 0}) is plan
    assert _cached_plan.cache_info().hits == hits + 1
    assert pickle.loads(pickle.dumps(plan)).fingerprint() == plan.fingerprint()


def test_source_that_lacks_a_tensor_is_a_user_error() -> None:
    spec = small_spec()
    with pytest.raises(UserError, match=r"Hugging Face holds no 'score\.weight'"):
        make_plan(hf_layout(spec), {0: [0]}, hf_layout(spec, reward_model=True), {0: 0})


def test_copies_of_a_rank_are_those_of_the_whole_plan_that_touch_it() -> None:
    spec = small_spec()
    plan = make_plan(
        megatron_layout(spec, tp=2, pp=2), RankGrid(2, 2, 1).replicas(), embedded_layout(spec), {0: [0, 3]}
    )
    everything = list(plan.copies())
    assert everything == sorted(everything, key=lambda copy: (copy.src_rank, copy.dst_rank))
    assert len(everything) == len(set(everything)) == len(plan)
    for rank in range(4):
        assert list(plan.copies(rank)) == [copy for copy in everything if rank in (copy.src_rank, copy.dst_rank)]
    assert all(rect_size(copy.src_rect) == rect_size(copy.dst_rect) > 0 for copy in everything)


def _fingerprint() -> str:
    spec = small_spec("qwen3", tied=True, heads=8, kv_heads=4)
    grid = RankGrid(tp=2, pp=2, dp=3)
    plan = make_plan(
        megatron_layout(spec, tp=2, pp=2, vpp=2, vocab_divisor=8), grid.replicas(),
        megatron_layout(spec, tp=4, pp=1), {j: [j, j + 4, j + 8] for j in range(4)},
    )  # fmt: skip
    return plan.fingerprint()


if __name__ == "__main__":
    print(_fingerprint())
