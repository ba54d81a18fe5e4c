"""One version's way into a server, bucket after bucket, while the next bucket is being filled.

Two buckets of ``rollout.server.bucket_bytes`` are all that staging needs on a device that also holds the policy and the
engine's weights then. A bucket is written again only behind the engine's fence: every worker has copied it, waited for
its device, and said so.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.layout import Digester, ShardLayout
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang.group import EngineGroup
from megatron_oreal.rollout.sglang.staging import Segment, ShardStaging, create_segment, padded_bytes
from megatron_oreal.rollout.sglang.weights import Part


class Buckets:
    """The shared memory that one rank stages parameters of its shard in: group ``i`` in bucket ``i % 2``."""

    def __init__(self, shard: ShardLayout, groups: Sequence[frozenset[str]], dtype: torch.dtype, device: torch.device):
        self._groups = [{name: shape for name, shape in shard.params if name in group} for group in groups]
        self._dtype, self._device = dtype, device
        self._segments: list[Segment] = []
        self.staged: list[ShardStaging] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(segment.tensor.numel() for segment in self._segments)

    def allocate(self) -> None:
        """Make the buckets, when they are not there."""
        if self._segments:
            return
        sizes = [sum(padded_bytes(shape, self._dtype) for shape in group.values()) for group in self._groups]
        for slot in range(min(2, len(sizes))):
            self._segments.append(create_segment(max(sizes[slot::2]), self._device, f"bucket{slot}"))
        segments = [self._segments[number % 2] for number in range(len(sizes))]
        self.staged = [
            ShardStaging(*each) for each in zip(self._groups, [self._dtype] * len(sizes), segments, strict=True)
        ]

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        for staging in self.staged:
            staging.tensors = {}
        for segment in self._segments:
            segment.close()
        had, self._segments, self.staged = bool(self._segments), [], []
        if had and self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the server's caches, which another process allocates


class Handover:
    """What a rank writes a version's parameters into (``actor.publish.Staging``); all members of a group do it alike.

    ``feed``: on the rank that has the server, runs a coroutine with the queue of parts on the client's loop and returns
    its future; None elsewhere. ``keep``: where a copy of the whole shard stays. Nothing raises when the server fails:
    the ranks are in the middle of a transfer. ``SglangEngine.load_weights`` says what became of it.
    """

    def __init__(
        self,
        version: int,
        groups: Sequence[frozenset[str]],
        buckets: Buckets,
        group: EngineGroup,
        shard: int,
        digester: Digester,
        *,
        dtype: torch.dtype,
        keep: Mapping[str, Tensor] | None,
        feed: Callable[[asyncio.Queue[Part | None]], concurrent.futures.Future[Any]] | None,
        post: Callable[[Coroutine[Any, Any, Any]], Any],
    ):
        self.version, self.groups, self.dtype = version, groups, dtype
        self._buckets, self._group, self._shard, self._digester, self._keep = buckets, group, shard, digester, keep
        self._hashes = torch.zeros(1, dtype=torch.int64)
        self._parts: list[Part] = []
        self._queue: asyncio.Queue[Part | None] = asyncio.Queue()
        self._post = post
        self._done = 0
        buckets.allocate()
        self._fed = feed(self._queue) if feed is not None else None

    @property
    def is_complete(self) -> bool:
        """Whether every group was handed over."""
        return self._done == len(self.groups)

    def hashes(self) -> Tensor:
        """Digests of the staged shard, int64 [n]. When this returns, the kept copy is whole."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._hashes

    def open(self, number: int) -> Mapping[str, Tensor]:
        """Return a group's buffers, once the workers have read what stood there."""
        assert number == self._done, f"group {number} is opened after {self._done} groups"
        if number >= 2:
            if self._fed is not None:
                concurrent.futures.wait([self._parts[number - 2].taken, self._fed], return_when="FIRST_COMPLETED")
            self._group.broadcast(None)
        return self._buckets.staged[number].tensors

    def hand_over(self, number: int) -> None:
        """Have the workers take a group; meanwhile hash and keep it."""
        staging = self._buckets.staged[number]
        staged = self._group.gather(staging.describe())
        self._done += 1
        if staged is not None:
            part = Part(staged, is_last=self.is_complete)
            self._parts.append(part)
            self._post(self._queue.put(part))
        self._hashes = self._hashes + self._digester.hash_source(self._shard, staging.tensors, partial=True).cpu()
        if self._keep is not None:
            for name, tensor in staging.tensors.items():
                self._keep[name].copy_(tensor, non_blocking=True)

    def result(self) -> list[Any]:
        """On the rank that has the server: the workers' digests. Raises ``EngineError`` when the server failed."""
        assert self._fed is not None and self.is_complete
        try:
            digests = self._fed.result()
        except concurrent.futures.CancelledError:
            raise EngineError("the dispatcher was closed while weights were loaded") from None
        assert digests is not None
        return list(digests)

    def abandon(self) -> None:
        """Give the version up, and wait until the server reads no bucket any more. Idempotent."""
        if self._fed is not None and not self._fed.done():
            self._post(self._queue.put(None))
            concurrent.futures.wait([self._fed])

    def cancel(self) -> None:
        """Wait for nothing: the server is about to be stopped. Idempotent."""
        if self._fed is not None:
            self._fed.cancel()
