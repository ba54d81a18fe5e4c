"""Weights group by group through two buckets: how they are cut, when a bucket is written again, what SGLang is told."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_contract as contract
import pytest
import torch
from upstream_server import UpstreamServer

from megatron_oreal.layout import (
    ModelSpec,
    RankGrid,
    RopeSpec,
    SafetensorsSource,
    load_from_hf,
    load_model_spec,
    make_plan,
    megatron_layout,
    sglang_layout,
)
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang import loader
from megatron_oreal.rollout.sglang.client import UnreachableError
from megatron_oreal.rollout.sglang.digests import shard_digester
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher
from megatron_oreal.rollout.sglang.group import SoloGroup
from megatron_oreal.rollout.sglang.handover import Buckets, Handover
from megatron_oreal.rollout.sglang.keeper import Loaded, ServerKeeper
from megatron_oreal.rollout.sglang.settings import ServerSettings
from megatron_oreal.rollout.sglang.staging import HostSegment, ShardStaging, padded_bytes, weight_groups
from megatron_oreal.rollout.sglang.weights import WeightSync

QWEN_7B = ModelSpec(
    family="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=152064,
    max_position_embeddings=32768,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rope=RopeSpec(1e6),
)


def sizes_of(layout: Any, groups: list[frozenset[str]]) -> list[int]:
    shapes = layout.shards[0].shapes
    return [sum(padded_bytes(shapes[name], torch.bfloat16) for name in group) for group in groups]


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("limit", [2**29, 2**28, 2**40, 1])
def test_groups_are_a_partition_within_the_limit_or_the_largest_parameter(tp: int, limit: int):
    layout = sglang_layout(QWEN_7B, tp=tp)
    shapes = layout.shards[0].shapes
    groups = weight_groups(layout, torch.bfloat16, limit)
    assert sorted(name for group in groups for name in group) == sorted(shapes)
    largest = max(math.prod(shape) * 2 for shape in shapes.values())
    sizes = sizes_of(layout, groups)
    assert max(sizes) <= max(limit, largest)
    total = sum(sizes)
    assert len(groups) <= 1 + 1.35 * total / max(limit, largest), "buckets must be filled"
    assert groups == weight_groups(layout, torch.bfloat16, limit)


def test_every_group_has_layers_of_every_pipeline_stage_so_that_all_ranks_send_at_once():
    layout = sglang_layout(QWEN_7B, tp=4)
    groups = weight_groups(layout, torch.bfloat16, 2**29)
    assert len(groups) > 4
    for group in groups:
        layers = {int(name.split(".")[2]) for name in group if ".layers." in name}
        assert {layer // 7 for layer in layers} == {0, 1, 2, 3}


def test_the_parts_of_a_plan_are_the_whole_plan():
    source, dest = megatron_layout(QWEN_7B, tp=2, pp=2, vocab_divisor=64), sglang_layout(QWEN_7B, tp=4)
    ranks = RankGrid(2, 2, 1).replicas()
    plan = make_plan(source, ranks, dest, {index: index for index in range(4)})
    groups = weight_groups(dest, torch.bfloat16, 2**28)
    parts = [plan.only(group) for group in groups]
    assert set().union(*(set(part.copies()) for part in parts)) == set(plan.copies())
    assert sum(len(part) for part in parts) == len(plan)
    for part, group in zip(parts, groups, strict=True):
        assert {copy.dst_param for copy in part.copies()} == group
    senders = [len(set(part.src_rank.tolist())) for part, group in zip(parts, groups, strict=True) if len(group) > 1]
    assert len(senders) > 4 and min(senders) == 4, "every rank sends in every group of layers"
    zeros = [each for part in parts for rects in part.zeros.values() for each in rects]
    assert sorted(zeros) == sorted(each for rects in plan.zeros.values() for each in rects)


def test_digests_of_parts_add_up_to_those_of_the_whole(tmp_path: Path):
    spec = load_model_spec(contract.save_random_model(tmp_path, "qwen2_tied"))
    layout = sglang_layout(spec, tp=2, device="cpu")
    digester = shard_digester(spec, 2, "cpu", torch.float32)
    shapes = layout.shards[1].shapes
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    groups = weight_groups(layout, torch.float32, 8192)
    assert len(groups) > 2
    parts = [{name: tensors[name] for name in group} for group in groups]
    source = sum(digester.hash_source(1, part, partial=True) for part in parts)
    dest = sum(digester.hash_dest(3, part, partial=True) for part in parts)
    assert bool((source == digester.hash_source(1, tensors)).all())
    assert bool((dest == digester.hash_dest(3, tensors)).all())
    assert int(dest[0]) > 0, "the padding of random tensors is not zero"


class Sender:
    """A trainer rank of its own with a server of one worker, buckets of 8 KiB, and what ``SglangEngine`` does."""

    def __init__(self, folder: Path, *, has_sessions: bool):
        self.model_dir = contract.save_random_model(folder, "qwen2_tied")
        spec = load_model_spec(self.model_dir)
        layout = sglang_layout(spec, tp=1, device="cpu")
        (shard,) = layout.shards
        self.groups = weight_groups(layout, torch.float32, 8192)
        self.buckets = Buckets(shard, self.groups, torch.float32, torch.device("cpu"))
        self.server = UpstreamServer(shard.shapes, has_sessions=has_sessions)
        self.dispatcher = Dispatcher()
        self.digester = shard_digester(spec, 1, "cpu", torch.float32)
        client = self.dispatcher.client(self.server.url)
        self.sync = WeightSync(client, str(self.model_dir), tp=1, digester=self.digester, timeout_s=120)
        nbytes = sum(padded_bytes(shape, torch.float32) for shape in shard.shapes.values())
        self.shelf = ShardStaging(shard.shapes, torch.float32, HostSegment.create(nbytes, "kept"))
        self.kept = self.shelf.tensors
        self.weights = {name: torch.zeros(shape) for name, shape in shard.shapes.items()}
        with SafetensorsSource(self.model_dir) as source:
            load_from_hf(source, shard, self.weights)

    def begin(self, version: int) -> Handover:
        def feed(parts: Any) -> Any:
            return self.dispatcher.submit(self.sync.feed(parts, version, awake=True))

        return Handover(
            version,
            self.groups,
            self.buckets,
            SoloGroup(),
            0,
            self.digester,
            dtype=torch.float32,
            keep=self.kept,
            feed=feed,
            post=self.dispatcher.run,
        )

    def send(self, handover: Handover) -> None:
        for number, group in enumerate(self.groups):
            buffers = handover.open(number)
            assert buffers.keys() == group
            for name in group:
                buffers[name].copy_(self.weights[name])
            handover.hand_over(number)

    def finish(self, handover: Handover) -> None:
        digests = handover.result()
        accepted = self.sync.accept(digests, [handover.hashes()], handover.version, awake=True)
        self.dispatcher.run(accepted)

    def close(self) -> None:
        self.buckets.close()
        self.shelf.close()
        self.sync.close()
        self.dispatcher.close()
        self.server.close()


@pytest.fixture(params=[False, True], ids=["as 0.5.17", "as 0.5.21"])
def sender(request, tmp_path: Path, monkeypatch) -> Iterator[Sender]:
    monkeypatch.setattr(loader, "_settle", lambda: None)  # it is for the server's process, this is the tests'
    monkeypatch.setattr(loader, "_opened", {})
    sender = Sender(tmp_path, has_sessions=request.param)
    yield sender
    sender.close()


def test_a_version_arrives_bucket_after_bucket_and_is_visible_at_the_end(sender: Sender):
    assert len(sender.groups) >= 4
    assert sender.buckets.nbytes == 0
    for version in range(2):
        for weight in sender.weights.values():
            weight *= 1 + version  # padding stays zero
        handover = sender.begin(version)
        sender.send(handover)
        handover.result()
        assert sender.server.version == "none"
        sender.finish(handover)
        assert sender.server.version == sender.sync.label(version)
        for name, weight in sender.weights.items():
            assert torch.equal(sender.server.model.held[name].data, weight)
            assert torch.equal(sender.kept[name], weight)
    whole = sum(weight.nbytes for weight in sender.weights.values())
    assert sender.buckets.nbytes < 0.6 * whole


def test_a_worker_keeps_nothing_of_what_its_digests_worked_in(sender: Sender):
    sender.kept["model.norm.weight"].fill_(3.0)
    hashes = sender.digester.hash_source(0, sender.kept)
    assert sender.digester._hasher.scratch
    sender.digester.release()  # the worker is a thread of this process, and has the same one
    sender.dispatcher.run(sender.sync.load([sender.shelf.describe()], [hashes], 0, awake=True))
    assert not sender.digester._hasher.scratch


def test_the_calls_are_those_of_sglangs_handlers_in_their_order(sender: Sender):
    handover = sender.begin(0)
    sender.send(handover)
    sender.finish(handover)
    update = ["/update_weights_from_tensor"] * len(sender.groups)
    if sender.server.has_sessions:
        update = ["/begin_weight_update", *update, "/end_weight_update"]
    before = ["/pause_generation", "/flush_cache", "/update_weight_version"]
    after = ["/flush_cache", "/update_weight_version", "/continue_generation"]
    assert sender.server.calls == before + update + after
    sender.server.calls.clear()
    sender.dispatcher.run(sender.sync.forget_staging())
    one = ["/update_weights_from_tensor"]
    expected = ["/begin_weight_update", *one, "/end_weight_update"] if sender.server.has_sessions else one
    assert sender.server.calls == expected


def test_a_bucket_is_written_again_only_after_the_workers_have_copied_it(sender: Sender, monkeypatch):
    sender.server.slow_s = 0.1
    handover = sender.begin(0)
    sender.send(handover)
    sender.finish(handover)
    sender.server.may_copy.clear()
    with monkeypatch.context() as patch:  # without the fence
        patch.setattr(concurrent.futures, "wait", lambda *_, **__: None)
        handover = sender.begin(1)
        sender.send(handover)
    sender.server.may_copy.set()
    with pytest.raises(EngineError, match="weights of version 1 did not arrive"):
        sender.finish(handover)
    assert sender.server.version == "none"


def test_a_server_that_fails_in_the_middle_holds_nothing_up_and_the_whole_shard_is_kept(sender: Sender):
    sender.server.breaks_at = 2
    handover = sender.begin(0)
    sender.send(handover)
    with pytest.raises(UnreachableError):
        handover.result()
    assert sender.server.version == "none"
    for name, weight in sender.weights.items():
        assert torch.equal(sender.kept[name], weight)


class Process:
    """Stands in for ``ServerProcess``: the server is always there; a start leaves nothing of what was begun."""

    name, pid, was_started = "server", 1, True

    def __init__(self, server: UpstreamServer) -> None:
        self.starts, self._server = 0, server

    def start(self) -> None:
        self.starts += 1
        self._server.restart()

    def wait_ready(self, deadline_s: float) -> None:
        """It is."""

    def stop(self) -> None:
        """It stays."""

    def close(self) -> None:
        """It stays."""

    def log_tail(self) -> str:
        return "its log"


@pytest.mark.parametrize("keep", [True, False])
def test_a_server_that_fails_in_the_middle_gets_the_kept_shard_or_the_run_ends(sender: Sender, keep: bool):
    process = Process(sender.server)
    settings = ServerSettings(keep_weights=keep)
    keeper = ServerKeeper(process, sender.sync, sender.dispatcher, settings, saves_memory=False)  # type: ignore[arg-type]
    sender.server.breaks_at = 2
    handover = sender.begin(0)
    sender.send(handover)
    loaded = Loaded(0, [sender.shelf.describe() if keep else None], [handover.hashes()])
    if keep:
        keeper.load(loaded, handover, awake=True)
        assert process.starts == keeper.num_restarts == 1
        assert sender.server.version == sender.sync.label(0)
        for name, weight in sender.weights.items():
            assert torch.equal(sender.server.model.held[name].data, weight)
    else:
        with pytest.raises(EngineError, match=r"rollout\.server\.keep_weights=false keeps none .* its log"):
            keeper.load(loaded, handover, awake=True)
        assert sender.server.version == "none"
    keeper.close(stop_server=False)


def test_a_parameter_that_never_comes_is_named(sender: Sender):
    name = "model.layers.1.mlp.down_proj.weight"
    handover = sender.begin(0)
    number = next(i for i, group in enumerate(sender.groups) if name in group)
    offset = sender.buckets.staged[number].offsets.pop(name)
    sender.send(handover)
    with pytest.raises(EngineError, match=f"parameters \\['{name}'\\] get no weights"):
        handover.result()
    sender.buckets.staged[number].offsets[name] = offset


def test_an_abandoned_version_leaves_no_session_open(sender: Sender):
    handover = sender.begin(0)
    handover.open(0)
    handover.hand_over(0)
    handover.abandon()
    assert sender.server.version == "none"
    handover = sender.begin(1)
    sender.send(handover)
    sender.finish(handover)
    assert sender.server.version == sender.sync.label(1)
