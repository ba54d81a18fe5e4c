"""Plans: complete, minimal, balanced, and the same on every rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
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
)
from megatron_oreal.layout.blocks import rect_size, to_slices
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
    spec = spec_32b()
    grid = RankGrid(tp=8, pp=4, dp=4)
    source, dest = megatron_layout(spec, tp=8, pp=4), embedded_layout(spec)
    begin = time.process_time()
    plan = make_plan(source, grid.replicas(), dest, {0: list(range(grid.world_size))}, cached=False)
    seconds = time.process_time() - begin
    stats = plan.statistics
    whole = dest.shards[0].num_elements()
    assert whole == spec.num_parameters()
    for rank in range(grid.world_size):
        assert stats.received[rank] + stats.local[rank] == whole
        assert stats.local[rank] == source.shards[grid.model_index(rank)].num_elements()
    assert max(stats.sent.values()) <= 1.01 * stats.send_bound
    assert seconds < 30, f"a 32B model over 128 ranks took {seconds:.1f} s of CPU time to plan"


def test_equal_layouts_move_nothing_and_copy_whole_parameters() -> None:
    spec = small_spec("qwen2", heads=8, kv_heads=4)
    layout = megatron_layout(spec, tp=2, pp=2, vocab_divisor=8)
    plan = make_plan(layout, {i: [i] for i in range(4)}, layout, {i: i for i in range(4)})
    assert plan.statistics.sent == {}
    assert plan.statistics.messages == 0
    assert len(plan) == sum(len(shard.params) for shard in layout.shards)


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
    assert stats.messages < 4 * 6


def test_plan_is_the_same_in_another_process_with_another_hash_seed() -> None:
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": f"{folder}:{folder.parent}"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120, check=True)
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
