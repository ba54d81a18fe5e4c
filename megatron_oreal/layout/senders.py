"""Choose who sends each piece: the receiver itself, else a rank of its node, else any holder, the load spread evenly.

A piece may be sent by any rank that holds it, the data-parallel replicas of a shard among them. Every rank computes
the same choice. Loads are in elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_oreal.layout.pieces import Piece


@dataclass(frozen=True, slots=True)
class Assignment:
    """``rows`` [n, 4] int32, sorted: source rank, destination rank, piece, which of the piece's holders.

    ``send_bound``: the busiest sender of any choice under the same rules sends at least this much.
    ``cross_node``: what crosses between nodes (0 when nodes are not known); no choice without forwarding makes
    it less, because only receivers without a holder in their node get theirs from outside.
    """

    rows: np.ndarray
    send_bound: int
    cross_node: int


class _Request(NamedTuple):
    """Destination rank ``dst`` needs piece ``number``; ``candidates`` may send it. Sorted in the order of service."""

    freedom: int
    minus_size: int
    number: int
    dst: int
    candidates: tuple[int, ...]


def assign_senders(
    pieces: Sequence[Piece],
    source_ranks: Mapping[int, tuple[int, ...]],
    dest_ranks: Mapping[int, tuple[int, ...]],
    ranks_per_node: int | None,
) -> Assignment:
    """Choose a sender for every piece and destination rank.

    ``source_ranks``, ``dest_ranks``: global ranks of each shard. Ranks ``[n * k, (n + 1) * k)`` are node ``n`` of
    ``k = ranks_per_node``; ``None``: nodes make no difference.

    Requests with the fewest candidates go first, large ones before small ones. When candidate sets are nested or
    disjoint (the replicas of a shard, and all ranks that hold a replicated norm), a sender is the least loaded of its
    set, whose load comes from requests inside the set alone: no sender exceeds the larger of ``send_bound`` plus one
    piece and 1.01 ``send_bound``.
    """
    owners = _Owners(source_ranks, ranks_per_node)
    rows: list[tuple[int, int, int, int]] = []
    requests: list[_Request] = []
    cross_node = 0
    for number, piece in enumerate(pieces):
        size, slot_of, candidates_of = piece.size, owners.slots(piece), owners.candidates(piece)
        for dst in dest_ranks[piece.index]:
            if dst in slot_of:
                rows.append((dst, dst, number, slot_of[dst]))
                continue
            node = None if ranks_per_node is None else dst // ranks_per_node
            candidates = candidates_of.get(node)
            if candidates is None:
                candidates = candidates_of[None]
                cross_node += size
            requests.append(_Request(len(candidates), -size, number, dst, candidates))
    requests.sort()
    bound = _send_bound(requests)
    for request, src in zip(requests, _choose(requests, bound), strict=True):
        rows.append((src, request.dst, request.number, owners.slots(pieces[request.number])[src]))
    rows.sort()
    return Assignment(np.array(rows, dtype=np.int32).reshape(-1, 4), bound, cross_node)


class _Owners:
    """Ranks that hold a piece, by the shards that hold it: pieces of many layers have the same ones."""

    def __init__(self, source_ranks: Mapping[int, tuple[int, ...]], ranks_per_node: int | None) -> None:
        self._source_ranks = source_ranks
        self._ranks_per_node = ranks_per_node
        self._slots: dict[tuple[int, ...], dict[int, int]] = {}
        self._candidates: dict[tuple[int, ...], dict[int | None, tuple[int, ...]]] = {}

    def slots(self, piece: Piece) -> dict[int, int]:
        """Rank to the position of its shard in ``piece.holders``, the first where it has several."""
        shards = tuple([holder.index for holder in piece.holders])
        if shards not in self._slots:
            pairs = [(rank, slot) for slot, index in enumerate(shards) for rank in self._source_ranks[index]]
            self._slots[shards] = dict(reversed(pairs))
        return self._slots[shards]

    def candidates(self, piece: Piece) -> dict[int | None, tuple[int, ...]]:
        """Who holds the piece, sorted, by node; under ``None`` all of them."""
        shards = tuple([holder.index for holder in piece.holders])
        if shards not in self._candidates:
            everyone = sorted(self.slots(piece))
            by_node: dict[int | None, list[int]] = {None: everyone}
            if self._ranks_per_node is not None:
                for rank in everyone:
                    by_node.setdefault(rank // self._ranks_per_node, []).append(rank)
            self._candidates[shards] = {node: tuple(ranks) for node, ranks in by_node.items()}
        return self._candidates[shards]


def _choose(requests: Sequence[_Request], bound: int) -> Iterator[int]:
    """Yield the sender of each request in order.

    A rank that already talks to the receiver is taken while it stays within 1 % of the bound, which makes pairs few;
    else the least loaded, which balances.
    """
    aim = bound + bound // 100
    load: dict[int, int] = defaultdict(int)
    talks: dict[int, set[int]] = defaultdict(set)
    for _, minus_size, _, dst, candidates in requests:
        peers, size = talks[dst], -minus_size
        known = [rank for rank in candidates if rank in peers and load[rank] + size <= aim]
        src = min(known or candidates, key=load.__getitem__)
        load[src] += size
        peers.add(src)
        yield src


def _send_bound(requests: Sequence[_Request]) -> int:
    """Share what only the ranks of a set can send evenly in that set: the largest share is a lower bound."""
    demand: dict[tuple[int, ...], int] = defaultdict(int)
    for request in requests:
        demand[request.candidates] -= request.minus_size
    if not demand:
        return 0
    sets = [(frozenset(candidates), size) for candidates, size in demand.items()]
    everyone = frozenset().union(*(candidates for candidates, _ in sets))
    inside = [
        -(-sum(size for other, size in sets if other <= candidates) // len(candidates))
        for candidates in {everyone, *(candidates for candidates, _ in sets)}
    ]
    return max(inside)
