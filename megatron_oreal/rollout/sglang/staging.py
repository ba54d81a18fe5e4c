"""Memory that trainer and engine share: a shard of weights in the engine's layout, and the engine's answers.

In host memory it is anonymous and shared (``memfd``); engine workers open it through ``/proc/PID/fd``: it has no name
that could be left behind, and is gone when the last process that maps it ends. On a GPU it is device memory that the
workers map by CUDA IPC; it must come from ordinary segments, not from an allocator with expandable ones, and stays
allocated until the workers have let it go.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import itertools
import json
import math
import mmap
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.layout import Layout

_ALIGNMENT = 256


class HostSegment:
    """``nbytes`` of shared host memory; ``tensor`` is uint8 [nbytes]. The owner's end, or an opened one."""

    def __init__(self, fd: int, nbytes: int):
        self.fd, self._id = fd, uuid.uuid4().hex
        self.tensor = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
        self._is_pinned = False

    @classmethod
    def create(cls, nbytes: int, name: str) -> HostSegment:
        """Make one; ``name`` shows in /proc/PID/maps."""
        fd = os.memfd_create(f"megatron_oreal-{name}")
        try:
            os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, description: Mapping[str, Any]) -> HostSegment:
        """Map what another process has described."""
        return cls(os.open(description["path"], os.O_RDWR), description["nbytes"])

    def describe(self) -> dict[str, Any]:
        """How another process of this user and node opens it."""
        path = f"/proc/{os.getpid()}/fd/{self.fd}"  # may name another segment later, hence the id
        return {"kind": "host", "id": self._id, "path": path, "nbytes": len(self.tensor)}

    def pin(self) -> None:
        """Lock the pages for this process's CUDA device, whose copies are then many times faster, and asynchronous."""
        code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
        torch.cuda.check_error(code)
        self._is_pinned = True

    def close(self) -> None:
        """Let go; the memory is freed when the last tensor on it and the last process are gone. Idempotent."""
        if self._is_pinned:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._is_pinned = False
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.tensor = torch.empty(0, dtype=torch.uint8)  # it alone holds the map, which has a descriptor of its own


class CudaSegment:
    """The same in device memory."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._handle: list[Any] | None = None
        self._count: tuple[bytes, int] | None = None

    @classmethod
    def create(cls, nbytes: int, device: torch.device) -> CudaSegment:
        """Allocate on ``device``."""
        return cls(torch.empty(nbytes, dtype=torch.uint8, device=device))

    @classmethod
    def open(cls, description: Mapping[str, Any]) -> CudaSegment:
        """Map it on the current device, which must be the same one."""
        handle = [base64.b64decode(x["b64"]) if isinstance(x, dict) else x for x in description["handle"]]
        handle[0] = torch.cuda.current_device()
        storage = torch.UntypedStorage._new_shared_cuda(*handle)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return cls(whole.set_(storage, 0, (description["nbytes"],), (1,)))

    def describe(self) -> dict[str, Any]:
        """The CUDA IPC handle, as JSON. The writes that precede are complete when this returns."""
        torch.cuda.synchronize(self.tensor.device)
        if self._handle is None:  # one handle for good: a worker maps it once
            parts = self.tensor.untyped_storage()._share_cuda_()
            self._count = parts[4], parts[5]
            self._handle = [{"b64": base64.b64encode(x).decode()} if isinstance(x, bytes) else x for x in parts]
        return {"kind": "cuda", "handle": self._handle, "nbytes": self.tensor.numel()}

    def close(self) -> None:
        """Free the memory; no engine worker may map it any more. Idempotent."""
        if self._count is not None:
            # PyTorch keeps what it has shared until the receiver counts it back; one that was killed never does.
            torch.UntypedStorage._release_ipc_counter_cuda(*self._count)
            self._count = None
        self.tensor = torch.empty(0, dtype=torch.uint8)


Segment = HostSegment | CudaSegment


def open_segment(description: Mapping[str, Any]) -> Segment:
    """Map a described segment in an engine worker."""
    kind = HostSegment if description["kind"] == "host" else CudaSegment
    return kind.open(description)


def views(segment: Tensor, offsets: Mapping[str, tuple[int, list[int]]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand in a segment: name -> (offset in bytes, shape)."""
    found = {}
    for name, (offset, shape) in offsets.items():
        nbytes = math.prod(shape) * dtype.itemsize
        found[name] = segment[offset : offset + nbytes].view(dtype).view(list(shape))
    return found


def create_segment(nbytes: int, device: torch.device, name: str) -> Segment:
    """Allocate on a device, or in shared host memory."""
    return CudaSegment.create(nbytes, device) if device.type == "cuda" else HostSegment.create(nbytes, name)


def padded_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a segment."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def weight_groups(layout: Layout, dtype: torch.dtype, limit: int) -> list[frozenset[str]]:
    """Partition an engine's parameters into groups of at most ``limit`` bytes on a rank, or of one parameter.

    Greatest first, each into the group that has least: equal parameters of successive layers go to different groups, so
    that a group has layers of all the trainer's pipeline stages, and all of them send at the same time.
    """
    sizes: dict[str, int] = {}
    for shard in layout.shards:
        for name, shape in shard.params:
            sizes[name] = max(sizes.get(name, 0), padded_bytes(shape, dtype))
    limit = max(limit, *sizes.values())
    order = sorted(sizes, key=lambda name: -sizes[name])
    for count in itertools.count(-(-sum(sizes.values()) // limit)):
        groups: list[list[str]] = [[] for _ in range(count)]
        heap = [(0, number) for number in range(count)]
        for name in order:
            held, number = heap[0]
            heapq.heapreplace(heap, (held + sizes[name], number))
            groups[number].append(name)
        if max(held for held, _ in heap) <= limit:
            return [frozenset(group) for group in groups]
    raise AssertionError("as many groups as parameters do")


class ShardStaging:
    """Weights of one engine rank, by SGLang's parameter names, where the trainer writes them and the engine reads them.

    ``shapes``: parameters of ``sglang_layout(spec, tp=...).shards[tp_rank]``, all or some; they stand one after the
    other in ``segment``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, segment: Segment):
        self.dtype, self.segment = dtype, segment
        self.offsets: dict[str, tuple[int, list[int]]] = {}
        end = 0
        for param, shape in shapes.items():
            self.offsets[param] = (end, list(shape))
            end += padded_bytes(shape, dtype)
        self.tensors = views(self.segment.tensor, self.offsets, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        return self.segment.tensor.numel()

    def describe(self) -> dict[str, Any]:
        """JSON for the engine's worker."""
        return {"segment": self.segment.describe(), "offsets": self.offsets, "dtype": str(self.dtype).split(".")[1]}

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self.tensors = {}
        self.segment.close()


class Mailbox:
    """Where one engine worker puts its answer: a ``memfd`` with one JSON value."""

    def __init__(self, name: str):
        self._fd = os.memfd_create(f"megatron_oreal-{name}")

    @property
    def path(self) -> str:
        """What the worker opens."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def clear(self) -> None:
        """Forget the last answer."""
        os.ftruncate(self._fd, 0)

    def read(self) -> dict[str, Any] | None:
        """The answer, None when there is none, or none that is whole."""
        content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        with contextlib.suppress(ValueError):
            answer = json.loads(content)
            return answer if isinstance(answer, dict) else None
        return None

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def answer(path: str, value: Mapping[str, Any]) -> None:
    """Put an answer into the mailbox at ``path``."""
    with open(path, "wb") as file:
        file.write(json.dumps(value).encode())
