"""The policy's live weights into the engines' buffers: planned once a run, verified every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_oreal.actor.parallel import ParallelGrid
from megatron_oreal.layout import Digester, DigestReport, Layout, Resharder, Traffic, make_plan
from megatron_oreal.platform import Platform
from megatron_oreal.telemetry import PhaseTimers


class Staging(Protocol):
    """Where this rank's engine takes its next weights from: one group of its parameters after the other."""

    @property
    def groups(self) -> Sequence[frozenset[str]]:
        """Their names: a partition of the engine's parameters, the same on every rank."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        ...

    def open(self, number: int) -> Mapping[str, Tensor]:
        """Return the buffers of a group, once they may be written. Groups are opened in order, each once."""
        ...

    def hand_over(self, number: int) -> None:
        """Take the group that was opened last: it is written."""
        ...


class WholeStaging:
    """All of an engine's parameters at once, in buffers that nobody reads meanwhile."""

    def __init__(self, buffers: Mapping[str, Tensor], dtype: torch.dtype):
        self.groups = [frozenset(buffers)]
        (self.dtype,) = {tensor.dtype for tensor in buffers.values()} or {dtype}
        self._buffers = buffers

    def open(self, number: int) -> Mapping[str, Tensor]:
        """Return them."""
        return self._buffers

    def hand_over(self, number: int) -> None:
        """Nothing is to be done."""


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
    ``i`` modulo ``n``. ``groups``: of the engine's parameters, brought there one after the other.
    """

    def __init__(
        self,
        source: Layout,
        engine: Layout,
        grid: ParallelGrid,
        platform: Platform,
        *,
        groups: Sequence[frozenset[str]],
        wire_dtype: torch.dtype,
        verify: bool,
    ) -> None:
        self._made_for = engine, wire_dtype, tuple(groups)
        self._platform = platform
        shards, world = len(engine.shards), platform.world_size
        assert world % shards == 0, f"{shards} engine ranks do not divide {world} ranks"
        source_ranks = grid.ranks().replicas()
        engine_ranks = {index: range(index, world, shards) for index in range(shards)}
        node = platform.ranks_per_node
        plan = make_plan(source, source_ranks, engine, engine_ranks, ranks_per_node=node if world % node == 0 else None)
        self._received_max = max(plan.statistics.received.values(), default=0) * wire_dtype.itemsize
        self._resharders: list[Resharder] = []
        for group in groups:
            first = self._resharders[0] if self._resharders else None
            part = plan.only(group) if len(groups) > 1 else plan
            self._resharders.append(Resharder(part, platform.rank, wire_dtype=wire_dtype, share_buckets=first))
        self._digester: Digester | None = None
        if verify:
            self._digester = Digester(
                source, source_ranks, engine, engine_ranks, wire_dtype=wire_dtype, host_group=platform.host_group
            )

    def serves(self, engine: Layout, staging: Staging) -> bool:
        """Whether this is what it was made for."""
        return self._made_for == (engine, staging.dtype, tuple(staging.groups))

    def publish(
        self, version: int, weights: Mapping[str, Tensor], staging: Staging, timers: PhaseTimers
    ) -> PublishReport:
        """Bring ``weights`` to the engine; raises ``DigestError`` on every rank when they did not arrive whole.

        The next group is on its way while the engine still loads the one before.
        """
        rank = self._platform.rank
        traffic, arrived = Traffic(0, 0, 0), torch.zeros(1, dtype=torch.int64)
        for number, resharder in enumerate(self._resharders):
            with timers("load"):
                buffers = staging.open(number)
            with timers("transfer"):
                traffic += resharder.run(weights, buffers)
            if self._digester is not None:
                with timers("digest"):
                    arrived = arrived + self._digester.hash_dest(rank, buffers, partial=True).cpu()
            with timers("load"):
                staging.hand_over(number)
        digest = None
        if self._digester is not None:
            with timers("digest"):
                source = self._digester.hash_source(rank, weights)
                digest = self._digester.verify(rank, version, source, arrived)
        return PublishReport(version, traffic, self._received_max, digest)

    def release(self) -> None:
        """Give the staging memory back; the next ``publish`` allocates it again. Idempotent."""
        for resharder in self._resharders:
            resharder.release()
        if self._digester is not None:
            self._digester.release()
