"""The one place that knows whether this run stands on CUDA with NCCL or on a CPU with gloo."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_oreal.errors import UserError

MESSAGE_BYTES = 64 * 2**20
"""Of one message between hosts at most; larger arrays go in pieces."""

_DESCRIPTORS_A_RANK, _SPARE_DESCRIPTORS = 4, 512
"""gloo's groups have a socket a pair of members: the host group, and Megatron's of the data-parallel ranks."""

_joined: list[str] = []
"""Process groups that this process has joined, or meant to; the ranks of a launch join and leave them together."""
_DECIDED = "decided"
"""In the store of the ranks: empty when all have come, else why one of them does not."""
_REFUSAL_S, _HEARD_S = 10, 30.0
"""To reach that store with a refusal, and to stay for those who are still to read it: it may end with this node."""


@dataclass(frozen=True)
class Platform:
    """This process's place in the world.

    ``host_group``: a gloo group over all ranks for Python objects and CPU tensors, so that waiting for rollouts or a
    judge never happens inside a device collective.
    """

    device: torch.device
    rank: int
    world_size: int
    host_group: dist.ProcessGroup

    @property
    def is_cuda(self) -> bool:
        """True on CUDA with NCCL, False on a CPU with gloo."""
        return self.device.type == "cuda"

    def megatron(self) -> contextlib.AbstractContextManager[None]:
        """Scope in which Megatron-core may be called: nothing on a GPU, the CPU adaptation elsewhere."""
        if self.is_cuda:
            return contextlib.nullcontext()
        from megatron_oreal.platform.megatron_cpu import megatron_on_cpu

        return megatron_on_cpu()

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks that share a node, by torchrun's word; without it all of them."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def synchronize(self) -> None:
        """Wait for the device, so that a timer reads what it means."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def barrier(self) -> None:
        """Wait for all ranks on the host."""
        with self._waiting("all other ranks"):
            dist.barrier(group=self.host_group)

    def gather_objects(self, item: Any, what: str = "") -> list[Any]:
        """Every rank's ``item``, in rank order, on every rank. ``what`` is waited for, in errors."""
        gathered: list[Any] = [None] * self.world_size
        with self._waiting(what):
            dist.all_gather_object(gathered, item, group=self.host_group)
        return gathered

    def broadcast_object(self, item: Any, source: int = 0, what: str = "") -> Any:
        """``item`` of rank ``source`` on every rank. ``what`` is waited for, in errors."""
        box = [item]
        with self._waiting(what):
            dist.broadcast_object_list(box, src=source, group=self.host_group)
        return box[0]

    def broadcast_bytes(self, buffer: np.ndarray, source: int, what: str = "") -> None:
        """Fill ``buffer``, uint8 [n] with one n on all ranks, with that of rank ``source``."""
        if self.world_size == 1:
            return
        with self._waiting(what):
            for piece in _pieces(buffer):
                dist.broadcast(piece, src=source, group=self.host_group)

    def exchange(
        self, sends: Mapping[int, np.ndarray], receives: Mapping[int, int], what: str = ""
    ) -> dict[int, np.ndarray]:
        """Send arrays, uint8 [n], to some ranks, and receive ``receives[rank]`` bytes from others, all at once.

        Not a collective: it concerns those ranks alone, which must name the same sizes; nothing of size 0 is sent.
        """
        found = {rank: np.empty(size, dtype=np.uint8) for rank, size in receives.items()}
        with self._waiting(what):
            works = [
                transfer(piece, rank, self.host_group, tag)
                for transfer, arrays in ((dist.irecv, found), (dist.isend, sends))
                for rank, array in arrays.items()
                for tag, piece in enumerate(_pieces(array))
            ]
            for work in works:
                assert work is not None  # None: a rank outside of the group
                work.wait()
        return found

    def send_bytes(self, data: bytes, rank: int, what: str = "") -> None:
        """Send to ``rank``, whose ``receive_bytes`` need not know the size."""
        array = np.frombuffer(bytearray(data), dtype=np.uint8)
        self.exchange({rank: np.array([len(array)]).view(np.uint8)}, {}, what)
        self.exchange({rank: array}, {}, what)

    def receive_bytes(self, rank: int, what: str = "") -> bytes:
        """What ``rank`` sends with ``send_bytes``."""
        size = int(self.exchange({}, {rank: 8}, what)[rank].view(np.int64)[0])
        return self.exchange({}, {rank: size}, what)[rank].tobytes()

    def sum_array(self, array: np.ndarray, what: str = "") -> np.ndarray:
        """The sum over all ranks of an array of integers of one shape, the same on every rank, in place."""
        if self.world_size > 1:
            with self._waiting(what):
                dist.all_reduce(torch.from_numpy(array), group=self.host_group)
        return array

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's: a deadline has passed, or another rank has ended
            if not what:
                raise
            raise RuntimeError(f"rank {self.rank} waited for {what}: {error}") from error

    def fail_together(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on every rank; if any rank's raises ``UserError``, every rank raises the first one.

        Keeps a mistake that one rank sees (a file missing on one node) from leaving the others in a collective.
        """
        error: str | None = None
        result = None
        try:
            result = work()
        except UserError as caught:
            error = str(caught)
        errors = [e for e in self.gather_objects(error, "what all ranks say of the same check") if e is not None]
        if errors:
            raise UserError(errors[0])
        return result


def _pieces(array: np.ndarray) -> list[torch.Tensor]:
    """Views of at most ``MESSAGE_BYTES``."""
    return [torch.from_numpy(array[at : at + MESSAGE_BYTES]) for at in range(0, len(array), MESSAGE_BYTES)]


def choose_device(requested: Literal["auto", "cuda", "cpu"]) -> str:
    """``"cuda"`` or ``"cpu"``; raises ``UserError`` when CUDA is asked for and not there."""
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise UserError("device=cuda: torch sees no CUDA device; install a CUDA build of torch or set device=cpu")
    if requested == "cpu" and available:
        raise UserError(
            "device=cpu: torch sees a CUDA device here; start with CUDA_VISIBLE_DEVICES= (empty) in the environment"
        )
    return "cuda" if available else "cpu"


def init_distributed(
    requested: Literal["auto", "cuda", "cpu"], timeout_s: int, host_timeout_s: float | None = None
) -> Platform:
    """Join the process group that torchrun describes (alone: a world of one) and choose this rank's device.

    ``timeout_s``: of collectives; ``host_timeout_s``: of those of ``host_group``, by default the same. Raises
    ``UserError`` when a rank does not come: it has refused (``refuse_to_join``), or ``timeout_s`` is over.
    """
    kind = choose_device(requested)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    timeout = datetime.timedelta(seconds=timeout_s)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; start fewer "
                "ranks a node"
            )
        torch.cuda.set_device(local_rank)
    allow_connections(int(os.environ.get("WORLD_SIZE", "1")))
    if not dist.is_initialized():
        store, rank, world_size = _rendezvous(timeout)
        _meet(store, world_size, timeout_s)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    if kind == "cuda" or host_timeout_s is not None:
        host_timeout = datetime.timedelta(seconds=host_timeout_s or timeout_s)
        host_group = dist.new_group(backend="gloo", timeout=host_timeout)
    else:
        host_group = dist.group.WORLD
    assert host_group is not None
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    return Platform(device=device, rank=dist.get_rank(), world_size=dist.get_world_size(), host_group=host_group)


def _rendezvous(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """A store that all ranks share, this rank, and the ranks in all.

    torchrun's store lives as long as the launch. Each group of a process has keys of its own there: under those of the
    group before, its addresses still stand.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    _joined.append(f"group{len(_joined)}")
    return dist.PrefixStore(_joined[-1], store), rank, world_size


def _meet(store: dist.Store, world_size: int, timeout_s: int) -> None:
    """Wait until all ranks have come to the store. ``UserError`` when one says that it does not, or too late."""
    try:
        if store.add("here", 1) == world_size:
            store.set(_DECIDED, "")
        try:
            store.wait([_DECIDED])
        except dist.DistStoreError:
            here = store.add("here", 0)
            raise UserError(
                f"parallel.distributed_timeout_s={timeout_s}: {here} of {world_size} ranks have come by then: see the "
                "output of the others"
            ) from None
        refusal = store.get(_DECIDED).decode()
    except dist.DistNetworkError as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the node that keeps the ranks' store has ended ({said}): see its output") from None
    if refusal:
        raise UserError(refusal)


def refuse_to_join(reason: str) -> None:
    """Tell the ranks of other nodes, which wait in ``init_distributed``, that this one never comes, and why.

    For a mistake that is found before. Returns when all have come, or after 30 s. Nothing happens when there are no
    others, when this rank has joined them already, or when they cannot be reached within 10 s.
    """
    world, node = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "RANK" not in os.environ or world <= node or _joined:
        return
    with contextlib.suppress(RuntimeError, ValueError):  # no way to them
        store, rank, _ = _rendezvous(datetime.timedelta(seconds=_REFUSAL_S))
        store.set(_DECIDED, f"rank {rank} ({socket.gethostname()}): {reason}")
        end, refused = time.monotonic() + _HEARD_S, store.add("refused", 1)
        while refused + store.add("here", 0) < world and time.monotonic() < end:
            time.sleep(0.2)
            refused = store.add("refused", 0)


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files as far as groups of so many ranks need it, or as it may be.

    Raises ``UserError`` when not even one group fits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted, least = _DESCRIPTORS_A_RANK * world_size + _SPARE_DESCRIPTORS, world_size + _SPARE_DESCRIPTORS // 2
    if soft != unlimited and soft < wanted:
        soft = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < least:
        raise UserError(
            f"ulimit -Hn is {hard}: each of {world_size} ranks needs at least {least} open files to be connected with "
            "all others; raise it (limits.conf, LimitNOFILE, or the container's --ulimit nofile)"
        )


def shutdown_distributed() -> None:
    """Leave the process group, when there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
