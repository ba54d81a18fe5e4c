"""From a config and this rank's place to its engine: who shares a server, on which devices, with which deadlines."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec
from megatron_oreal.platform import Platform
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.rollout.sglang.group import EngineGroup, RankGroup, SoloGroup
from megatron_oreal.rollout.sglang.settings import settings_from


def engine_ranks(world_size: int, ranks_per_node: int, tp: int) -> list[list[int]]:
    """Return the global ranks of every engine in order: ``tp`` neighbours on one node.

    Their position in the list of an engine is the tensor-parallel rank whose shard they stage. Raises ``UserError``
    where a server would have to span nodes.
    """
    if ranks_per_node % tp or world_size % tp:
        raise UserError(
            f"rollout.engine_tp={tp} does not divide the {ranks_per_node} ranks a node ({world_size} in all): choose a "
            "divisor"
        )
    return [list(range(first, first + tp)) for first in range(0, world_size, tp)]


def shard_ranks(engines: list[list[int]]) -> dict[int, list[int]]:
    """Return the ranks that stage each shard, by tensor-parallel rank: the destination of a reshard plan."""
    return {index: [ranks[index] for ranks in engines] for index in range(len(engines[0]))}


def host_timeout_s(config: Config) -> float:
    """How long ranks may wait for each other on the host: longer than all that one of them may wait for a server."""
    server = config.rollout.server
    starts = (1 + server.max_restarts) * server.start_timeout_s + 4 * server.control_timeout_s
    return max(config.parallel.distributed_timeout_s, server.step_deadline_s + 300.0, starts)


def open_sglang_engine(config: Config, spec: ModelSpec, platform: Platform, dtype: torch.dtype) -> SglangEngine:
    """Make this rank's engine; a collective of all ranks. Call ``start`` early and ``wait_ready`` late: it takes long.

    The server's log and arguments are in ``work_dir/sglang``.
    """
    tp = config.rollout.engine_tp
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", platform.world_size))
    engines = engine_ranks(platform.world_size, per_node, tp)
    group: EngineGroup = SoloGroup()
    for ranks in engines if tp > 1 else []:  # every rank takes part in making every group
        timeout = datetime.timedelta(seconds=host_timeout_s(config))
        members = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if platform.rank in ranks:
            group = RankGroup(members)
    number = platform.rank // tp
    return SglangEngine(
        spec,
        model_path=config.model.path,
        folder=config.work_path / "sglang",
        dtype=dtype,
        device=platform.device,
        tp=tp,
        group=group,
        devices=_devices(platform, number * tp % per_node, tp),
        max_running_requests=config.rollout.max_running_requests,
        max_length=config.rollout.gen_max_length,
        server_args=config.rollout.sglang,
        settings=settings_from(config.rollout.server),
        name=f"engine{number:03d}",
    )


def _devices(platform: Platform, first_local_rank: int, tp: int) -> list[str]:
    """The group's devices, in the names by which this process sees them."""
    if not platform.is_cuda:
        return []
    visible: Any = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names[first_local_rank : first_local_rank + tp]
