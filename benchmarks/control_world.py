"""A world of thousands of ranks in one process, for what is not computation: messages, bytes and CPU time on the host.

A rank is a thread that runs the product's own code on a ``Platform`` whose messages stay in memory and are counted as
gloo would send them: binomial trees for broadcasts, rings for gathers to all and for sums (facebookincubator/gloo,
``broadcast.cc``, ``allgather.cc``, ``allreduce.cc``), as torch's object collectives use them (a first one for the
sizes; a gather to all pads every part to the longest). What is pickled there is pickled and unpickled here: CPU time is
that of the real exchange, without sockets. Of a large world only some ranks live; ``ghost`` says what the others give
to a gather, and their broadcasts are zeros.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_oreal.platform import Platform
from megatron_oreal.platform.device import MESSAGE_BYTES

T = TypeVar("T")
DEADLINE_S = 900.0
_SIZES = 8
"""Bytes of the number that torch sends before an object."""


@dataclass(slots=True)
class Traffic:
    """Of one rank: bytes and messages, in and out; ``cpu_s``: its thread's, without waiting for others."""

    bytes_in: int = 0
    bytes_out: int = 0
    messages_in: int = 0
    messages_out: int = 0
    cpu_s: float = 0.0

    def add(self, bytes_in: int, bytes_out: int, messages_in: int, messages_out: int) -> None:
        """Count a transfer."""
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        self.messages_in += messages_in
        self.messages_out += messages_out


class World:
    """``size`` ranks, of which ``alive`` (None: all) do something in ``run``, each with its ``Member``.

    ``ghost(what, rank)``: the item that a rank which does not live gives to the gather of this name.
    """

    def __init__(self, size: int, alive: Collection[int] | None = None, ghost: Callable[[str, int], Any] | None = None):
        self.size, self.alive = size, sorted(range(size) if alive is None else set(alive))
        self.barrier = threading.Barrier(len(self.alive))
        self.items: dict[int, Any] = {}
        self._ghost, self._ghosts = ghost, sorted(set(range(size)) - set(self.alive))
        self._blobs: dict[str, list[tuple[int, bytes]]] = {}
        self.total = np.zeros(0)
        self.mail: dict[tuple[int, int], list[np.ndarray]] = {}
        self.changed = threading.Condition()

    def run(self, work: Callable[[Member], T]) -> list[T]:
        """``work`` of every rank that lives, in rank order; the first error of any of them is raised."""
        found: dict[int, Any] = {}
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                found[rank] = work(Member(torch.device("cpu"), rank, self.size, None, self))  # type: ignore[arg-type]
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        before = threading.stack_size(512 * 1024)
        try:
            threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in self.alive]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            threading.stack_size(before)
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [found[rank] for rank in self.alive]

    def ghosts(self, what: str) -> list[tuple[int, bytes]]:
        """What all that do not live give to a gather; pickled once."""
        if what not in self._blobs:
            assert self._ghost is not None or not self._ghosts
            self._blobs[what] = [(rank, pickle.dumps(self._ghost(what, rank))) for rank in self._ghosts]  # type: ignore[misc]
        return self._blobs[what]


@dataclass(frozen=True)
class Member(Platform):
    """One rank's place in a ``World``. ``pieces``: what each named piece of work has cost it."""

    host_group: dist.ProcessGroup | None  # type: ignore[assignment]
    world: World
    pieces: dict[str, Traffic] = field(default_factory=dict)
    _now: list[Traffic] = field(default_factory=lambda: [Traffic()])
    _waited: list[float] = field(default_factory=lambda: [0.0])

    @contextlib.contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Count what happens here under a name."""
        traffic = self.pieces.setdefault(name, Traffic())
        self._now[0] = traffic
        waited, began = self._waited[0], time.thread_time()
        try:
            yield
        finally:
            traffic.cpu_s += time.thread_time() - began - (self._waited[0] - waited)
            self._now[0] = Traffic()

    def barrier(self) -> None:
        """A dissemination barrier."""
        steps = math.ceil(math.log2(self.world_size)) if self.world_size > 1 else 0
        self._now[0].add(0, 0, steps, steps)
        self._wait()

    def gather_objects(self, item: Any, what: str = "") -> list[Any]:
        """A ring of the sizes, then one of the parts, each as long as the longest."""
        self.world.items[self.rank] = pickle.dumps(item)
        if self.rank == self.world.alive[0]:
            self._unpaid(lambda: self.world.ghosts(what))
        self._wait()
        blobs = dict(self.world.ghosts(what)) | self.world.items
        others = self.world_size - 1
        for size in (_SIZES, max(map(len, blobs.values()))):
            self._now[0].add(others * size, others * size, 2 * others, 2 * others)
        found = [pickle.loads(blobs[rank]) for rank in range(self.world_size)]
        self._wait()
        return found

    def broadcast_object(self, item: Any, source: int = 0, what: str = "") -> Any:
        """A tree for the size, and one for the object."""
        if self.rank == source:
            self.world.items[source] = pickle.dumps(item)
        self._wait()
        blob = self.world.items[source]
        self._count_tree(_SIZES, source)
        self._count_tree(len(blob), source)
        found = item if self.rank == source else pickle.loads(blob)
        self._wait()
        return found

    def broadcast_bytes(self, buffer: np.ndarray, source: int, what: str = "") -> None:
        """A tree for each piece."""
        lives = source in self.world.alive
        if self.rank == source:
            self.world.items[source] = buffer
        if lives:
            self._wait()
        for at in range(0, len(buffer), MESSAGE_BYTES):
            self._count_tree(len(buffer[at : at + MESSAGE_BYTES]), source)
        if self.rank != source:
            buffer[:] = self.world.items[source] if lives else 0
        if lives:
            self._wait()

    def exchange(
        self, sends: Mapping[int, np.ndarray], receives: Mapping[int, int], what: str = ""
    ) -> dict[int, np.ndarray]:
        """From rank to rank."""
        world, found = self.world, {}
        with world.changed:
            for rank, array in sends.items():
                if len(array):
                    self._now[0].add(0, len(array), 0, -(-len(array) // MESSAGE_BYTES))
                    if rank in world.alive:
                        world.mail.setdefault((self.rank, rank), []).append(array)
            world.changed.notify_all()
        for rank, size in receives.items():
            found[rank] = np.empty(size, dtype=np.uint8)
            if size:
                array = self._collect(rank)
                assert len(array) == size, f"rank {self.rank} waits for {size} bytes of {rank}, which sent {len(array)}"
                found[rank][:] = array
                self._now[0].add(size, 0, -(-size // MESSAGE_BYTES), 0)
        return found

    def sum_array(self, array: np.ndarray, what: str = "") -> np.ndarray:
        """Two rings over parts of the array; the sum itself is no rank's time: gloo's ranks share it."""
        self.world.items[self.rank] = array
        if self.rank == self.world.alive[0]:
            self.world.total = np.zeros_like(array)
        self._wait()
        if self.rank == self.world.alive[0]:
            self._unpaid(lambda: np.sum(list(self.world.items.values()), axis=0, out=self.world.total))
        self._wait()
        array[:] = self.world.total
        others = self.world_size - 1
        moved = 2 * array.nbytes * others // self.world_size
        self._now[0].add(moved, moved, 4 * others, 4 * others)
        self._wait()
        return array

    def _unpaid(self, work: Callable[[], Any]) -> None:
        """Do something that is not this rank's in truth."""
        began = time.thread_time()
        work()
        self._waited[0] += time.thread_time() - began

    def _collect(self, source: int) -> np.ndarray:
        began = time.thread_time()
        key = (source, self.rank)
        with self.world.changed:
            there = self.world.changed.wait_for(lambda: self.world.mail.get(key), DEADLINE_S)
            assert there, f"rank {self.rank} waited for rank {source} in vain"
            array = self.world.mail[key].pop(0)
        self._waited[0] += time.thread_time() - began
        return array

    def _count_tree(self, size: int, source: int) -> None:
        """What this rank does in gloo's binomial tree: vrank's lowest zeros are the children."""
        children = num_children((self.rank - source) % self.world_size, self.world_size)
        parents = int(self.rank != source)
        self._now[0].add(parents * size, children * size, parents, children)

    def _wait(self) -> None:
        self._unpaid(lambda: self.world.barrier.wait(DEADLINE_S))


def num_children(position: int, size: int) -> int:
    """To how many ranks one passes a broadcast on; the source is at ``position`` 0."""
    first = position.bit_length()  # it has heard before the step of this bit
    return sum(position + (1 << bit) < size for bit in range(first, (size - 1).bit_length()))
