"""A rank's part of a plan cut into messages: pure data, and the same cuts on both ends of every message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_oreal.layout.blocks import Rect, Shape, rect_size, shift
from megatron_oreal.layout.plan import Copy, Plan


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of one parameter in a message."""

    param: str
    rect: Rect


Message = list[Part]
"""What one send carries: parts one after the other, each in row-major order."""


@dataclass(slots=True)
class Round:
    """The messages to and from each peer that are in flight at one time, in the order in which they are posted."""

    sends: dict[int, list[Message]] = field(default_factory=dict)
    recvs: dict[int, list[Message]] = field(default_factory=dict)


@dataclass(slots=True)
class Schedule:
    """``local``: copies within the rank. Counts are in elements."""

    local: list[Copy] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    sent: int = 0
    received: int = 0


@dataclass(slots=True)
class _Cursor:
    """Where the next part between two ranks goes."""

    number: int = 0
    used: int = 0
    small: Message | None = None


@lru_cache(maxsize=8)
def make_schedule(plan: Plan, rank: int, bucket_elements: int, own_message_elements: int) -> Schedule:
    """Cut a rank's copies into rounds of at most ``bucket_elements`` to send and as many to receive.

    Both ends of a pair cut alike, because the cuts depend on the plan and the two limits alone. A part of at least
    ``own_message_elements`` is a message of its own, which either end may then send from, or receive into, the
    parameter itself; smaller ones of a round share a message.
    """
    limit = max(1, bucket_elements // max(1, plan.max_peers))
    schedule = Schedule()
    cursors: dict[tuple[int, int], _Cursor] = {}
    for copy in plan.copies(rank):
        if copy.src_rank == copy.dst_rank:
            schedule.local.append(copy)
            continue
        cursor = cursors.setdefault((copy.src_rank, copy.dst_rank), _Cursor())
        outgoing = copy.src_rank == rank
        param, rect = (copy.src_param, copy.src_rect) if outgoing else (copy.dst_param, copy.dst_rect)
        for piece in split_rect(tuple(stop - start for start, stop in rect), limit):
            size = rect_size(piece)
            if cursor.used + size > limit:
                cursor.number, cursor.used, cursor.small = cursor.number + 1, 0, None
            cursor.used += size
            while len(schedule.rounds) <= cursor.number:
                schedule.rounds.append(Round())
            current = schedule.rounds[cursor.number]
            messages = (
                current.sends.setdefault(copy.dst_rank, []) if outgoing else current.recvs.setdefault(copy.src_rank, [])
            )
            part = Part(param, shift(piece, (start for start, _ in rect)))
            if size >= own_message_elements:
                messages.append([part])
            elif cursor.small is None:
                cursor.small = [part]
                messages.append(cursor.small)
            else:
                cursor.small.append(part)
            if outgoing:
                schedule.sent += size
            else:
                schedule.received += size
    return schedule


def split_rect(shape: Shape, limit: int) -> Iterator[Rect]:
    """Cut a tensor of ``shape`` into rectangles of at most ``limit`` elements, in row-major order."""
    inner = math.prod(shape[1:])
    step = max(1, limit // inner)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        if len(shape) == 1 or (stop - start) * inner <= limit:
            yield ((start, stop), *((0, size) for size in shape[1:]))
        else:
            for rest in split_rect(shape[1:], limit):
                yield ((start, stop), *rest)
