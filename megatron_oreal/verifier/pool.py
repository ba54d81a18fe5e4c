"""Verifies responses in worker processes, each item under a hard deadline and each worker under a memory limit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_oreal.errors import UserError
from megatron_oreal.verifier import worker as worker_module
from megatron_oreal.verifier.verdict import Judgement, Verdict

if TYPE_CHECKING:
    from megatron_oreal.config import VerifierConfig

RULES = "megatron_oreal.verifier.rules:judge_response"
MAX_BATCH_ITEMS = 16
MAX_BATCH_CHARS = 500_000
MAX_FAILED_STARTS = 3
_GRACE_S = 0.75
"""Beyond an item's deadline, for the worker's own timer: no worker outlives a deadline by a second."""
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class VerifyItem:
    """One response to verify; ``key`` identifies it and is unique among the items in flight."""

    key: Hashable
    text: str
    gold: str
    stopped: bool = True
    question: str = ""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    stderr: IO[bytes]
    since: float
    ready: bool = False
    overdue: bool = False
    items: deque[worker_module.Item] = field(default_factory=deque)


class VerifierPool:
    """Worker processes that judge responses; use from one thread at a time, best as a context manager.

    Results come in the order in which they are ready. An item past ``deadline_s`` seconds, or one whose worker dies,
    becomes ``UNKNOWN``; it is never tried again, its worker is replaced and the items behind it go to others. The pool
    starts no thread, installs no signal handler, and works only inside its methods; workers run on between them.

    ``memory_limit_mb`` bounds the address space of a worker. ``checker`` is a ``module:function`` that a worker
    imports; ``worker.Checker`` says how it is called. ``UserError`` from any method when the workers cannot load it.
    """

    def __init__(
        self,
        num_processes: int,
        deadline_s: float,
        thinking_finish_words: Sequence[str] = (),
        *,
        stop_words: Sequence[str] = (),
        memory_limit_mb: int = 1024,
        checker: str = RULES,
    ) -> None:
        if num_processes < 1 or deadline_s <= 0:
            raise ValueError(f"num_processes={num_processes} and deadline_s={deadline_s} must be positive")
        self.deadline_s = deadline_s
        self._checker = checker
        self._arguments = ["--deadline-s", str(deadline_s), "--memory-mb", str(memory_limit_mb), "--checker", checker]
        self._arguments += [f"--finish-word={word}" for word in thinking_finish_words]
        self._arguments += [f"--stop-word={word}" for word in stop_words]
        self._keys: dict[int, Hashable] = {}
        self._in_flight: set[Hashable] = set()
        self._waiting: deque[worker_module.Item] = deque()
        self._done: deque[tuple[Hashable, Judgement]] = deque()
        self._next_number = 0
        self._failed_starts = 0
        self._closed = False
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_processes):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, config: VerifierConfig, stop_words: Sequence[str] = ()) -> VerifierPool:
        """Start the pool that a ``verifier`` section of the config describes."""
        return cls(
            config.num_processes,
            config.deadline_s,
            config.thinking_finish_words,
            stop_words=stop_words,
            memory_limit_mb=config.memory_limit_mb,
            checker=config.checker,
        )

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of items submitted and not yet handed back."""
        return len(self._in_flight)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are alive now."""
        return [worker.process.pid for worker in self._workers]

    def wait_until_ready(self) -> None:
        """Wait until a worker has loaded the checker. ``UserError`` when it cannot be loaded."""
        self._require_open()
        while not any(worker.ready for worker in self._workers):
            self._pump(_START_S)

    def submit(self, key: Hashable, text: str, gold: str, *, stopped: bool = True, question: str = "") -> None:
        """Queue one response and return at once; ``ValueError`` when ``key`` is in flight already."""
        self._require_open()
        if key in self._in_flight:
            raise ValueError(f"an item with key {key!r} is in flight already")
        self._enqueue(VerifyItem(key, text, gold, stopped, question))
        self._pump(0)

    def drain(self, timeout_s: float = 0, wake: socket.socket | None = None) -> list[tuple[Hashable, Judgement]]:
        """Return what has been judged since the last call, waiting up to ``timeout_s`` seconds for a first one.

        With ``wake`` the wait ends as well when that socket can be read, and goes on while nothing is in flight.
        """
        self._require_open()
        end = time.monotonic() + timeout_s
        self._pump(0)
        while not self._done and (self._in_flight or wake) and (left := end - time.monotonic()) > 0:
            if self._pump(left, wake):
                break
        return list(self._take())

    def results(self) -> Iterator[tuple[Hashable, Judgement]]:
        """Yield (key, judgement) as they come until nothing is in flight."""
        self._require_open()
        while self._in_flight:
            if not self._done:
                self._pump(self.deadline_s)
            yield from self._take()

    def verify(
        self, items: Sequence[VerifyItem], on_result: Callable[[VerifyItem, Judgement], None] | None = None
    ) -> list[Judgement]:
        """Judge all ``items``, in their order; ``on_result`` sees each as it comes. Nothing else may be in flight."""
        if self._in_flight:
            raise ValueError(f"{len(self._in_flight)} items are in flight; drain them first")
        by_key = {item.key: item for item in items}
        if len(by_key) != len(items):
            raise ValueError("the keys of the items are not unique")
        for item in items:
            self._enqueue(item)
        judgements: dict[Hashable, Judgement] = {}
        for key, judgement in self.results():
            judgements[key] = judgement
            if on_result is not None:
                on_result(by_key[key], judgement)
        return [judgements[item.key] for item in items]

    def close(self) -> None:
        """Kill the workers and forget what is in flight; may be called again."""
        self._closed = True
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.stderr.close()
        self._workers.clear()
        self._waiting.clear()
        self._in_flight.clear()
        self._keys.clear()

    def _enqueue(self, item: VerifyItem) -> None:
        self._in_flight.add(item.key)
        self._keys[self._next_number] = item.key
        text = item.text if item.stopped else ""  # a truncated response is wrong whatever it says
        self._waiting.append((self._next_number, text, item.stopped, item.gold, item.question))
        self._next_number += 1

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the verifier pool is closed")

    def _take(self) -> Iterator[tuple[Hashable, Judgement]]:
        while self._done:
            key, judgement = self._done.popleft()
            self._in_flight.discard(key)
            yield key, judgement

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        start = f"from {worker_module.__name__} import main; main()"
        command = [sys.executable, "-P", "-c", start, "--fd", str(theirs.fileno())]
        command += ["--parent", str(os.getpid()), *self._arguments]
        with theirs, ours:
            ours.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(self.deadline_s + _GRACE_S) + 1, 0)
            )
            stderr = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            return _Worker(process, Connection(ours.detach()), stderr, since=time.monotonic())

    def _pump(self, timeout_s: float, wake: socket.socket | None = None) -> bool:
        """Hand out work, wait up to ``timeout_s`` for news, take it in, replace the workers that are gone.

        True when ``wake`` can be read.
        """
        self._assign()
        by_connection: dict[object, _Worker] = {worker.connection: worker for worker in self._workers}
        sources = [worker.connection for worker in self._workers]
        ready = wait([*sources, wake] if wake else sources, self._wait_s(timeout_s))
        for connection in ready:
            if connection is wake:
                continue
            worker = by_connection[connection]
            try:
                while worker.connection.poll():
                    self._receive(worker, worker.connection.recv())
            except (EOFError, OSError):
                self._replace(worker)
        for worker in list(self._workers):
            # Not while there is news: this thread itself may have stood still since the wait above.
            if self._overdue(worker) <= 0 and not worker.connection.poll():
                worker.overdue = worker.ready
                worker.process.kill()
                self._replace(worker)
        self._assign()
        return wake in ready

    def _overdue(self, worker: _Worker) -> float:
        """Seconds left before the parent itself kills a silent worker; the worker's own timer comes first."""
        if not worker.ready:
            return worker.since + _START_S - time.monotonic()
        if not worker.items:
            return float("inf")
        return worker.since + self.deadline_s + _GRACE_S - time.monotonic()

    def _wait_s(self, timeout_s: float) -> float:
        return max(0.0, min([timeout_s, *map(self._overdue, self._workers)]))

    def _assign(self) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.items]
        for index, worker in enumerate(idle):
            if not self._waiting:
                return
            share = -(-len(self._waiting) // (len(idle) - index))
            num_chars = 0
            while self._waiting and len(worker.items) < min(share, MAX_BATCH_ITEMS) and num_chars < MAX_BATCH_CHARS:
                worker.items.append(self._waiting.popleft())
                num_chars += len(worker.items[-1][1])
            worker.since = time.monotonic()
            with contextlib.suppress(OSError):  # a dead or stopped worker is dealt with by _pump
                worker.connection.send(list(worker.items))

    def _receive(self, worker: _Worker, message: Any) -> None:
        worker.since = time.monotonic()
        if message == worker_module.LOADING:
            worker.ready = False
            return
        if message == worker_module.READY:
            worker.ready = True
            self._failed_starts = 0
            return
        number, verdict, reason, answer, seconds = message
        worker.items.popleft()
        self._finish(number, Judgement(Verdict(verdict), reason, answer, seconds=seconds))

    def _finish(self, number: int, judgement: Judgement) -> None:
        self._done.append((self._keys.pop(number), judgement))

    def _replace(self, worker: _Worker) -> None:
        """Blame the item in work, give the others back to the queue, start another worker."""
        worker.connection.close()
        status = worker.process.wait()
        self._workers.remove(worker)
        if worker.items and status != worker_module.RECYCLED:
            seconds = time.monotonic() - worker.since
            self._finish(
                worker.items.popleft()[0], Judgement(Verdict.UNKNOWN, self._cause(worker, status), seconds=seconds)
            )
        self._waiting.extendleft(reversed(worker.items))
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                worker.stderr.seek(0)
                words = worker.stderr.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
                worker.stderr.close()
                self.close()
                if self._checker != RULES:
                    raise UserError(f"verifier.checker={self._checker!r} cannot be loaded by the workers: {words}")
                raise RuntimeError(f"{MAX_FAILED_STARTS} verifier workers in a row died at their start: {words}")
        worker.stderr.close()
        self._workers.append(self._start())

    def _cause(self, worker: _Worker, status: int) -> str:
        if status == -signal.SIGALRM or worker.overdue:
            return f"deadline of {self.deadline_s:g} s exceeded"
        if status < 0:
            return f"worker killed by {signal.Signals(-status).name}"
        return f"worker ended with status {status}"
