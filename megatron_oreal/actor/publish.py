"""The policy's live weights into the engines' buffers: planned once a run, verified every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.layout import Digester, DigestReport, Layout, Resharder, Traffic, make_plan
from megatron_oreal.platform import Platform
from megatron_oreal.telemetry import PhaseTimers


@dataclass(frozen=True, slots=True)
class PublishReport:
    """``traffic``: bytes of this rank; ``received_max``: of the rank that receives most; ``digest``: when verified."""

    version: int
    traffic: Traffic
    received_max: int
    digest: DigestReport | None


class Publisher:
    """Brings one model from its Megatron layout into an engine layout. Every rank makes one and calls it alike.

    Engine replicas stand on consecutive ranks: shard ``i`` of an engine layout of ``n`` shards is on every rank that is
    ``i`` modulo ``n``.
    """

    def __init__(
        self,
        source: Layout,
        engine: Layout,
        grid: ParallelGrid,
        platform: Platform,
        *,
        wire_dtype: torch.dtype,
        verify: bool,
    ) -> None:
        self._engine, self._wire_dtype = engine, wire_dtype
        self._platform = platform
        shards, world = len(engine.shards), platform.world_size
        assert world % shards == 0, f"{shards} engine ranks do not divide {world} ranks"
        source_ranks = grid.ranks().replicas()
        engine_ranks = {index: range(index, world, shards) for index in range(shards)}
        node = platform.ranks_per_node
        plan = make_plan(source, source_ranks, engine, engine_ranks, ranks_per_node=node if world % node == 0 else None)
        self._received_max = max(plan.statistics.received.values(), default=0) * wire_dtype.itemsize
        self._resharder = Resharder(plan, platform.rank, wire_dtype=wire_dtype)
        self._digester: Digester | None = None
        if verify:
            self._digester = Digester(
                source, source_ranks, engine, engine_ranks, wire_dtype=wire_dtype, host_group=platform.host_group
            )

    def serves(self, engine: Layout, wire_dtype: torch.dtype) -> bool:
        """Whether this is what it was made for."""
        return (self._engine, self._wire_dtype) == (engine, wire_dtype)

    def publish(
        self, version: int, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], timers: PhaseTimers
    ) -> PublishReport:
        """Fill ``buffers`` from ``weights``; raises ``DigestError`` on every rank when they did not arrive whole."""
        with timers("transfer"):
            traffic = self._resharder.run(weights, buffers)
        digest = None
        if self._digester is not None:
            with timers("digest"):
                digest = self._digester.check(self._platform.rank, version, weights, buffers)
        return PublishReport(version, traffic, self._received_max, digest)

    def release(self) -> None:
        """Give the staging memory back; the next ``publish`` allocates it again. Idempotent."""
        self._resharder.release()
        if self._digester is not None:
            self._digester.release()
