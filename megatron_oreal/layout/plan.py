"""Plans: which rank sends which rectangle of which parameter to whom, so that one layout becomes another.

``make_plan`` intersects rectangles in Hugging Face coordinates (``pieces.py``) and chooses the senders
(``senders.py``). It is a pure function of its arguments with one order of everything, so that every rank computes the
same plan without asking another. Sizes are in elements.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from megatron_oreal.layout.blocks import Layout, Rect, ShardLayout
from megatron_oreal.layout.pieces import Piece, cut_pieces
from megatron_oreal.layout.senders import assign_senders
from megatron_oreal.layout.statistics import PlanStatistics, contiguous_runs, lacked_elements, shared_params

_RankTable = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """``src_rect`` of ``src_param`` on ``src_rank`` becomes ``dst_rect`` of ``dst_param`` on ``dst_rank``."""

    src_rank: int
    dst_rank: int
    src_param: str
    src_rect: Rect
    dst_param: str
    dst_rect: Rect


@dataclass(frozen=True, eq=False)
class Plan:
    """Copies that fill every destination element once. ``piece[i]`` goes from ``src_rank[i]`` to ``dst_rank[i]``.

    The arrays (int32, one length) are sorted by (src_rank, dst_rank, piece); ``holder[i]`` says which holder of the
    piece the sender is. ``zeros[dst_rank]`` are the parameters' rectangles that get zeros (vocabulary padding).
    ``source_shards`` and ``dest_shards``: what each global rank holds before and after.
    """

    label: str
    pieces: tuple[Piece, ...]
    piece: np.ndarray
    holder: np.ndarray
    src_rank: np.ndarray
    dst_rank: np.ndarray
    zeros: Mapping[int, tuple[tuple[str, Rect], ...]]
    source_shards: Mapping[int, ShardLayout]
    dest_shards: Mapping[int, ShardLayout]
    send_bound: int
    cross_node: int | None

    def __len__(self) -> int:
        return len(self.piece)

    def copies(self, rank: int | None = None) -> Iterable[Copy]:
        """All copies in order, or those that ``rank`` sends or receives."""
        rows = np.arange(len(self)) if rank is None else self._rows_of(rank)
        for row in rows.tolist():
            piece = self.pieces[self.piece[row]]
            holder = piece.holders[self.holder[row]]
            ranks = int(self.src_rank[row]), int(self.dst_rank[row])
            yield Copy(*ranks, holder.param, holder.rect, piece.param, piece.rect)

    def only(self, params: Collection[str]) -> Plan:
        """The part of the plan that fills these destination parameters, on every rank that has them.

        The parts of a partition of the parameters are the whole plan, cut in time instead of in space.
        """
        chosen = np.array([piece.param in params for piece in self.pieces], dtype=bool)[self.piece]
        zeros = {rank: tuple(each for each in rects if each[0] in params) for rank, rects in self.zeros.items()}
        columns = {name: getattr(self, name)[chosen] for name in ("piece", "holder", "src_rank", "dst_rank")}
        return replace(self, **columns, zeros={rank: rects for rank, rects in zeros.items() if rects})

    def aliases(self, rank: int) -> dict[str, str]:
        """Destination parameters of a rank that are source parameters of it: name to the source's name.

        Both have one shape and the same elements, padding included, in the same places: the two sides may share the
        memory. The copies of such a parameter are in the plan all the same, local and without a change of place.
        """
        wanted = self.dest_shards.get(rank)
        return {} if wanted is None else shared_params(self.source_shards.get(rank), wanted)

    @cached_property
    def max_peers(self) -> int:
        """The most other ranks that any rank sends to, or receives from."""
        pairs = self._remote_pairs
        return max((int(np.bincount(side).max()) for side in pairs if side.size), default=0)

    @cached_property
    def statistics(self) -> PlanStatistics:
        """Traffic and lower bounds, in elements."""
        sizes = np.array([piece.size for piece in self.pieces], dtype=np.int64)[self.piece]
        remote = self.src_rank != self.dst_rank
        runs, largest = self._runs(remote)
        # many ranks hold the same pair of shards
        lacked: dict[tuple[int, int], int] = {}
        aliased: dict[tuple[int, int], int] = {}
        for rank, wanted in self.dest_shards.items():
            held = self.source_shards.get(rank)
            if (key := (id(held), id(wanted))) not in lacked:
                lacked[key] = lacked_elements(held, wanted)
                aliased[key] = sum(math.prod(wanted.shapes[name]) for name in shared_params(held, wanted))
        keys = {rank: (id(self.source_shards.get(rank)), id(wanted)) for rank, wanted in self.dest_shards.items()}
        return PlanStatistics(
            sent=_sum_by(self.src_rank[remote], sizes[remote]),
            received=_sum_by(self.dst_rank[remote], sizes[remote]),
            lacked={rank: lacked[key] for rank, key in keys.items() if lacked[key]},
            local=_sum_by(self.dst_rank[~remote], sizes[~remote]),
            aliased={rank: aliased[key] for rank, key in keys.items() if aliased[key]},
            elements={rank: count for rank, wanted in self.dest_shards.items() if (count := wanted.num_elements())},
            send_bound=self.send_bound,
            cross_node=self.cross_node,
            rectangles=int(remote.sum()),
            messages=runs,
            largest_message=largest,
            pairs=self._remote_pairs.shape[1],
        )

    def describe(self, itemsize: int) -> str:
        """Return a summary of a few lines, for elements of ``itemsize`` bytes."""
        return self.statistics.describe(self.label, itemsize)

    def fingerprint(self) -> str:
        """SHA-256 of the whole plan: equal on two ranks exactly when they will do the same."""
        digest = hashlib.sha256(repr((self.label, self.pieces, sorted(self.zeros.items()))).encode())
        for array in (self.piece, self.holder, self.src_rank, self.dst_rank):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def _remote_pairs(self) -> np.ndarray:
        """(src_rank, dst_rank) of different ranks that talk, as two rows."""
        remote = self.src_rank != self.dst_rank
        return np.unique(np.stack([self.src_rank[remote], self.dst_rank[remote]]), axis=1)

    def _rows_of(self, rank: int) -> np.ndarray:
        return np.flatnonzero((self.src_rank == rank) | (self.dst_rank == rank))

    def _runs(self, remote: np.ndarray) -> tuple[int, int]:
        """Contiguous runs of memory over all remote copies, and the elements of the largest."""
        rows = np.stack([self.piece[remote], self.holder[remote]])
        kinds, first, counts = np.unique(rows, axis=1, return_index=True, return_counts=True)
        firsts = np.flatnonzero(remote)[first]
        total = largest = 0
        for (number, slot), row, count in zip(kinds.T.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            piece = self.pieces[number]
            holder = piece.holders[slot]
            src_shape = self.source_shards[int(self.src_rank[row])].shapes[holder.param]
            dst_shape = self.dest_shards[int(self.dst_rank[row])].shapes[piece.param]
            runs = contiguous_runs(holder.rect, src_shape, piece.rect, dst_shape)
            total += runs * count
            largest = max(largest, piece.size // runs)
        return total, largest


def make_plan(
    source: Layout,
    source_ranks: Mapping[int, Sequence[int]],
    dest: Layout,
    dest_ranks: Mapping[int, int | Sequence[int]],
    *,
    ranks_per_node: int | None = None,
    cached: bool = True,
) -> Plan:
    """Plan the copies from ``source`` to ``dest``.

    ``source_ranks[i]``: global ranks that hold source shard ``i``, its data-parallel replicas (``RankGrid.replicas``).
    ``dest_ranks[j]``: the global rank, or ranks, that shall hold destination shard ``j``. A rank holds at most one
    shard of each side. A destination rank that holds a rectangle itself copies it locally; otherwise it comes from
    a holder in its own node (``ranks_per_node`` consecutive ranks are a node; ``None``: nodes make no difference), and
    from another node only when its own has none. Among these the senders are balanced (``assign_senders``). The last
    few plans are cached by their arguments unless ``cached`` is False.

    Raises ``UserError`` when the source does not hold all of a tensor that the destination needs.
    """
    assert ranks_per_node is None or ranks_per_node > 0, f"ranks_per_node={ranks_per_node}"
    plan = _cached_plan if cached else _plan
    return plan(source, _rank_table(source_ranks), dest, _rank_table(dest_ranks), ranks_per_node)


def _rank_table(ranks: Mapping[int, int | Sequence[int]]) -> _RankTable:
    table = tuple((index, (held,) if isinstance(held, int) else tuple(held)) for index, held in sorted(ranks.items()))
    flat = [rank for _, held in table for rank in held]
    assert len(flat) == len(set(flat)), f"a rank holds two shards: {table}"
    return table


def _plan(
    source: Layout, source_ranks: _RankTable, dest: Layout, dest_ranks: _RankTable, ranks_per_node: int | None
) -> Plan:
    pieces = cut_pieces(source, [index for index, _ in source_ranks], dest, [index for index, _ in dest_ranks])
    chosen = assign_senders(pieces, dict(source_ranks), dict(dest_ranks), ranks_per_node)
    src_rank, dst_rank, piece, holder = (np.ascontiguousarray(column) for column in chosen.rows.T)
    dest_shards = _shards_by_rank(dest, dest_ranks)
    return Plan(
        label=f"{source.label} -> {dest.label}",
        pieces=tuple(pieces),
        piece=piece,
        holder=holder,
        src_rank=src_rank,
        dst_rank=dst_rank,
        zeros={rank: shard.padding for rank, shard in dest_shards.items() if shard.padding},
        source_shards=_shards_by_rank(source, source_ranks),
        dest_shards=dest_shards,
        send_bound=chosen.send_bound,
        cross_node=None if ranks_per_node is None else chosen.cross_node,
    )


_cached_plan = lru_cache(maxsize=8)(_plan)


def _shards_by_rank(layout: Layout, ranks: _RankTable) -> dict[int, ShardLayout]:
    return dict(sorted((rank, layout.shards[index]) for index, held in ranks for rank in held))


def _sum_by(keys: np.ndarray, sizes: np.ndarray) -> dict[int, int]:
    ranks, slots = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(ranks), dtype=np.int64)
    np.add.at(sums, slots, sizes)
    return {int(rank): int(total) for rank, total in zip(ranks, sums, strict=True)}
