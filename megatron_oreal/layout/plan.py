"""Plans: which rank sends which rectangle of which parameter to whom, so that one layout becomes another.

``make_plan`` intersects rectangles in Hugging Face coordinates. It is a pure function of its arguments with one order
of everything, so that every rank computes the same plan without asking another. Sizes are in elements.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Block, Layout, Rect, contains, grid_cells, intersect, rect_size

_RankTable = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """Where a source shard keeps a rectangle: shard ``index`` of the source layout, ``rect`` of its ``param``."""

    index: int
    param: str
    rect: Rect


@dataclass(frozen=True, slots=True)
class Piece:
    """``rect`` of parameter ``param`` of destination shard ``index``, and every source shard that holds it."""

    index: int
    param: str
    rect: Rect
    holders: tuple[Holder, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return rect_size(self.rect)


@dataclass(frozen=True, slots=True)
class Copy:
    """``src_rect`` of ``src_param`` on ``src_rank`` becomes ``dst_rect`` of ``dst_param`` on ``dst_rank``."""

    src_rank: int
    dst_rank: int
    src_param: str
    src_rect: Rect
    dst_param: str
    dst_rect: Rect


@dataclass(frozen=True)
class PlanStatistics:
    """Traffic of a plan, in elements, by global rank; ranks that move nothing are left out.

    ``received`` is what a rank needs and does not hold: no plan can move less to it. ``local``: copied within the rank.
    ``messages``: pairs of different ranks that talk. ``send_bound``: the busiest sender of any plan that copies locally
    where it can sends at least this much.
    """

    sent: dict[int, int]
    received: dict[int, int]
    local: dict[int, int]
    messages: int
    send_bound: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Copies that fill every destination element once. ``piece[i]`` goes from ``src_rank[i]`` to ``dst_rank[i]``.

    The arrays (int32, one length) are sorted by (src_rank, dst_rank, piece); ``holder[i]`` says which holder of the
    piece the sender is. ``zeros[dst_rank]`` are the parameters' rectangles that get zeros (vocabulary padding).
    """

    label: str
    pieces: tuple[Piece, ...]
    piece: np.ndarray
    holder: np.ndarray
    src_rank: np.ndarray
    dst_rank: np.ndarray
    zeros: Mapping[int, tuple[tuple[str, Rect], ...]]
    send_bound: int

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

    @cached_property
    def max_peers(self) -> int:
        """The most other ranks that any rank sends to, or receives from."""
        pairs = self._remote_pairs
        return max((int(np.bincount(side).max()) for side in pairs if side.size), default=0)

    @cached_property
    def statistics(self) -> PlanStatistics:
        """Traffic and lower bounds."""
        sizes = np.array([piece.size for piece in self.pieces], dtype=np.int64)[self.piece]
        remote = self.src_rank != self.dst_rank
        return PlanStatistics(
            sent=_sum_by(self.src_rank[remote], sizes[remote]),
            received=_sum_by(self.dst_rank[remote], sizes[remote]),
            local=_sum_by(self.dst_rank[~remote], sizes[~remote]),
            messages=self._remote_pairs.shape[1],
            send_bound=self.send_bound,
        )

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


def make_plan(
    source: Layout,
    source_ranks: Mapping[int, Sequence[int]],
    dest: Layout,
    dest_ranks: Mapping[int, int | Sequence[int]],
    *,
    cached: bool = True,
) -> Plan:
    """Plan the copies from ``source`` to ``dest``.

    ``source_ranks[i]``: global ranks that hold source shard ``i``, its data-parallel replicas (``RankGrid.replicas``).
    ``dest_ranks[j]``: the global rank, or ranks, that shall hold destination shard ``j``. A rank holds at most one
    shard of each side. A destination rank that holds a rectangle itself copies it locally; otherwise it comes from
    a holder that has little to send yet, largest pieces first. The last few plans are cached by their
    arguments unless ``cached`` is False.

    Raises ``UserError`` when the source does not hold all of a tensor that the destination needs.
    """
    plan = _cached_plan if cached else _plan
    return plan(source, _rank_table(source_ranks), dest, _rank_table(dest_ranks))


def _rank_table(ranks: Mapping[int, int | Sequence[int]]) -> _RankTable:
    table = tuple((index, (held,) if isinstance(held, int) else tuple(held)) for index, held in sorted(ranks.items()))
    flat = [rank for _, held in table for rank in held]
    assert len(flat) == len(set(flat)), f"a rank holds two shards: {table}"
    return table


def _plan(source: Layout, source_ranks: _RankTable, dest: Layout, dest_ranks: _RankTable) -> Plan:
    pieces: list[Piece] = []
    blocks = _blocks_by_tensor(source, source_ranks)
    for index, _ in dest_ranks:
        pieces += _merge(
            [piece for block in dest.shards[index].blocks for piece in _pieces(block, index, blocks, source)]
        )
    return _assign(f"{source.label} -> {dest.label}", pieces, dict(source_ranks), dest, dict(dest_ranks))


_cached_plan = lru_cache(maxsize=8)(_plan)


def _blocks_by_tensor(source: Layout, source_ranks: _RankTable) -> dict[str, list[tuple[int, Block]]]:
    blocks: dict[str, list[tuple[int, Block]]] = defaultdict(list)
    for index, _ in source_ranks:
        for block in source.shards[index].blocks:
            blocks[block.tensor].append((index, block))
    return blocks


def _pieces(
    wanted: Block, index: int, blocks: Mapping[str, list[tuple[int, Block]]], source: Layout
) -> Iterable[Piece]:
    """Cut a destination block where source blocks begin and end: each cell has one set of holders."""
    overlaps = []
    for holder_index, block in blocks.get(wanted.tensor, ()):
        if (common := intersect(wanted.source, block.source)) is not None:
            overlaps.append((common, holder_index, block))
    for cell in grid_cells(wanted.source, [common for common, _, _ in overlaps]):
        holders = tuple(Holder(i, b.param, b.dest_of(cell)) for common, i, b in overlaps if contains(common, cell))
        if not holders:
            raise UserError(f"{source.label} holds no {wanted.tensor!r} {list(cell)}, which {wanted.param!r} needs")
        yield Piece(index, wanted.param, wanted.dest_of(cell), holders)


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Join pieces of one parameter that touch, in the destination and in every holder alike, to one rectangle."""
    merged: dict[str, list[Piece]] = {}
    for piece in pieces:
        merged.setdefault(piece.param, []).append(piece)
    for param, group in merged.items():
        # along the last dimension first: cells of a grid come in rows
        for dim in reversed(range(len(group[0].rect))):
            group = _merge_along(group, dim)
        merged[param] = group
    return [piece for group in merged.values() for piece in group]


def _merge_along(pieces: list[Piece], dim: int) -> list[Piece]:
    def others_then_dim(piece: Piece) -> tuple[Rect, tuple[int, int]]:
        return piece.rect[:dim] + piece.rect[dim + 1 :], piece.rect[dim]

    joined: list[Piece] = []
    for piece in sorted(pieces, key=others_then_dim):
        if joined and (both := _join(joined[-1], piece, dim)) is not None:
            joined[-1] = both
        else:
            joined.append(piece)
    return sorted(joined, key=lambda piece: piece.rect)


def _join(a: Piece, b: Piece, dim: int) -> Piece | None:
    if [(h.index, h.param) for h in a.holders] != [(h.index, h.param) for h in b.holders]:
        return None
    rect = _join_rects(a.rect, b.rect, dim)
    rects = [_join_rects(p.rect, q.rect, dim) for p, q in zip(a.holders, b.holders, strict=True)]
    if rect is None or None in rects:
        return None
    holders = tuple(replace(h, rect=r) for h, r in zip(a.holders, rects, strict=True) if r is not None)
    return replace(a, rect=rect, holders=holders)


def _join_rects(a: Rect, b: Rect, dim: int) -> Rect | None:
    if a[dim][1] != b[dim][0] or a[:dim] != b[:dim] or a[dim + 1 :] != b[dim + 1 :]:
        return None
    return (*a[:dim], (a[dim][0], b[dim][1]), *a[dim + 1 :])


def _assign(
    label: str,
    pieces: list[Piece],
    source_ranks: dict[int, tuple[int, ...]],
    dest: Layout,
    dest_ranks: dict[int, tuple[int, ...]],
) -> Plan:
    """Choose a sender for every (piece, destination rank), largest pieces first; see ``_Senders.choose``."""
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].size, i))
    slots: dict[int, dict[int, int]] = {}  # piece -> {rank that holds it: which holder it is}
    demand: dict[tuple[int, ...], int] = defaultdict(int)
    for number in order:
        piece = pieces[number]
        held = {rank: slot for slot, h in reversed(list(enumerate(piece.holders))) for rank in source_ranks[h.index]}
        slots[number] = held
        demand[tuple(sorted(held))] += piece.size * sum(dst not in held for dst in dest_ranks[piece.index])
    bound = _send_bound(demand)
    senders = _Senders(bound)
    rows: list[tuple[int, int, int, int]] = []
    for number in order:
        piece, held = pieces[number], slots[number]
        candidates = sorted(held)
        for dst in dest_ranks[piece.index]:
            src = dst if dst in held else senders.choose(candidates, dst, piece.size)
            rows.append((src, dst, number, held[src]))
    rows.sort()
    table = np.array(rows, dtype=np.int32).reshape(-1, 4)
    src_rank, dst_rank, piece_number, holder = (np.ascontiguousarray(column) for column in table.T)
    zeros = {rank: dest.shards[index].padding for index, ranks in dest_ranks.items() for rank in ranks}
    zeros = {rank: rects for rank, rects in sorted(zeros.items()) if rects}
    return Plan(label, tuple(pieces), piece_number, holder, src_rank, dst_rank, zeros, bound)


class _Senders:
    """What each rank has been given to send so far, and to whom."""

    def __init__(self, bound: int) -> None:
        self._aim = bound + bound // 100
        self._load: dict[int, int] = defaultdict(int)
        self._talks: dict[int, set[int]] = defaultdict(set)

    def choose(self, candidates: list[int], dst: int, size: int) -> int:
        """Take a rank that already talks to ``dst`` while it stays within 1 % of the bound, else the least loaded.

        The first makes messages few, the second balances: no sender exceeds the larger of the aim and an even share
        by more than one piece.
        """
        load, talks = self._load, self._talks[dst]
        known = [rank for rank in candidates if rank in talks and load[rank] + size <= self._aim]
        src = min(known or candidates, key=load.__getitem__)
        load[src] += size
        talks.add(src)
        return src


def _send_bound(demand: Mapping[tuple[int, ...], int]) -> int:
    """Share what only the ranks of a set can send evenly in that set: the largest share is a lower bound."""
    bound = 0
    for senders, own in demand.items():
        if not own:
            continue
        inside = sum(size for others, size in demand.items() if set(others) <= set(senders))
        bound = max(bound, -(-inside // len(senders)))
    total = sum(demand.values())
    everyone = {rank for senders, own in demand.items() if own for rank in senders}
    return max(bound, -(-total // len(everyone))) if everyone else 0


def _sum_by(keys: np.ndarray, sizes: np.ndarray) -> dict[int, int]:
    ranks, slots = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(ranks), dtype=np.int64)
    np.add.at(sums, slots, sizes)
    return {int(rank): int(total) for rank, total in zip(ranks, sums, strict=True)}
