"""What a plan moves, against what any plan must move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_oreal.layout.blocks import Block, Rect, Shape, ShardLayout, intersect, rect_size


@dataclass(frozen=True)
class PlanStatistics:
    """Traffic of a plan, in elements (``in_bytes`` scales it), by global rank; ranks that move nothing are left out.

    ``received``: from other ranks; ``lacked``: elements that the rank must hold and its own source shard has not, so
    that no plan moves less to it. ``local``: copied within the rank; ``aliased``: the part of a rank's parameters,
    padding included, that is a source parameter of the same rank, element for element in its place (``Plan.aliases``):
    both sides may share that memory. ``elements``: all that destination ranks hold. ``send_bound``: the busiest sender
    of any plan that copies locally where it can (and keeps to a node where it can, when nodes are known) sends at
    least this much. ``cross_node``: what travels between nodes, which is the least without forwarding; ``None`` when
    nodes are not known.

    Counts, all between different ranks: ``rectangles``, neighbours merged; ``messages``, the runs of memory that are
    contiguous on both sides, so that they travel without packing; ``pairs`` of ranks that talk, so the fewest messages
    with packing. ``largest_message`` is in elements.
    """

    sent: dict[int, int]
    received: dict[int, int]
    lacked: dict[int, int]
    local: dict[int, int]
    aliased: dict[int, int]
    elements: dict[int, int]
    send_bound: int
    cross_node: int | None
    rectangles: int
    messages: int
    largest_message: int
    pairs: int

    @property
    def ratio(self) -> float:
        """Received over lacked, over all ranks; 1.0 is the least (also when nothing is lacked)."""
        lacked = sum(self.lacked.values())
        return sum(self.received.values()) / lacked if lacked else 1.0

    @property
    def nothing_moves(self) -> bool:
        """Every destination parameter of every rank is a source parameter of the same rank: in place is possible."""
        return self.aliased == self.elements

    def in_bytes(self, itemsize: int) -> PlanStatistics:
        """Return the same with sizes in bytes, for elements of ``itemsize`` bytes; counts stay."""

        def scale(by_rank: dict[int, int]) -> dict[int, int]:
            return {rank: count * itemsize for rank, count in by_rank.items()}

        return replace(
            self,
            sent=scale(self.sent),
            received=scale(self.received),
            lacked=scale(self.lacked),
            local=scale(self.local),
            aliased=scale(self.aliased),
            elements=scale(self.elements),
            send_bound=self.send_bound * itemsize,
            cross_node=None if self.cross_node is None else self.cross_node * itemsize,
            largest_message=self.largest_message * itemsize,
        )

    def describe(self, label: str, itemsize: int) -> str:
        """Return a summary of a few lines, for elements of ``itemsize`` bytes."""
        size = self.in_bytes(itemsize)
        ranks = len(self.elements)
        lines = [f"{label}: {format_bytes(sum(size.elements.values()))} on {ranks} rank{'s' if ranks != 1 else ''}"]
        in_place = sum(self.aliased.get(rank) == count for rank, count in self.elements.items())
        if self.nothing_moves:
            lines.append("  nothing moves: every parameter is one of the same rank's source parameters, in its place")
            return "\n".join(lines)
        lines += [
            f"  received   {_spread(size.received)}; {self.ratio:.2f} of what the ranks lack",
            f"  sent       {_spread(size.sent)}; in any plan one sends at least {format_bytes(size.send_bound)}",
            f"  local      {_spread(size.local)}",
            f"  in place   {_spread(size.aliased)}; all parameters on {in_place} of {ranks} ranks",
        ]
        if size.cross_node is not None:
            lines.append(f"  cross-node {format_bytes(size.cross_node)}, the least without forwarding inside a node")
        lines.append(
            f"  messages   {self.pairs:,} pairs of ranks, {self.rectangles:,} rectangles, {self.messages:,} contiguous "
            f"runs of at most {format_bytes(size.largest_message)}"
        )
        return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Return a size with three digits and a decimal unit: ``8.19 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def _spread(by_rank: Mapping[int, int]) -> str:
    if not by_rank:
        return "nothing"
    return f"{format_bytes(sum(by_rank.values()))} in all, at most {format_bytes(max(by_rank.values()))} a rank"


def lacked_elements(held: ShardLayout | None, wanted: ShardLayout) -> int:
    """Elements of ``wanted`` that a rank with ``held`` does not have."""
    have: dict[str, list[Rect]] = {}
    for block in held.blocks if held is not None else ():
        have.setdefault(block.tensor, []).append(block.source)
    lacked = 0
    for block in wanted.blocks:
        missing = [block.source]
        for rect in have.get(block.tensor, ()):
            missing = [part for whole in missing for part in _subtract(whole, rect)]
        lacked += sum(map(rect_size, missing))
    return lacked


def _subtract(whole: Rect, rect: Rect) -> Iterable[Rect]:
    """Cut what ``rect`` does not cover of ``whole`` into rectangles."""
    common = intersect(whole, rect)
    if common is None:
        yield whole
        return
    for dim, ((start, stop), (low, high)) in enumerate(zip(whole, common, strict=True)):
        for side in ((start, low), (high, stop)):
            if side[0] < side[1]:
                yield (*common[:dim], side, *whole[dim + 1 :])


def shared_params(held: ShardLayout | None, wanted: ShardLayout) -> dict[str, str]:
    """Parameter of ``wanted`` to the parameter of ``held`` that has the same shape, elements and places of them."""
    if held is None:
        return {}
    by_content = {content: name for name, content in reversed(_contents(held).items())}
    return {name: by_content[content] for name, content in _contents(wanted).items() if content in by_content}


_Content = tuple[Shape, frozenset[tuple[str, Rect, Rect]]]


def _contents(shard: ShardLayout) -> dict[str, _Content]:
    blocks: dict[str, list[Block]] = {name: [] for name, _ in shard.params}
    for block in shard.blocks:
        blocks[block.param].append(block)
    return {
        name: (shape, frozenset((block.tensor, block.source, block.dest) for block in blocks[name]))
        for name, shape in shard.params
    }


def contiguous_runs(src_rect: Rect, src_shape: Shape, dst_rect: Rect, dst_shape: Shape) -> int:
    """Count the runs of memory, contiguous in both parameters (row-major), that a copied rectangle consists of."""
    extents = [stop - start for start, stop in src_rect]
    runs = 1
    inner_is_whole = True
    for dim in reversed(range(len(extents))):
        if not inner_is_whole:
            runs *= extents[dim]
        inner_is_whole = inner_is_whole and extents[dim] == src_shape[dim] == dst_shape[dim]
    return runs
