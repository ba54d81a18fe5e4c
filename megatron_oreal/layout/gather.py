"""Gathering everything: the method that a plan replaces, as the oracle of tests and the peer in the benchmark.

Every rank receives every shard of the model, puts all HF tensors together, and takes its own shard of the destination
out of them, as trainers do that hand whole tensors to their engines. It shares nothing with plans but the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout.blocks import Block, Layout, Shape, ShardLayout, to_slices
from megatron_oreal.layout.execute import DEFAULT_BUCKET_BYTES

_Param = tuple[str, Shape]
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


class Gatherer:
    """All-gathers one model among the ranks of each data-parallel replica, in buckets that are kept; made once.

    ``source_ranks`` as for ``make_plan``, every shard with as many replicas; every rank of the default group makes one.
    ``dest_shard``: which destination shard this rank fills. Parameters must have ``dtype``. A bucket is whole
    parameters: of each rank, those that fit a share of ``bucket_bytes`` (at least one).
    """

    def __init__(
        self,
        source: Layout,
        source_ranks: Mapping[int, Sequence[int]],
        dest: Layout,
        dest_shard: int,
        rank: int,
        *,
        dtype: torch.dtype,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        replicas = [list(each) for each in zip(*(source_ranks[i] for i in range(len(source.shards))), strict=True)]
        (mine,) = (replica for replica in replicas if rank in replica)
        self._index, self._dest = mine.index(rank), dest.shards[dest_shard]
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group, _ = dist.new_subgroups_by_enumeration(replicas)
        limit = bucket_bytes // dtype.itemsize // len(mine)
        self._buckets = [_buckets(shard.params, limit) for shard in source.shards]
        self._blocks = [_blocks_by_param(shard) for shard in source.shards]
        count = max(map(len, self._buckets))
        self._sizes = [max(_size(buckets, number) for buckets in self._buckets) for number in range(count)]
        self._own = torch.empty(max(self._sizes), dtype=dtype)
        self._all = torch.empty(max(self._sizes) * len(mine), dtype=dtype)
        self._whole = {
            name: torch.empty(shape, dtype=dtype) for shard in source.shards for name, shape in shard.tensors
        }
        others = (shard for index, shard in enumerate(source.shards) if index != self._index)
        self.received = sum(shard.num_elements() for shard in others) * dtype.itemsize
        """Bytes that this rank receives, without what fills the buckets of shorter shards up."""

    @torch.no_grad()
    def run(self, src_tensors: Mapping[str, Tensor], dst_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fill ``dst_tensors``; returns the whole model as HF tensors, valid until the next run."""
        for number, size in enumerate(self._sizes):
            for name, part in self._parts(self._index, number, self._own):
                part.copy_(src_tensors[name])
            everyone = self._all[: size * len(self._buckets)]
            if self._group is None:
                everyone.copy_(self._own[:size])
            else:
                _all_gather(everyone, self._own[:size], group=self._group)
            for index in range(len(self._buckets)):
                for name, part in self._parts(index, number, everyone[index * size :]):
                    for block in self._blocks[index][name]:
                        self._whole[block.tensor][to_slices(block.source)] = part[to_slices(block.dest)]
        for block in self._dest.blocks:
            dst_tensors[block.param][to_slices(block.dest)] = self._whole[block.tensor][to_slices(block.source)]
        for name, rect in self._dest.padding:
            dst_tensors[name][to_slices(rect)] = 0
        return self._whole

    def _parts(self, index: int, number: int, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter in a bucket of a shard, as a view of ``flat``."""
        begin = 0
        for name, shape in self._buckets[index][number] if number < len(self._buckets[index]) else ():
            size = math.prod(shape)
            yield name, flat[begin : begin + size].view(shape)
            begin += size


def _buckets(params: Sequence[_Param], limit: int) -> list[list[_Param]]:
    buckets: list[list[_Param]] = []
    room = 0
    for name, shape in params:
        size = math.prod(shape)
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append((name, shape))
        room -= size
    return buckets


def _size(buckets: list[list[_Param]], number: int) -> int:
    return sum(math.prod(shape) for _, shape in buckets[number]) if number < len(buckets) else 0


def _blocks_by_param(shard: ShardLayout) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {name: [] for name, _ in shard.params}
    for block in shard.blocks:
        blocks[block.param].append(block)
    return blocks
