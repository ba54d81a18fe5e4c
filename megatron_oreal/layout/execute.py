"""Carry out what layouts and plans say: read a rank's own bytes from a checkpoint, move rectangles between ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout.blocks import Rect, Shape, ShardLayout, rect_size, shift, to_slices
from megatron_oreal.layout.hf import SafetensorsSource
from megatron_oreal.layout.plan import Copy, Plan

DEFAULT_BUCKET_BYTES = 256 * 2**20


@torch.no_grad()
def load_from_hf(
    source: SafetensorsSource,
    shard: ShardLayout,
    tensors: Mapping[str, Tensor],
    *,
    missing_ok: Collection[str] = frozenset(),
) -> None:
    """Fill a rank's live parameters in place, reading only the rectangles that the rank holds.

    ``tensors``: every parameter of ``shard`` by its key, any device and float dtype (values are cast). Padding gets
    zeros, and so does what would come from an HF tensor of ``missing_ok`` that the checkpoint does not have
    (``score.weight`` when a reward model starts from a policy). Nothing is written before all were found to fit.

    Raises ``UserError`` naming the file and the tensor when the checkpoint does not fit the shard, ``ValueError`` when
    ``tensors`` does not.
    """
    shard.check_tensors(tensors, "load")
    absent = {name for name, _ in shard.tensors if name in missing_ok and name not in source}
    for name, shape in shard.tensors:
        if name not in absent:
            source.check(name, shape)
    for block in shard.blocks:
        target = tensors[block.param][to_slices(block.dest)]
        if block.tensor in absent:
            target.zero_()
        else:
            target.copy_(source.read(block.tensor, block.source))
    _zero(tensors, shard.padding)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that this rank sent, received and copied within itself."""

    sent: int
    received: int
    local: int


@torch.no_grad()
def execute_plan(
    plan: Plan,
    src_tensors: Mapping[str, Tensor],
    dst_tensors: Mapping[str, Tensor],
    rank: int,
    group: dist.ProcessGroup | None = None,
    *,
    wire_dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Traffic:
    """Do this rank's part of a plan; every rank of the plan must call it with the same plan and options.

    ``rank`` is the global rank; ``src_tensors`` and ``dst_tensors`` are its shards of both layouts (empty where it has
    none). Values cross in ``wire_dtype`` and are cast on arrival; by default the one dtype that all tensors have.
    Staging takes at most ``4 * bucket_bytes`` (two buckets to send, two to receive); a bucket holds at least an
    element for each peer. Without remote copies no process group is needed; ``group`` must have done a collective
    before (NCCL's condition).

    The messages of a round are all posted before any is waited for, and both sides derive the rounds from the plan:
    there is no order in which ranks could wait for each other in a circle.
    """
    dtype = wire_dtype or _common_dtype(plan, src_tensors, dst_tensors, rank)
    schedule = _schedule(plan, rank, bucket_bytes // dtype.itemsize)
    _zero(dst_tensors, plan.zeros.get(rank, ()))
    for copy in schedule.local:
        value = _view(src_tensors, copy.src_param, copy.src_rect)
        _view(dst_tensors, copy.dst_param, copy.dst_rect).copy_(value.to(dtype))  # rounded as if it had travelled
    staging = _Staging(schedule, dtype, _staging_device(src_tensors, dst_tensors, group))
    flying: list[dist.Work] = []
    for number, current in enumerate(schedule.rounds):
        ops = staging.pack(number, current, src_tensors, group)
        posted = dist.batch_isend_irecv(ops) if ops else []
        if number:
            _wait(flying)
            staging.unpack(number - 1, schedule.rounds[number - 1], dst_tensors)
        flying = posted
    _wait(flying)
    if schedule.rounds:
        staging.unpack(len(schedule.rounds) - 1, schedule.rounds[-1], dst_tensors)
    size = dtype.itemsize
    return Traffic(schedule.sent * size, schedule.received * size, schedule.local_elements * size)


@dataclass(frozen=True, slots=True)
class _Part:
    """A rectangle of one parameter in a message."""

    param: str
    rect: Rect


@dataclass(slots=True)
class _Round:
    """One message to and from each peer, as the parts in the order in which they are packed."""

    sends: dict[int, list[_Part]] = field(default_factory=dict)
    recvs: dict[int, list[_Part]] = field(default_factory=dict)


@dataclass(slots=True)
class _Schedule:
    local: list[Copy] = field(default_factory=list)
    rounds: list[_Round] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    local_elements: int = 0


@lru_cache(maxsize=8)
def _schedule(plan: Plan, rank: int, bucket_elements: int) -> _Schedule:
    """Cut a rank's copies into messages. Both ends of a pair cut alike: the limit depends on the plan alone."""
    limit = max(1, bucket_elements // max(1, plan.max_peers))
    schedule = _Schedule()
    place: dict[tuple[int, int], tuple[int, int]] = {}
    for copy in plan.copies(rank):
        if copy.src_rank == copy.dst_rank:
            schedule.local.append(copy)
            schedule.local_elements += rect_size(copy.src_rect)
            continue
        pair = copy.src_rank, copy.dst_rank
        for part in split_rect(tuple(stop - start for start, stop in copy.src_rect), limit):
            size = rect_size(part)
            number, used = place.get(pair, (0, 0))
            if used + size > limit:
                number, used = number + 1, 0
            place[pair] = number, used + size
            while len(schedule.rounds) <= number:
                schedule.rounds.append(_Round())
            current = schedule.rounds[number]
            if copy.src_rank == rank:
                rect = shift(part, (start for start, _ in copy.src_rect))
                current.sends.setdefault(copy.dst_rank, []).append(_Part(copy.src_param, rect))
                schedule.sent += size
            else:
                rect = shift(part, (start for start, _ in copy.dst_rect))
                current.recvs.setdefault(copy.src_rank, []).append(_Part(copy.dst_param, rect))
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


class _Staging:
    """Two send and two receive buffers, used in turn, so that a round is packed while the one before is on the wire."""

    def __init__(self, schedule: _Schedule, dtype: torch.dtype, device: torch.device) -> None:
        sends = max((_elements(each.sends) for each in schedule.rounds), default=0)
        recvs = max((_elements(each.recvs) for each in schedule.rounds), default=0)
        count = min(2, len(schedule.rounds))
        self._send = [torch.empty(sends, dtype=dtype, device=device) for _ in range(count)]
        self._recv = [torch.empty(recvs, dtype=dtype, device=device) for _ in range(count)]

    def pack(
        self, number: int, current: _Round, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
    ) -> list[dist.P2POp]:
        """Fill the send buffer of round ``number``; messages travel as bytes, which every backend can."""
        ops = []
        for peer, message, _ in _messages(self._recv[number % 2], current.recvs):
            ops.append(dist.P2POp(dist.irecv, message.view(torch.uint8), peer, group))
        for peer, message, views in _messages(self._send[number % 2], current.sends):
            for part, view in views:
                view.copy_(_view(tensors, part.param, part.rect))
            ops.append(dist.P2POp(dist.isend, message.view(torch.uint8), peer, group))
        return ops

    def unpack(self, number: int, current: _Round, tensors: Mapping[str, Tensor]) -> None:
        """Scatter what round ``number`` received."""
        for _, _, views in _messages(self._recv[number % 2], current.recvs):
            for part, view in views:
                _view(tensors, part.param, part.rect).copy_(view)


def _elements(messages: Mapping[int, list[_Part]]) -> int:
    return sum(rect_size(part.rect) for parts in messages.values() for part in parts)


def _messages(
    buffer: Tensor, messages: Mapping[int, list[_Part]]
) -> Iterator[tuple[int, Tensor, list[tuple[_Part, Tensor]]]]:
    """Each peer's stretch of the buffer, and in it each part in its own shape."""
    end = 0
    for peer, parts in messages.items():
        begin = end
        views = []
        for part in parts:
            size = rect_size(part.rect)
            views.append((part, buffer[end : end + size].view([stop - start for start, stop in part.rect])))
            end += size
        yield peer, buffer[begin:end], views


def _view(tensors: Mapping[str, Tensor], name: str, rect: Rect) -> Tensor:
    if name not in tensors:
        raise ValueError(f"parameter {name!r} of the plan is not among the tensors of this rank")
    shape = tuple(tensors[name].shape)
    if len(shape) != len(rect) or any(stop > size for (_, stop), size in zip(rect, shape, strict=True)):
        raise ValueError(f"parameter {name!r} has shape {shape}, the plan moves {rect} of it")
    return tensors[name][to_slices(rect)]


def _zero(tensors: Mapping[str, Tensor], rects: tuple[tuple[str, Rect], ...]) -> None:
    for name, rect in rects:
        _view(tensors, name, rect).zero_()


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _common_dtype(plan: Plan, src: Mapping[str, Tensor], dst: Mapping[str, Tensor], rank: int) -> torch.dtype:
    dtypes = {tensor.dtype for tensors in (src, dst) for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"{plan.label}: tensors of rank {rank} have several dtypes {sorted(map(str, dtypes))}: give wire_dtype"
        )
    return dtypes.pop() if dtypes else torch.float32


def _staging_device(
    src: Mapping[str, Tensor], dst: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> torch.device:
    """Pick the device of the tensors, unless the group is gloo's, which sends from host memory."""
    host = torch.device("cpu")
    if not dist.is_initialized() or dist.get_backend(group) == "gloo":
        return host
    devices = (tensor.device for tensors in (src, dst) for tensor in tensors.values())
    return next((device for device in devices if device.type != "cpu"), host)
