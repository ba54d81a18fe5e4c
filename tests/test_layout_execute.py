"""Plans carried out on real gloo ranks, against gathering everything, and the digests of what arrived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from safetensors import safe_open
from test_layout_checkpoint import assert_equal, expected, garbage, random_weights, write_checkpoint
from test_layout_megatron import small_spec
from torch import Tensor

from megatron_oreal.layout import (
    Digester,
    DigestError,
    Layout,
    ModelSpec,
    RankGrid,
    Resharder,
    SafetensorsSource,
    embedded_layout,
    execute_plan,
    hf_layout,
    load_from_hf,
    make_plan,
    megatron_layout,
)
from megatron_oreal.layout.blocks import Rect, rect_size
from megatron_oreal.layout.gather import Gatherer
from megatron_oreal.layout.schedule import Message, make_schedule, split_rect

TP2_PP2 = {"tp": 2, "pp": 2, "vocab_divisor": 16}
LARGE, SMALL = 2**20, 600


def in_turn(module: str, cases: list[tuple[str, dict]]) -> list:
    """Run several functions of a module on the same ranks: starting processes takes longer than the tests."""
    import importlib

    dist.init_process_group("gloo")
    results = [getattr(importlib.import_module(module), function)(**kwargs) for function, kwargs in cases]
    dist.destroy_process_group()
    return results


def launch(module: str, world_size: int, cases: dict[Any, tuple[str, dict]]) -> dict[Any, list]:
    """Case name to the results of all ranks."""
    kwargs = {"module": module.rsplit(".")[-1], "cases": list(cases.values())}
    results = run_ranks("test_layout_execute:in_turn", world_size, kwargs)
    return {name: [each[number] for each in results] for number, name in enumerate(cases)}


def loaded(spec: ModelSpec, model_dir: str, layout: Layout, grid: RankGrid) -> tuple[int, dict[str, Tensor]]:
    rank = dist.get_rank()
    shard = layout.shards[grid.model_index(rank)]
    live = garbage(shard)
    with SafetensorsSource(model_dir) as source:
        load_from_hf(source, shard, live)
    return rank, live


def reshard_worker(model_dir: str, spec: ModelSpec, sizes: dict, dp: int) -> list:
    """Two successive versions for each kind of buckets: both must arrive, and nothing of the first may linger."""
    layout, grid = megatron_layout(spec, **sizes), RankGrid(sizes["tp"], sizes["pp"], dp)
    rank, live = loaded(spec, model_dir, layout, grid)
    engine = embedded_layout(spec)
    places = grid.replicas(), engine, {0: range(grid.world_size)}
    plan = make_plan(layout, *places)
    digester = Digester(layout, *places, wire_dtype=torch.bfloat16)
    gatherer = Gatherer(layout, grid.replicas(), engine, 0, rank, dtype=torch.bfloat16, bucket_bytes=1000)
    held, oracle = garbage(engine.shards[0]), garbage(engine.shards[0])
    digests, stats = [], plan.statistics.in_bytes(2)
    # a message for each part; parts that share messages; buckets smaller than a tensor
    for own_message_bytes, bucket_bytes in ((1, LARGE), (LARGE, LARGE), (LARGE, SMALL)):
        options = {"bucket_bytes": bucket_bytes, "own_message_bytes": own_message_bytes}
        with Resharder(plan, rank, wire_dtype=torch.bfloat16, **options) as resharder:
            for version in range(2):
                with torch.no_grad():
                    for tensor in live.values():
                        tensor.mul_(-1)
                traffic = resharder.run(live, held)
                gatherer.run(live, oracle)
                assert_equal(held, {name: value.detach() for name, value in oracle.items()})
                digests.append(digester.check(rank, version, live, held).digest)
                sizes_of = stats.sent, stats.received, stats.local
                assert (traffic.sent, traffic.received, traffic.local) == tuple(each.get(rank, 0) for each in sizes_of)
                assert 0 < resharder.bucket_bytes_held <= 4 * bucket_bytes or not traffic.staged
                if version == 0:
                    buckets = {name: bucket.data_ptr() for name, bucket in resharder._buckets.items()}
                assert {name: bucket.data_ptr() for name, bucket in resharder._buckets.items()} == buckets
            if own_message_bytes == 1:
                # Megatron's rows stand in runs in the engine too; only what is cut by columns must be packed
                assert traffic.staged < 0.5 * (traffic.sent + traffic.received)
        assert resharder.bucket_bytes_held == 0
    return [plan.fingerprint(), digests, {name: tensor.detach() for name, tensor in held.items()}]


def between_layouts_worker(model_dir: str, spec: ModelSpec) -> None:
    grid = RankGrid(2, 2, 1)
    layout = megatron_layout(spec, **TP2_PP2)
    rank, live = loaded(spec, model_dir, layout, grid)
    target = megatron_layout(spec, tp=4, pp=1, transformer_impl="transformer_engine", vocab_divisor=4)
    plan = make_plan(layout, grid.replicas(), target, {i: 3 - i for i in range(4)})
    held = garbage(target.shards[3 - rank], torch.float32)
    execute_plan(plan, live, held, rank, wire_dtype=torch.bfloat16, bucket_bytes=512)
    gatherer = Gatherer(layout, grid.replicas(), target, 3 - rank, rank, dtype=torch.bfloat16)
    want = garbage(target.shards[3 - rank])
    gatherer.run(live, want)
    assert_equal(held, {name: value.float() for name, value in want.items()})
    with pytest.raises(ValueError, match="several dtypes"):
        execute_plan(plan, live, held, rank)


def fault_worker(model_dir: str, spec: ModelSpec) -> list[list[str]]:
    """What every rank hears of an engine that was spoiled, then of a replica that drifted, then of a wrong version."""
    grid = RankGrid(2, 1, 2)
    layout, engine = megatron_layout(spec, tp=2, pp=1), embedded_layout(spec)
    rank, live = loaded(spec, model_dir, layout, grid)
    places = grid.replicas(), engine, {0: range(4)}
    digester = Digester(layout, *places, wire_dtype=torch.bfloat16)
    held = garbage(engine.shards[0])
    execute_plan(make_plan(layout, *places), live, held, rank)
    said = []
    spoiled = held["model.layers.1.mlp.gate_up_proj.weight"], live["decoder.layers.0.mlp.linear_fc2.weight"]
    for where, spoil, version in ((2, spoiled[0], 5), (3, spoiled[1], 5), (0, None, 6)):
        with torch.no_grad():
            before = None if spoil is None else spoil[3, 3].clone()
            if rank == where and spoil is not None:
                spoil[3, 3] *= 2
            with pytest.raises(DigestError) as caught:
                digester.check(rank, version + (spoil is None and rank == 1), live, held)
            said.append(str(caught.value))
            if spoil is not None:
                spoil[3, 3] = before
    digester.check(rank, 7, live, held)
    return said


RESHARDS: dict[str, tuple[int, str, bool, dict, int]] = {
    "qwen2 tied TP2 PP2": (4, "qwen2", True, TP2_PP2, 1),
    "qwen3 TP2 PP2 VPP2": (4, "qwen3", False, TP2_PP2 | {"vpp": 2}, 1),
    "llama TP2 DP2": (4, "llama", False, {"tp": 2, "pp": 1}, 2),
    "qwen2 PP2": (2, "qwen2", False, {"tp": 1, "pp": 2}, 1),
}


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSpec, dict[str, Tensor], list]]:
    results = {}
    for world in (2, 4):
        cases, inputs = {}, {}
        for name, (ranks, family, tied, sizes, dp) in RESHARDS.items():
            if ranks == world:
                spec = small_spec(family, tied=tied)
                folder = tmp_path_factory.mktemp("model")
                inputs[name] = spec, random_weights(spec)
                write_checkpoint(folder, spec, inputs[name][1])
                model = {"model_dir": str(folder), "spec": spec}
                cases[name] = "reshard_worker", model | {"sizes": sizes, "dp": dp}
                if sizes == TP2_PP2:
                    cases["between layouts"] = "between_layouts_worker", model
                if dp == 2:
                    cases["faults"] = "fault_worker", model
        done = launch(__name__, world, cases)
        results |= {name: (*inputs.get(name, ()), done[name]) for name in cases}
    return results


@pytest.mark.parametrize("case", list(RESHARDS))
def test_megatron_ranks_fill_an_engine_on_every_rank_with_the_checkpoint(case: str, resharded: dict) -> None:
    """The ranks also check: against gathering everything, six successive updates, traffic against the plan."""
    spec, weights, ranks = resharded[case]
    want = expected(embedded_layout(spec).shards[0], weights)
    assert len(ranks) == RESHARDS[case][0]
    for fingerprint, digests, held in ranks:
        assert (fingerprint, digests) == (ranks[0][0], ranks[0][1])
        assert digests[0::2] == [digests[0]] * 3 and digests[1::2] == [digests[1]] * 3 and digests[0] != digests[1]
        assert_equal(held, want)


def test_every_rank_hears_which_tensor_rank_and_version_is_wrong(resharded: dict) -> None:
    (ranks,) = resharded["faults"]
    assert len(ranks) == 4
    assert all(said == ranks[0] for said in ranks)
    engine, replica, version = ranks[0]
    assert "version 5 did not arrive" in engine
    assert "'model.layers.1.mlp.gate_proj.weight' [0:12, 0:12] on rank 2 " in engine
    assert "version 5 differ between data-parallel replicas" in replica
    assert "'model.layers.0.mlp.down_proj.weight'" in replica and "on rank 1 is not that on rank 3" in replica
    assert version == "rank 1 publishes version 7, rank 0 version 6"


def test_one_process_without_a_group_copies_locally() -> None:
    spec = small_spec("qwen2")
    weights = random_weights(spec)
    source, engine = megatron_layout(spec, tp=1, pp=1, vocab_divisor=8), embedded_layout(spec)
    held = garbage(engine.shards[0])
    traffic = execute_plan(
        make_plan(source, {0: [0]}, engine, {0: 0}), expected(source.shards[0], weights), held, 0
    )  # fmt: skip
    assert_equal(held, expected(engine.shards[0], weights))
    assert (traffic.sent, traffic.received, traffic.local) == (0, 0, 2 * spec.num_parameters())


def test_parameters_that_both_sides_share_are_left_in_place() -> None:
    """Norms and embedding are one tensor on both sides; all others are two, and are copied."""
    spec = small_spec("qwen2")
    weights = random_weights(spec)
    source, engine = megatron_layout(spec, tp=1, pp=1), embedded_layout(spec)
    live, held = expected(source.shards[0], weights), garbage(engine.shards[0])
    held["model.norm.weight"] = live["decoder.final_layernorm.weight"]
    held["model.embed_tokens.weight"] = live["embedding.word_embeddings.weight"]
    plan = make_plan(source, {0: [0]}, engine, {0: 0})
    traffic = execute_plan(plan, live, held, 0)
    assert traffic.shared == 2 * (spec.hidden_size + spec.vocab_size * spec.hidden_size)
    assert traffic.local + traffic.shared == 2 * spec.num_parameters()
    assert_equal(held, expected(engine.shards[0], weights))


def test_shared_parameters_wider_than_the_wire_are_rounded_as_if_they_had_travelled() -> None:
    layout = hf_layout(small_spec("llama"))
    live = {name: torch.rand(shape) for name, shape in layout.shards[0].params}
    want = {name: value.bfloat16().float() for name, value in live.items()}
    traffic = execute_plan(make_plan(layout, {0: [0]}, layout, {0: 0}), live, live, 0, wire_dtype=torch.bfloat16)
    assert traffic.shared == 0
    assert_equal(live, want)


def test_tensors_that_do_not_fit_the_plan_are_refused_before_anything_is_written() -> None:
    spec = small_spec("qwen2")
    source, engine = megatron_layout(spec, tp=1, pp=1), embedded_layout(spec)
    plan = make_plan(source, {0: [0]}, engine, {0: 0})
    held, live = garbage(engine.shards[0]), garbage(source.shards[0])
    live["decoder.final_layernorm.weight"] = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'decoder\.final_layernorm\.weight' has shape \(1,\)"):
        execute_plan(plan, live, held, 0)
    del held["model.norm.weight"]
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of the plan is not among the tensors"):
        execute_plan(plan, garbage(source.shards[0]), held, 0)
    assert all(value.isnan().all() for value in held.values())


@pytest.mark.parametrize("own_message", [1, 40, 10**6])
def test_messages_stay_within_the_bucket_and_both_ends_cut_alike(own_message: int) -> None:
    spec = small_spec("qwen2")
    grid = RankGrid(2, 2, 2)
    plan = make_plan(megatron_layout(spec, **TP2_PP2), grid.replicas(), embedded_layout(spec), {0: range(8)})
    bucket = 200

    def sizes(message: Message) -> list[int]:
        return [rect_size(part.rect) for part in message]

    schedules = [make_schedule(plan, rank, bucket, own_message) for rank in range(8)]
    for rank, schedule in enumerate(schedules):
        for number, current in enumerate(schedule.rounds):
            for messages in (current.sends, current.recvs):
                assert sum(sum(sizes(message)) for queue in messages.values() for message in queue) <= bucket
                for queue in messages.values():
                    assert all(len(message) == 1 or max(sizes(message)) < own_message for message in queue)
                    assert sum(max(sizes(message)) < own_message for message in queue) <= 1
            for peer, queue in current.sends.items():
                assert list(map(sizes, queue)) == list(map(sizes, schedules[peer].rounds[number].recvs[rank]))


@pytest.mark.parametrize("limit", [1, 3, 5, 6, 12, 1000])
def test_split_rect_covers_everything_once_in_order(limit: int) -> None:
    tensor = torch.arange(6 * 5).view(6, 5)
    parts = list(split_rect((6, 5), limit))
    assert all(rect_size(part) <= limit for part in parts)
    got = torch.cat([tensor[tuple(slice(*span) for span in part)].reshape(-1) for part in parts])
    assert torch.equal(got, tensor.reshape(-1))


class _Recorder(SafetensorsSource):
    """A source that remembers what was read from it."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(model_dir)
        self.read_order: list[str] = []

    def read(self, name: str, rect: Rect) -> Tensor:
        self.read_order.append(name)
        return super().read(name, rect)


def test_a_rank_reads_a_file_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    spec = small_spec("qwen2", layers=12)
    write_checkpoint(tmp_path, spec, random_weights(spec))
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        stored = {name: place for place, name in enumerate(opened.offset_keys())}
    for shard in megatron_layout(spec, tp=2, pp=1).shards:
        with _Recorder(tmp_path) as source:
            load_from_hf(source, shard, garbage(shard))
        places = [stored[name] for name in source.read_order]
        assert places == sorted(places)
        assert len(set(places)) == len(stored)
