"""Where elements live: rectangles of Hugging Face tensors inside the parameters of a rank. Pure data.

The Hugging Face tensor is the coordinate system. A ``Block`` says that a rectangle of it stands, element for element,
in a rectangle of a parameter; a ``ShardLayout`` is what one rank holds, a ``Layout`` what all ranks hold. All are
frozen, hashable and picklable, and their order is the order in which they were built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Span = tuple[int, int]
"""``(start, stop)`` along one dimension."""
Rect = tuple[Span, ...]
"""One span a dimension."""
Shape = tuple[int, ...]
Split = Literal["replicated", "columns", "each_part"]
"""Whole on every rank; cut by columns; cut by rows in each part of a fused weight."""


def rect_size(rect: Rect) -> int:
    """Elements in a rectangle."""
    return math.prod([stop - start for start, stop in rect])


def full_rect(shape: Shape) -> Rect:
    """Return the rectangle that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def intersect(a: Rect, b: Rect) -> Rect | None:
    """Return the common rectangle of two in the same coordinates, ``None`` when they share no element."""
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def contains(outer: Rect, inner: Rect) -> bool:
    """Whether every element of ``inner`` is one of ``outer``."""
    return all(p[0] <= q[0] and q[1] <= p[1] for p, q in zip(outer, inner, strict=True))


def shift(rect: Rect, offset: Iterable[int]) -> Rect:
    """Move a rectangle by one offset a dimension."""
    return tuple((start + by, stop + by) for (start, stop), by in zip(rect, offset, strict=True))


def to_slices(rect: Rect) -> tuple[slice, ...]:
    """Index a torch tensor or a NumPy array with a rectangle."""
    return tuple(slice(start, stop) for start, stop in rect)


def grid_cells(bounds: Rect, rects: Iterable[Rect]) -> Iterator[Rect]:
    """Cut ``bounds`` along every edge of ``rects``, so that each cell lies wholly inside or outside each of them."""
    cuts: list[set[int]] = [{start, stop} for start, stop in bounds]
    for rect in rects:
        for dim, ((low, high), edges) in enumerate(zip(bounds, rect, strict=True)):
            cuts[dim].update(edge for edge in edges if low < edge < high)
    yield from itertools.product(*(itertools.pairwise(sorted(edges)) for edges in cuts))


@dataclass(frozen=True, slots=True)
class Block:
    """``source`` of the HF tensor ``tensor`` is ``dest`` of the parameter ``param``; both rectangles have one shape."""

    tensor: str
    source: Rect
    param: str
    dest: Rect

    def dest_of(self, source: Rect) -> Rect:
        """Map a rectangle of the HF tensor, inside ``source``, to the parameter."""
        return shift(source, (dest[0] - own[0] for own, dest in zip(self.source, self.dest, strict=True)))


@dataclass(frozen=True)
class ShardLayout:
    """What one rank holds.

    ``params``: name and shape of each of its parameters; ``tensors``: name and *full* shape of each HF tensor that it
    holds elements of; ``blocks``: where they are. No two blocks share an element of a parameter.
    """

    params: tuple[tuple[str, Shape], ...]
    tensors: tuple[tuple[str, Shape], ...]
    blocks: tuple[Block, ...]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Parameter name to shape."""
        return dict(self.params)

    @cached_property
    def padding(self) -> tuple[tuple[str, Rect], ...]:
        """Parameters and their rectangles that no HF element stands in (vocabulary padding): they must hold zeros."""
        dests: dict[str, list[Rect]] = {name: [] for name, _ in self.params}
        for block in self.blocks:
            dests[block.param].append(block.dest)
        return tuple((name, rect) for name, shape in self.params for rect in _uncovered(shape, dests[name]))

    def num_elements(self) -> int:
        """Elements of all parameters, padding included."""
        return sum(math.prod(shape) for _, shape in self.params)

    def check_tensors(self, tensors: Any, role: str) -> None:
        """Raise ``ValueError`` unless ``tensors`` has every parameter of the shard in the shard's shape."""
        for name, shape in self.params:
            if name not in tensors:
                raise ValueError(f"{role}: parameter {name!r} of the layout is not among the live tensors")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{role}: {name!r} has shape {tuple(tensors[name].shape)}, the layout says {shape}")


@dataclass(frozen=True)
class Layout:
    """What every rank of a model-parallel arrangement holds: ``shards[i]`` is rank ``i``; ``label`` is for messages."""

    label: str
    shards: tuple[ShardLayout, ...]


def _uncovered(shape: Shape, dests: Sequence[Rect]) -> Iterator[Rect]:
    covered = sum(map(rect_size, dests))
    if covered == math.prod(shape):
        return
    for cell in grid_cells(full_rect(shape), dests):
        if not any(contains(dest, cell) for dest in dests):
            yield cell


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``[start, stop)`` of an HF tensor of full shape ``shape``; ``tensor is None`` stands for rows of zeros."""

    tensor: str | None
    shape: Shape
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut_rows(pieces: Iterable[Rows], start: int, stop: int) -> list[Rows]:
    """Rows ``[start, stop)`` of the stack of ``pieces``."""
    cut = []
    top = 0
    for piece in pieces:
        low, high = max(start, top), min(stop, top + len(piece))
        if low < high:
            cut.append(Rows(piece.tensor, piece.shape, piece.start + low - top, piece.start + high - top))
        top += len(piece)
    assert 0 <= start <= stop <= top, f"rows [{start}, {stop}) of a stack of {top}"
    return cut


def add_split(builder: ShardBuilder, param: str, parts: tuple[Rows, ...], split: Split, tp_rank: int, tp: int) -> None:
    """Add rank ``tp_rank``'s share of a weight of whole HF tensors, as Megatron and the engines both cut it."""
    if split == "replicated":
        builder.add(param, parts)
    elif split == "columns":
        width = parts[0].shape[1] // tp
        builder.add(param, parts, (tp_rank * width, (tp_rank + 1) * width))
    else:
        builder.add(param, [rows for part in parts for rows in even_rows([part], tp_rank, tp)])


def even_rows(stack: Sequence[Rows], rank: int, count: int) -> list[Rows]:
    """Return the ``rank``-th of ``count`` equal runs of rows of a stack."""
    height = sum(map(len, stack)) // count
    return cut_rows(stack, rank * height, (rank + 1) * height)


def vocab_rows(table: Rows, padded_size: int, rank: int, count: int) -> list[Rows]:
    """Return the ``rank``-th of ``count`` equal runs of a vocabulary table with zero rows up to ``padded_size``."""
    return even_rows([table, Rows(None, table.shape, 0, padded_size - len(table))], rank, count)


class ShardBuilder:
    """Collects the parameters of one rank; ``build`` freezes them."""

    def __init__(self) -> None:
        self._params: dict[str, Shape] = {}
        self._tensors: dict[str, Shape] = {}
        self._blocks: list[Block] = []

    def add(self, param: str, pieces: Iterable[Rows], columns: Span | None = None) -> None:
        """Add a parameter: ``pieces`` stacked on dimension 0, of each the given columns (all when ``None``)."""
        assert param not in self._params, f"parameter {param} is added twice"
        top = 0
        rest: Rect = ()
        for piece in _join(pieces):
            rest = full_rect(piece.shape[1:]) if columns is None else (columns,)
            if piece.tensor is not None:
                dest = ((top, top + len(piece)), *((0, stop - start) for start, stop in rest))
                self._tensors[piece.tensor] = piece.shape
                self._blocks.append(Block(piece.tensor, ((piece.start, piece.stop), *rest), param, dest))
            top += len(piece)
        self._params[param] = (top, *(stop - start for start, stop in rest))

    def build(self) -> ShardLayout:
        """Return the shard, in the order of ``add``."""
        return ShardLayout(tuple(self._params.items()), tuple(self._tensors.items()), tuple(self._blocks))


def _join(pieces: Iterable[Rows]) -> list[Rows]:
    """Join neighbours that are consecutive rows of one tensor, so that a whole tensor is one block."""
    joined: list[Rows] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and piece.tensor is not None and last.tensor == piece.tensor and last.stop == piece.start:
            joined[-1] = Rows(piece.tensor, piece.shape, last.start, piece.stop)
        else:
            joined.append(piece)
    return joined
