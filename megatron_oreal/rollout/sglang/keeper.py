"""One server kept running: what is asked of it survives its end, and a thread brings it back while it generates."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from megatron_oreal.layout import DigestReport
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang.client import Health, UnreachableError
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher
from megatron_oreal.rollout.sglang.handover import Handover
from megatron_oreal.rollout.sglang.process import ServerProcess
from megatron_oreal.rollout.sglang.settings import ServerSettings
from megatron_oreal.rollout.sglang.weights import WeightSync

T = TypeVar("T")
_WATCH_S = 0.25


@dataclass(frozen=True)
class Loaded:
    """Weights that the server has: where whole shards of them are kept (None: nowhere), and their digests."""

    version: int
    stagings: list[dict[str, Any] | None]
    hashes: list[Tensor]

    @property
    def is_kept(self) -> bool:
        """Whether another server can be given them."""
        return None not in self.stagings


class ServerKeeper:
    """A server, its weights and its sleep, on the rank that has it.

    Between ``serve`` and ``stop_serving`` a thread looks after the server: one that has ended or hangs is started again
    and given the kept weights before it may answer. ``num_restarts``: what ``rollout.server.max_restarts`` limits;
    ``failure``: why there will be no further attempt.
    """

    def __init__(
        self,
        server: ServerProcess,
        sync: WeightSync,
        dispatcher: Dispatcher,
        settings: ServerSettings,
        *,
        saves_memory: bool,
    ):
        self.server, self.sync, self.settings = server, sync, settings
        self.num_restarts, self.failure = 0, ""
        self._dispatcher, self._saves_memory = dispatcher, saves_memory
        self._loaded: Loaded | None = None
        self._released: list[str] = []
        self._lock = threading.RLock()
        self._serving = threading.Event()
        self._pauses, self._closed = 0, False
        threading.Thread(target=self._watch, name=f"{server.name} watch", daemon=True).start()

    def serve(self) -> None:
        """From here on the server must answer."""
        self._serving.set()

    def stop_serving(self) -> None:
        """From here on an unanswered health request means nothing, nor does one that is under way."""
        self._serving.clear()
        self._pauses += 1

    def forget_loaded(self) -> None:
        """The kept weights are about to be overwritten, for a server that is there."""
        with self._lock:
            self._loaded = None
            self._ensure_started()

    def load(self, loaded: Loaded, handover: Handover | None, *, awake: bool) -> DigestReport:
        """Make these the server's weights, by ending the handover that has brought them, or from where they are kept.

        A server that does not survive it is started again and gets the kept ones. Raises ``EngineError``.
        """
        with self._lock:
            self._loaded = None
            report = self._give(loaded, awake) if handover is None else self._accept(handover, loaded, awake)
            self._loaded, self.failure = loaded if loaded.is_kept else None, ""
            return report

    def unmap_staging(self) -> None:
        """Have the workers let go of the trainer's memory; a server that does not is ended, which does it too."""
        with self._lock:
            try:
                if self.server.pid is not None:
                    self._run(self.sync.forget_staging())
            except UnreachableError:
                self.server.stop()

    def fall_asleep(self, tags: list[str]) -> list[str]:
        """Returns what was released; the weights of a server that had to be started again are gone as well."""
        with self._lock:
            restarts = self.num_restarts
            self._surviving(self.sync.pause)
            if self._saves_memory:
                self._surviving(lambda: self.sync.release(tags))
                self._released = tags
            return list({*self._released, *(["weights"] if self.num_restarts > restarts else [])})

    def wake_up(self, tags: list[str] | None) -> tuple[list[str], bool]:
        """Take back; returns what is still released, and whether this is a new server, which has no weights.

        A new server is given the kept weights when it wakes up whole.
        """
        with self._lock:
            restarts = self.num_restarts
            self._ensure_started()
            try:
                for tag in ("weights", "kv_cache", "cuda_graph"):  # weights first: the caches take what is left
                    if tag in self._released and (tags is None or tag in tags):
                        self._run(self.sync.retake([tag]))
                        self._released = [other for other in self._released if other != tag]
                if not self._released:
                    self._run(self.sync.resume())
            except UnreachableError as error:
                self._restart(str(error))  # it starts with all of its memory
            is_new = self.num_restarts > restarts
            if is_new and tags is None and self._loaded is not None:
                self._give(self._loaded, awake=True)
                is_new = False
            return self._released, is_new

    def close(self, *, stop_server: bool) -> None:
        """End the thread, and the server where it is one's own. Idempotent."""
        self._closed = True
        if stop_server:
            self.server.close()
        self.sync.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._dispatcher.run(work)

    def _accept(self, handover: Handover, loaded: Loaded, awake: bool) -> DigestReport:
        try:
            digests = handover.result()
            return self._run(self.sync.accept(digests, loaded.hashes, loaded.version, awake=awake))
        except UnreachableError as error:
            if not loaded.is_kept:
                raise EngineError(
                    "the server failed while it took weights, and rollout.server.keep_weights=false keeps none for "
                    f"another attempt: {error}; {self.server.log_tail()}"
                ) from None
            self._restart(str(error))
            return self._give(loaded, awake)

    def _give(self, loaded: Loaded, awake: bool) -> DigestReport:
        stagings = [each for each in loaded.stagings if each is not None]
        return self._surviving(lambda: self.sync.load(stagings, loaded.hashes, loaded.version, awake=awake))

    def _surviving(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something with the running server, or with a new one when this one does not survive it."""
        while True:
            self._ensure_started()
            try:
                return self._run(work())
            except UnreachableError as error:
                self._restart(str(error))

    def _ensure_started(self) -> None:
        server = self.server
        if server.pid is None and server.was_started:
            self._restart("it has ended")
            return
        if server.pid is None:
            server.start()
        server.wait_ready(self.settings.start_timeout_s)

    def _restart(self, reason: str) -> None:
        server = self.server
        server.stop()
        if self.num_restarts >= self.settings.max_restarts:
            self.failure = (
                f"the server was started again rollout.server.max_restarts={self.settings.max_restarts} times already, "
                f"and now: {reason}; {server.log_tail()}"
            )
            raise EngineError(self.failure)
        self.num_restarts += 1
        self._released = []
        server.start()
        server.wait_ready(self.settings.start_timeout_s)
        self.sync.restarted()

    def _watch(self) -> None:
        """While the engine may generate: bring the server back when it has ended or hangs."""
        looked, health = time.monotonic(), Health(self.sync.client)
        while not self._closed:
            time.sleep(_WATCH_S)
            pauses = self._pauses
            if not self._serving.is_set() or self.failure:
                looked, health = time.monotonic(), Health(self.sync.client)
                continue
            reason = "" if self.server.pid is not None else "it has ended"
            if not reason and time.monotonic() - looked >= self.settings.dispatch.health_interval_s:
                with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):  # the dispatcher is closing
                    reason = self._run(health.complaint(self.settings.dispatch.health_timeout_s))
                looked = time.monotonic()
            if reason:
                with self._lock, contextlib.suppress(concurrent.futures.CancelledError):  # the dispatcher is closing
                    if pauses == self._pauses and not self._closed:
                        self._bring_back(reason)

    def _bring_back(self, reason: str) -> None:
        with contextlib.suppress(EngineError):  # one that does not start is tried again until it may not
            self._restart(reason)
            if self._loaded is None:
                return
            try:
                self._give(self._loaded, awake=True)
            except EngineError as error:
                self.failure = self.failure or str(error)
