"""Carry out plans between ranks: batched point-to-point through buckets that are kept from one run to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout.blocks import Rect, to_slices
from megatron_oreal.layout.plan import Plan
from megatron_oreal.layout.schedule import Message, make_schedule

DEFAULT_BUCKET_BYTES = 256 * 2**20
OWN_MESSAGE_BYTES = 2**18
"""From this size on a part travels alone: two more calls cost less than copying it into and out of a bucket."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on the wire that this rank sent, received and copied within itself; ``shared``: those already in place.

    ``staged``: of those sent and received, the bytes that went through a bucket instead of straight from or to a
    parameter.
    """

    sent: int
    received: int
    local: int
    shared: int = 0
    staged: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


class Resharder:
    """Executes one plan on one rank, again and again; made once, by every rank of the plan with the same options.

    ``rank`` is the global rank. Values cross in ``wire_dtype`` and are cast on arrival; rectangles that stay on a rank
    are rounded as if they had travelled. A rectangle that travels alone (from ``own_message_bytes`` on) and is
    contiguous, of that dtype and on the wire's device is sent from the parameter itself, or received into it. All
    others pass through two buckets to send and two to receive, of at most ``bucket_bytes`` each (at least an element
    for each peer), allocated by the first ``run`` and kept until ``release``, after which a ``run`` allocates them
    again. A context manager that releases them. ``share_buckets``: another one that never runs at the same time.

    The messages of a round are all posted before any is waited for, and both sides derive the rounds from the plan:
    there is no order in which ranks could wait for each other in a circle. On CUDA everything is queued on the current
    stream and the communicator's, and the host waits for neither. Without remote copies no process group is needed;
    ``group`` must have done a collective before (NCCL's condition).
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        group: dist.ProcessGroup | None = None,
        *,
        wire_dtype: torch.dtype,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        own_message_bytes: int = OWN_MESSAGE_BYTES,
        share_buckets: Resharder | None = None,
    ) -> None:
        size = wire_dtype.itemsize
        self.plan, self.rank, self.group, self.wire_dtype = plan, rank, group, wire_dtype
        self.schedule = make_schedule(plan, rank, bucket_bytes // size, max(1, own_message_bytes // size))
        self._buckets: dict[str, Tensor] = {} if share_buckets is None else share_buckets._buckets

    def __enter__(self) -> Resharder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the buckets' memory back to the allocator. Idempotent."""
        self._buckets.clear()

    @property
    def bucket_bytes_held(self) -> int:
        """Bytes of staging that are allocated now."""
        return sum(bucket.nbytes for bucket in self._buckets.values())

    @torch.no_grad()
    def run(self, src_tensors: Mapping[str, Tensor], dst_tensors: Mapping[str, Tensor]) -> Traffic:
        """Do this rank's part; ``src_tensors`` and ``dst_tensors`` are its shards (empty where it has none).

        A rectangle whose source and destination are the same memory is left as it is. Raises ``ValueError`` for a
        tensor that is missing or does not have the plan's shape, before anything is written or sent.
        """
        size, schedule = self.wire_dtype.itemsize, self.schedule
        device = self._wire_device(src_tensors, dst_tensors)
        rounds = [
            (self._bind(each.sends, src_tensors, device), self._bind(each.recvs, dst_tensors, device))
            for each in schedule.rounds
        ]
        copies = [
            (_view(src_tensors, copy.src_param, copy.src_rect), _view(dst_tensors, copy.dst_param, copy.dst_rect))
            for copy in schedule.local
        ]
        padding = [_view(dst_tensors, name, rect) for name, rect in self.plan.zeros.get(self.rank, ())]
        for view in padding:
            view.zero_()
        local, shared = self._copy(copies)
        staged = self._exchange(rounds, device)
        return Traffic(schedule.sent * size, schedule.received * size, local * size, shared * size, staged * size)

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
        """Copy within the rank; returns elements copied, and elements that were in place."""
        copied = shared = 0
        for source, dest in copies:
            if _same_memory(source, dest) and source.dtype == self.wire_dtype:
                shared += source.numel()
                continue
            dest.copy_(source.to(self.wire_dtype))
            copied += source.numel()
        return copied, shared

    def _exchange(self, rounds: list[tuple[list[_Bound], list[_Bound]]], device: torch.device) -> int:
        """Send and receive round by round, one in flight while the next is packed; returns the elements staged."""
        self._allocate(rounds, device)
        flying: list[dist.Work] = []
        landed: list[_Bound] = []
        for number, (sends, recvs) in enumerate(rounds):
            self._place(sends, f"send {number % 2}")
            self._place(recvs, f"recv {number % 2}")
            for each in sends:
                each.pack()
            ops = [dist.P2POp(dist.irecv, each.wire, each.peer, self.group) for each in recvs]
            ops += [dist.P2POp(dist.isend, each.wire, each.peer, self.group) for each in sends]
            posted = dist.batch_isend_irecv(ops) if ops else []
            _finish(flying, landed)
            flying, landed = posted, recvs
        _finish(flying, landed)
        return sum(each.staged for sides in rounds for side in sides for each in side)

    def _bind(
        self, messages: Mapping[int, list[Message]], tensors: Mapping[str, Tensor], device: torch.device
    ) -> list[_Bound]:
        bound = []
        for peer, queue in messages.items():
            for message in queue:
                views = [_view(tensors, part.param, part.rect) for part in message]
                alone = len(views) == 1 and views[0].is_contiguous()
                direct = alone and views[0].dtype == self.wire_dtype and views[0].device == device
                bound.append(_Bound(peer, views, views[0] if direct else None))
        return bound

    def _allocate(self, rounds: list[tuple[list[_Bound], list[_Bound]]], device: torch.device) -> None:
        for slot in range(2):
            for name, side in (("send", 0), ("recv", 1)):
                need = max((sum(each.staged for each in both[side]) for both in rounds[slot::2]), default=0)
                held = self._buckets.get(f"{name} {slot}")
                if held is None or held.numel() < need or held.device != device:
                    self._buckets[f"{name} {slot}"] = torch.empty(need, dtype=self.wire_dtype, device=device)

    def _place(self, messages: list[_Bound], bucket: str) -> None:
        """Give every message that cannot travel straight its stretch of the bucket."""
        begin = 0
        for each in messages:
            if each.staged:
                each.stage = self._buckets[bucket][begin : begin + each.staged]
                begin += each.staged

    def _wire_device(self, *sides: Mapping[str, Tensor]) -> torch.device:
        """Pick the device of the tensors, unless the group is gloo's, which sends from host memory."""
        host = torch.device("cpu")
        if not dist.is_initialized() or dist.get_backend(self.group) == "gloo":
            return host
        devices = (tensor.device for tensors in sides for tensor in tensors.values())
        return next((device for device in devices if device.type != "cpu"), host)


class _Bound:
    """A message on this end: the views of its parts, and the one of them or the stretch of a bucket that travels."""

    def __init__(self, peer: int, views: list[Tensor], direct: Tensor | None) -> None:
        self.peer, self.views, self.direct = peer, views, direct
        self.staged = 0 if direct is not None else sum(view.numel() for view in views)
        self.stage: Tensor | None = None

    @property
    def wire(self) -> Tensor:
        """What travels, as bytes, which every backend can send."""
        whole = self.direct if self.direct is not None else self.stage
        assert whole is not None
        return whole.detach().view(-1).view(torch.uint8)

    def pack(self) -> None:
        for view, stretch in self._stretches():
            stretch.copy_(view)

    def unpack(self) -> None:
        for view, stretch in self._stretches():
            view.copy_(stretch)

    def _stretches(self) -> Iterable[tuple[Tensor, Tensor]]:
        if self.stage is None:
            return
        begin = 0
        for view in self.views:
            yield view, self.stage[begin : begin + view.numel()].view(view.shape)
            begin += view.numel()


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
    """Do this rank's part of a plan once (``Resharder.run``); ``wire_dtype``: by default the one of all tensors."""
    dtype = wire_dtype or common_dtype([*src_tensors.values(), *dst_tensors.values()], f"{plan.label}: give wire_dtype")
    return Resharder(plan, rank, group, wire_dtype=dtype, bucket_bytes=bucket_bytes).run(src_tensors, dst_tensors)


def _finish(works: list[dist.Work], landed: list[_Bound]) -> None:
    for work in works:
        work.wait()
    for each in landed:
        each.unpack()


def _view(tensors: Mapping[str, Tensor], name: str, rect: Rect) -> Tensor:
    if name not in tensors:
        raise ValueError(f"parameter {name!r} of the plan is not among the tensors of this rank")
    shape = tuple(tensors[name].shape)
    if len(shape) != len(rect) or any(stop > size for (_, stop), size in zip(rect, shape, strict=True)):
        raise ValueError(f"parameter {name!r} has shape {shape}, the plan moves {rect} of it")
    return tensors[name][to_slices(rect)]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def common_dtype(tensors: Iterable[Tensor], mend: str) -> torch.dtype:
    """Return the dtype of all these tensors (float32 when there are none); ``ValueError`` with ``mend`` for several."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"tensors have several dtypes {sorted(map(str, dtypes))}: {mend}")
    return dtypes.pop() if dtypes else torch.float32
