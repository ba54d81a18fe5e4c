"""Publishing the policy to engines on real ranks: planned once, verified every time, refused when a replica drifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import actor_cases
import pytest
import torch
from dist import run_ranks

from megatron_oreal.actor.actor import Actor
from megatron_oreal.layout import DigestError, embedded_layout
from megatron_oreal.platform import shutdown_distributed
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.telemetry import PhaseTimers


def publish_and_drift(path: Path, work_dir: Path) -> dict[bool, dict[str, Any]]:
    """With and without verification."""
    config = actor_cases.make_config(path, work_dir, {})
    platform, grid, actor = actor_cases.start(config)
    results = {True: publish_three_versions(actor)}
    config.rollout.verify_weights = False
    actor = Actor(config, actor.spec, grid, platform)
    actor.load_hf()
    results[False] = publish_three_versions(actor)
    shutdown_distributed()
    return results


def publish_three_versions(actor: Actor) -> dict[str, Any]:
    """Two versions; then rank 1's data-parallel replica of one weight changes by itself, and a third is published."""
    engine = EmbeddedEngine(actor.spec, dtype=torch.float32, max_running_requests=4, max_length=128)
    layout, timers = embedded_layout(actor.spec), PhaseTimers()
    digests, publishers = [], set()
    for version in range(2):
        with timers("publish"):
            report = actor.publish(layout, engine.weight_buffers(), version, timers)
        engine.load_weights(version)
        publishers.add(id(actor._publisher))
        times = timers.collect()
        digests.append(None if report.digest is None else (report.digest.version, report.digest.digest))
        actor.update(actor_cases.make_sequences(10), version)
    actor.release_publisher()
    if actor.platform.rank == 1:
        actor.policy.parameters()["decoder.layers.2.mlp.linear_fc2.weight"][5, 7] += 1e-3
    said = None
    try:
        actor.publish(layout, engine.weight_buffers(), 2)
        engine.load_weights(2)
    except DigestError as error:
        said = str(error)
    return {
        "said": said,
        "version": engine.health().version,
        "digests": digests,
        "phases": set(times),
        "publishers": len(publishers),
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[dict[bool, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("publish")
    path = actor_cases.make_model("qwen2-tied", folder)
    return run_ranks("test_actor_publish:publish_and_drift", 2, {"path": path, "work_dir": folder})


@pytest.mark.parametrize("verify", [True, False])
def test_a_drifted_replica_is_refused_on_every_rank_unless_verification_is_off(
    published: list[dict[bool, dict[str, Any]]], verify: bool
) -> None:
    ranks = [each[verify] for each in published]
    for rank in ranks:
        assert rank["digests"] == ranks[0]["digests"], "ranks saw different weights"
        assert rank["publishers"] == 1, "planned more than once"
        assert {"time/publish", "time/publish/plan", "time/publish/transfer"} <= rank["phases"]
        assert ("time/publish/digest" in rank["phases"]) == verify
        if not verify:
            assert (rank["said"], rank["version"], rank["digests"]) == (None, 2, [None, None])
            continue
        assert "version 2 differ between data-parallel replicas" in rank["said"]
        assert "'model.layers.2.mlp.down_proj.weight' [0:64, 0:96] on rank 0 is not that on rank 1" in rank["said"]
        assert rank["version"] == 1, "an engine took weights that were found wrong"
        (first, before), (second, after) = rank["digests"]
        assert (first, second) == (0, 1)
        assert before != after
