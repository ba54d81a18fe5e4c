"""Keys and values of the running sequences, in pools by length.

A pool holds sequences of at most ``capacity`` tokens, its sequences in its first rows without gaps; capacities double
from pool to pool. A sequence moves to the next pool when it outgrows its own, so that a few long responses neither make
the short ones pay for attention over their length nor make the cache ``slots x longest`` large.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_oreal.layout.model_spec import ModelSpec

SMALLEST_CAPACITY = 64
"""Tokens a sequence of the first pool may have."""


class KvPool:
    """Rows of ``capacity`` tokens each.

    ``data`` is [layers, 2 (key, value), allocated rows, kv heads, capacity, head_dim]. It is never uninitialised
    memory: attention multiplies the columns past a sequence's end by a probability of zero, which a NaN survives.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.data = torch.zeros(
            (spec.num_layers, 2, 0, spec.num_kv_heads, capacity, spec.head_dim), dtype=dtype, device=device
        )
        self.slots: list[int] = []
        """The slot in each row; -1 marks a row that is free until ``KvCache.close_gaps``."""
        self.free: list[int] = []

    def take_row(self, slot: int, max_rows: int) -> int:
        """Give ``slot`` a row; the pool grows by half, up to ``max_rows`` rows, when it has none left."""
        if self.free:
            row = self.free.pop()
            self.slots[row] = slot
            return row
        row, allocated = len(self.slots), self.data.shape[2]
        if row == allocated:
            grown = min(max_rows, max(16, allocated + allocated // 2))
            fresh = self.data.new_zeros((*self.data.shape[:2], max(grown, row + 1), *self.data.shape[3:]))
            fresh[:, :, :row] = self.data
            self.data = fresh
        self.slots.append(slot)
        return row

    def free_row(self, row: int) -> None:
        """Mark a row as free; what stands in it can be read until the row is taken again."""
        self.slots[row] = -1
        self.free.append(row)


class KvCache:
    """The pools, and where each slot's sequence lies in them. Slots are numbers below ``num_slots``."""

    def __init__(self, spec: ModelSpec, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device):
        self.pools = [KvPool(spec, SMALLEST_CAPACITY, dtype, device)]
        while self.pools[-1].capacity < max_length:
            capacity = min(2 * self.pools[-1].capacity, max_length)
            self.pools.append(KvPool(spec, capacity, dtype, device))
        self._num_slots = num_slots
        self._device = device
        self.pool_of = np.full(num_slots, -1)
        self.row_of = np.full(num_slots, -1)

    def nbytes(self) -> int:
        """Bytes that all pools hold now."""
        return sum(pool.data.nbytes for pool in self.pools)

    def admit(self, slot: int, length: int) -> None:
        """Place a new sequence where ``length`` tokens fit; its keys and values are still to be written."""
        self._place(slot, next(i for i, pool in enumerate(self.pools) if pool.capacity >= length))

    def release(self, slot: int) -> None:
        """Forget the sequence of ``slot``."""
        self.pools[self.pool_of[slot]].free_row(int(self.row_of[slot]))
        self.pool_of[slot] = -1

    def promote(self, slots: np.ndarray) -> None:
        """Move sequences, all of one pool, to the next one."""
        source_pool, source_rows = int(self.pool_of[slots[0]]), self.row_of[slots]
        for slot in slots.tolist():
            self.pools[source_pool].free_row(int(self.row_of[slot]))
            self._place(slot, source_pool + 1)
        source, target = self.pools[source_pool], self.pools[source_pool + 1]
        self._copy(source, source_rows, target, self.row_of[slots], source.capacity)

    def copy_prefixes(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Copy the first ``lengths[i]`` tokens of slot ``sources[i]`` to slot ``targets[i]``, for every i."""
        pairs = np.stack((self.pool_of[sources], self.pool_of[targets]))
        for source_pool, target_pool in np.unique(pairs, axis=1).T.tolist():
            chosen = (pairs[0] == source_pool) & (pairs[1] == target_pool)
            source_rows, target_rows = self.row_of[sources[chosen]], self.row_of[targets[chosen]]
            length = int(lengths[chosen].max())
            self._copy(self.pools[source_pool], source_rows, self.pools[target_pool], target_rows, length)

    def close_gaps(self) -> np.ndarray:
        """Fill every pool's free rows from its end. Returns the slots in batch order: pool by pool, row by row."""
        for pool in self.pools:
            if pool.free:
                self._close_gaps_of(pool)
        return np.array([slot for pool in self.pools for slot in pool.slots], dtype=np.int64)

    def _place(self, slot: int, pool: int) -> None:
        self.pool_of[slot] = pool
        self.row_of[slot] = self.pools[pool].take_row(slot, self._num_slots)

    def _close_gaps_of(self, pool: KvPool) -> None:
        count = len(pool.slots) - len(pool.free)
        movers = [row for row in range(count, len(pool.slots)) if pool.slots[row] >= 0]
        gaps = sorted(pool.free)[: len(movers)]
        if movers:
            self._copy(pool, np.array(movers), pool, np.array(gaps), pool.capacity)
        for source, target in zip(movers, gaps, strict=True):
            pool.slots[target] = pool.slots[source]
            self.row_of[pool.slots[target]] = target
        del pool.slots[count:]
        pool.free.clear()

    def _copy(self, source: KvPool, source_rows: np.ndarray, target: KvPool, target_rows: np.ndarray, n: int) -> None:
        rows = torch.from_numpy(source_rows).to(self._device)
        values = source.data.narrow(4, 0, n).index_select(2, rows)
        target.data.narrow(4, 0, n).index_copy_(2, torch.from_numpy(target_rows).to(self._device), values)
