"""What a reshard moves, from the plan that the ranks themselves will make, and how long its busiest link takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_oreal.layout import (
    Layout,
    embedded_layout,
    make_plan,
    megatron_layout,
    pipeline_layer_split,
    sglang_layout,
)
from megatron_oreal.layout.plan import Plan
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.devices import Device
from megatron_oreal.planner.engine import num_parameters
from megatron_oreal.planner.placement import ITEMSIZE, Placement
from megatron_oreal.planner.types import Setting
from megatron_oreal.rollout.sglang.build import shard_ranks


@dataclass(frozen=True)
class ReshardTraffic:
    """Bytes of one publish over the wire. ``*_max``: of the rank with most; ``in_place``: engine parameters of a rank
    that are the trainer's own bytes; ``engine``: what one engine rank holds.

    ``busiest_*``: bytes of the busiest sender or receiver inside a node and through its network adapter; ``busiest``
    says which of the two takes longer. ``seconds``: that link's bytes over its assumed bandwidth.
    """

    nothing_moves: bool
    engine: int
    received_max: int
    received_total: int
    sent_max: int
    in_place_max: int
    cross_node: int
    pairs: int
    busiest_local: int
    busiest_network: int
    busiest: str
    seconds: float
    exact: bool = True


def policy_layout(setting: Setting) -> Layout:
    """The trainer's layout of the policy, as ``actor.Actor`` makes it."""
    parallel = setting.config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    return megatron_layout(
        setting.spec,
        tp=parallel.tensor_model_parallel_size,
        pp=pp,
        vpp=vpp,
        vocab_divisor=parallel.make_vocab_size_divisible_by,
        transformer_impl=setting.implementation,
        layer_split=pipeline_layer_split(
            setting.spec,
            pp=pp,
            vpp=vpp,
            first=parallel.num_layers_in_first_pipeline_stage,
            last=parallel.num_layers_in_last_pipeline_stage,
        ),
    )


def engine_layout(setting: Setting) -> Layout:
    """The layout of one engine."""
    if setting.config.rollout.engine == "embedded":
        return embedded_layout(setting.spec)
    return sglang_layout(setting.spec, tp=setting.config.rollout.engine_tp, device=setting.device)


def reshard_plan(setting: Setting, placement: Placement) -> Plan:
    """The plan of a publish (``actor.publish``)."""
    engines = [list(ranks) for ranks in placement.engines]
    return make_plan(
        policy_layout(setting),
        placement.grid.replicas(),
        engine_layout(setting),
        shard_ranks(engines),
        ranks_per_node=placement.ranks_per_node,
        cached=False,
    )


def reshard_traffic(setting: Setting, placement: Placement, device: Device, assumed: Assumptions) -> ReshardTraffic:
    """Bytes of the real plan."""
    plan = reshard_plan(setting, placement)
    size = ITEMSIZE[setting.config.model.dtype]
    stats = plan.statistics.in_bytes(size)
    local, network = _busiest(plan, placement, size)
    return ReshardTraffic(
        nothing_moves=stats.nothing_moves,
        engine=max(stats.elements.values()),
        received_max=max(stats.received.values(), default=0),
        received_total=sum(stats.received.values()),
        sent_max=max(stats.sent.values(), default=0),
        in_place_max=max(stats.aliased.values(), default=0),
        cross_node=stats.cross_node or 0,
        pairs=stats.pairs,
        busiest_local=local,
        busiest_network=network,
        **_link_time(local, network, device, assumed),
    )


def quick_traffic(setting: Setting, placement: Placement, device: Device, assumed: Assumptions) -> ReshardTraffic:
    """An estimate without a plan, for searches: each rank lacks what its own shard cannot cover.

    A rank holds 1/(tp * pp) of the model and its engine rank wants 1/engine_tp. What is on the rank already is taken
    as the overlap of two even cuts; where engines are smaller than the span of a pipeline stage's ranks on a node,
    other stages' weights come over the network.
    """
    size = ITEMSIZE[setting.config.model.dtype] * num_parameters(setting.spec)
    grid, served = placement.grid, placement.is_served
    etp = setting.config.rollout.engine_tp if served else 1
    wanted = size / etp
    same_cut = etp == grid.tp
    held = wanted / grid.pp if same_cut or etp < grid.tp else size / (grid.tp * grid.pp)
    own = held if same_cut else size / (grid.tp * grid.pp) / max(1, etp // grid.tp)
    lacked = max(0.0, wanted - min(own, wanted))
    stages_a_node = max(1, min(grid.pp, placement.ranks_per_node // (grid.tp * grid.dp)))
    away = lacked if grid.pp == 1 else max(0.0, wanted * (1 - stages_a_node / grid.pp))
    network = int(away if grid.pp > 1 else 0)
    local = int(lacked - network) if lacked > network else 0
    return ReshardTraffic(
        nothing_moves=lacked == 0,
        engine=int(wanted),
        received_max=int(lacked),
        received_total=int(lacked * grid.world_size),
        sent_max=int(lacked),
        in_place_max=int(wanted - lacked),
        cross_node=network * grid.world_size,
        pairs=0,
        busiest_local=local,
        busiest_network=network,
        exact=False,
        **_link_time(local, network, device, assumed),
    )


def _busiest(plan: Plan, placement: Placement, itemsize: int) -> tuple[int, int]:
    """Bytes of the rank that sends or receives most inside its node, and of the one that does between nodes."""
    sizes = np.array([piece.size for piece in plan.pieces], dtype=np.int64)[plan.piece] * itemsize
    crosses = plan.src_rank // placement.ranks_per_node != plan.dst_rank // placement.ranks_per_node
    remote = plan.src_rank != plan.dst_rank
    most = []
    for chosen in (remote & ~crosses, crosses):
        loads = [
            np.bincount(side[chosen], weights=sizes[chosen], minlength=1).max() if chosen.any() else 0
            for side in (plan.src_rank, plan.dst_rank)
        ]
        most.append(int(max(loads)))
    return most[0], most[1]


def _link_time(local: int, network: int, device: Device, assumed: Assumptions) -> dict:
    local_s = local / (device.nvlink * assumed.nvlink_efficiency)
    network_s = network / (device.network * assumed.network_efficiency)
    name = "none" if not local and not network else "network" if network_s >= local_s else "inside a node"
    return {"busiest": name, "seconds": max(local_s, network_s)}
