"""Cut what the destination shards need into rectangles, each with every source shard that holds all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import Block, Layout, Rect, contains, grid_cells, intersect, rect_size


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


def cut_pieces(source: Layout, source_shards: Iterable[int], dest: Layout, dest_shards: Iterable[int]) -> list[Piece]:
    """Return the pieces that fill the destination shards, in a fixed order.

    Neighbours whose holders are the same are one piece. Raises ``UserError`` when no source shard holds an element
    that a destination shard needs.
    """
    blocks: dict[str, list[tuple[int, Block]]] = defaultdict(list)
    for index in source_shards:
        for block in source.shards[index].blocks:
            blocks[block.tensor].append((index, block))
    pieces: list[Piece] = []
    for index in dest_shards:
        pieces += _merge([piece for block in dest.shards[index].blocks for piece in _cut(block, index, blocks, source)])
    return pieces


def _cut(wanted: Block, index: int, blocks: Mapping[str, list[tuple[int, Block]]], source: Layout) -> Iterable[Piece]:
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
