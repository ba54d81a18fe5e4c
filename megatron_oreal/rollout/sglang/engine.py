"""SGLang as an ``Engine``: a server of its own, its weights, its sleep, and its return after a failure."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_oreal.config import ServerConfig
from megatron_oreal.layout import DigestReport, Layout, ModelSpec, sglang_layout
from megatron_oreal.rollout.checks import checked_prompts
from megatron_oreal.rollout.engine import Completion, EngineError, Health, Request, SamplingParams
from megatron_oreal.rollout.sglang import args as arguments
from megatron_oreal.rollout.sglang.client import Health as ServerHealth
from megatron_oreal.rollout.sglang.client import UnreachableError
from megatron_oreal.rollout.sglang.digests import shard_digester
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher, DispatchSettings, Endpoint, Progress
from megatron_oreal.rollout.sglang.group import EngineGroup, SoloGroup
from megatron_oreal.rollout.sglang.process import ServerProcess
from megatron_oreal.rollout.sglang.staging import ShardStaging
from megatron_oreal.rollout.sglang.weights import TAGS, WeightSync

T = TypeVar("T")
OnComplete = Callable[[int, Completion], None]
_WATCH_S = 0.25


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """``rollout.server``. ``window``: requests that a server has at a time, those that wait there included."""

    host: str = "127.0.0.1"
    start_timeout_s: float = 600.0
    control_timeout_s: float = 300.0
    max_restarts: int = 3
    window: int = 512
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)


def settings_from(config: ServerConfig) -> ServerSettings:
    """Take ``rollout.server`` apart."""
    names = {item.name for item in dataclasses.fields(DispatchSettings)}
    return ServerSettings(
        host=config.host,
        start_timeout_s=config.start_timeout_s,
        control_timeout_s=config.control_timeout_s,
        max_restarts=config.max_restarts,
        window=config.requests_per_server,
        dispatch=DispatchSettings(**{name: getattr(config, name) for name in names}),
    )


@dataclass(frozen=True)
class _Loaded:
    """What the server was given last, for a server that has to be started again."""

    version: int
    stagings: list[dict[str, Any]]
    hashes: list[Tensor]


class SglangEngine:
    """An ``Engine`` on one SGLang server of ``tp`` tensor-parallel workers, shared by the trainer ranks of ``group``.

    Every member makes this object with the same arguments and makes the same calls. The first member owns the server
    and generates; each member stages ``tp / group.size`` of the engine's shards: ``weight_buffers`` are in memory that
    the server's workers read directly (``layout`` says what stands where: ``sglang_layout`` of this ``tp``).

    ``devices``: the CUDA devices of the group, as ``CUDA_VISIBLE_DEVICES`` spells them. ``server_args``: SGLang's own
    names, from ``rollout.sglang``. While the engine may generate, a thread watches the server: one that ended or hangs
    is started again, gets the loaded version from the staging memory, and only then answers with it.
    ``num_restarts`` counts that. A ``server`` that is given, made with the same arguments, is left to its maker.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        model_path: str | Path,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tp: int = 1,
        group: EngineGroup | None = None,
        devices: Sequence[str] = (),
        max_running_requests: int,
        max_length: int,
        server_args: Mapping[str, Any] | None = None,
        settings: ServerSettings | None = None,
        dispatcher: Dispatcher | None = None,
        server: ServerProcess | None = None,
        name: str = "sglang",
    ):
        arguments.check_server_args(server_args or {})
        self.spec, self.tp, self.max_length = spec, tp, max_length
        self.settings = settings or ServerSettings()
        self.num_restarts = 0
        self.device, self._dtype = torch.device(device), dtype
        arguments.check_model(spec, self.device, tp)
        self._group = group or SoloGroup()
        assert tp % self._group.size == 0, f"{self._group.size} ranks cannot share the shards of tp={tp}"
        self.layout: Layout = sglang_layout(spec, tp=tp, device="cuda" if self.device.type == "cuda" else "cpu")
        self._digester = shard_digester(spec, tp, self.device.type, dtype)
        self._stagings: dict[int, ShardStaging] = {}
        self._version, self._awake, self._closed, self._generating = -1, True, False, False
        self._weights_gone, self._failure = False, ""
        self._released: list[str] = []
        self._loaded: _Loaded | None = None
        self._lock = threading.RLock()
        self._owns_dispatcher = dispatcher is None
        self.dispatcher = dispatcher or Dispatcher(self.settings.dispatch)
        self._server: ServerProcess | None = None
        self._serving = threading.Event()
        self._pauses = 0
        if self.is_owner:
            user = dict(server_args or {})
            model_dir = arguments.write_model_dir(model_path, folder / f"{name}.model", max_length)
            final = arguments.server_args(
                user,
                model_dir=model_dir,
                device=self.device,
                dtype=dtype,
                tp=tp,
                max_running_requests=max_running_requests,
                max_length=max_length,
            )
            self._saves_memory = bool(final["enable_memory_saver"])
            self._counts = "sampling_backend" not in user
            self._owns_server = server is None
            environment = arguments.server_environment(self.device, list(devices), tp)
            self._open(server or self._make_server(final, environment, folder, name), str(model_dir))

    def _make_server(
        self, server_args: Mapping[str, Any], environment: Mapping[str, str], folder: Path, name: str
    ) -> ServerProcess:
        host = self.settings.host
        return ServerProcess(server_args, environment, folder, name=name, host=host, counter_sampler=self._counts)

    def _open(self, server: ServerProcess, model_dir: str) -> None:
        self._server = server
        self._sync = WeightSync(
            self.dispatcher.client(server.url),
            model_dir,
            tp=self.tp,
            digester=self._digester,
            timeout_s=self.settings.control_timeout_s,
        )
        threading.Thread(target=self._watch, name=f"{server.name} watch", daemon=True).start()

    @property
    def is_owner(self) -> bool:
        """True on the rank that has the server and generates."""
        return self._group.rank == 0

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is and what its weights are called now, for a dispatcher over several engines."""
        return Endpoint(self._own_server().url, self._sync.label(self._version))

    def start(self) -> None:
        """Start the server without waiting for it; anything that needs it waits. Idempotent."""
        self._idle()
        if self._server is not None and self._server.pid is None:
            self._server.start()

    def wait_ready(self) -> None:
        """Return when the server answers; raises ``EngineError`` with the end of its log when it does not."""
        self.start()
        self._together(lambda: self._own_server().wait_ready(self.settings.start_timeout_s))

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_complete: OnComplete | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        enough: Callable[[], bool] | None = None,
        endpoints: Sequence[Endpoint] | None = None,
    ) -> list[Completion]:
        """Draw one response per request, in request order; see ``Dispatcher.generate`` for the last two callbacks.

        ``endpoints``: of other engines too, for a rank that dispatches for all; by default this engine's own.
        ``kept_mass`` is NaN where a filter is on and ``rollout.sglang.sampling_backend`` names another sampler than
        ours. Raises as ``EmbeddedEngine.generate`` does, and ``EngineError`` when the server cannot be brought back.
        """
        self._idle()
        if not self._awake:
            raise EngineError("generate: the engine is asleep; call wake first")
        if self._version < 0:
            raise EngineError("generate: no weights are loaded yet; call load_weights first")
        if self._weights_gone:
            raise EngineError("generate: the weights were released in sleep or did not arrive; call load_weights first")
        checked_prompts(requests, sampling, max_length=self.max_length, vocab_size=self.spec.vocab_size)
        if not requests:
            return []
        self._generating = True
        try:
            return self.dispatcher.generate(
                [self.endpoint] if endpoints is None else endpoints,
                requests,
                sampling,
                vocab_size=self.spec.vocab_size,
                window=self.settings.window,
                kept_mass=self._counts,
                on_complete=on_complete,
                on_progress=on_progress,
                enough=enough,
            )
        except EngineError as error:
            raise EngineError(f"{error}; {self._failure}" if self._failure else str(error)) from None
        finally:
            self._generating = False

    def weight_buffers(self) -> Mapping[str, Tensor]:
        """Return this rank's shard in the engine's layout, in memory that the server's worker reads."""
        shards = self.weight_shards()
        if len(shards) != 1:
            raise EngineError(f"weight_buffers: this rank stages {len(shards)} shards; use weight_shards")
        return next(iter(shards.values()))

    def weight_shards(self) -> dict[int, Mapping[str, Tensor]]:
        """Return the shards that this rank stages, by tensor-parallel rank of the engine; allocated when first asked.

        Not to be written while the engine generates: a server that has to be restarted takes its weights from here.
        """
        self._idle()
        share = self.tp // self._group.size
        for rank in range(self._group.rank * share, (self._group.rank + 1) * share):
            if rank not in self._stagings:
                shapes = self.layout.shards[rank].shapes
                self._stagings[rank] = ShardStaging(shapes, self._dtype, self.device, f"shard{rank}")
        return {rank: staging.tensors for rank, staging in self._stagings.items()}

    def load_weights(self, version: int) -> DigestReport:
        """Make what all members have staged the server's weights; a collective of the group.

        The version counts when every worker has acknowledged it and holds the staged bytes. Before the first one the
        engine's weights are overwritten with noise. Raises ``EngineError``, on every member, unless it is a newer one
        and arrives; a server that fails meanwhile is started again, ``max_restarts`` times in a run.
        """
        self._idle()
        if version <= self._version:
            raise EngineError(f"load_weights: version {version} is not newer than the loaded version {self._version}")
        shards = self.weight_shards()
        mine = {
            rank: (self._stagings[rank].describe(), self._digester.hash_source(rank, tensors).cpu())
            for rank, tensors in shards.items()
        }
        self._stop_serving()
        self._weights_gone = True
        parts = self._group.gather(mine)

        def load() -> DigestReport:
            assert parts is not None
            merged = {rank: item for part in parts for rank, item in part.items()}
            stagings, hashes = zip(*(merged[rank] for rank in range(self.tp)), strict=True)
            with self._lock:
                self._loaded = None
                loaded = _Loaded(version, list(stagings), list(hashes))
                report = self._give(loaded)
                self._loaded, self._failure = loaded, ""
                return report

        report = self._together(load)
        self._version, self._weights_gone = version, False
        if self._awake:
            self._serving.set()
        return report

    def release_staging(self) -> None:
        """Free the staging memory (on a GPU it is a second copy of the shard). A server that fails later stays out.

        A collective of the group. ``weight_shards`` allocates it again.
        """
        self._idle()
        self._together(self._drop_loaded)
        for staging in self._stagings.values():
            staging.close()
        self._stagings.clear()

    def sleep(self, tags: Sequence[str] = TAGS) -> None:
        """Drop all requests and caches, and give device memory of ``tags`` back where the server's memory saver is on.

        Idempotent. Released weights have to be loaded anew.
        """
        self._idle()
        if not self._awake:
            return
        self._stop_serving()
        released = self._together(functools.partial(self._fall_asleep, list(tags)))
        self._weights_gone = self._weights_gone or "weights" in released
        self._awake = False

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory of ``tags`` again, by default all that was released. Idempotent.

        A colocated step wakes in two parts: ``wake(["weights"])``, ``load_weights``, then ``wake()``.
        """
        self._idle()
        left, is_new = self._together(functools.partial(self._wake_up, None if tags is None else list(tags)))
        self._awake = not left
        self._weights_gone = self._weights_gone or is_new
        if self._awake and self._version >= 0 and not self._weights_gone:
            self._serving.set()

    def health(self) -> Health:
        """Answer in any state, without asking the server."""
        if self._closed:
            return Health(ok=False, version=self._version, awake=False, detail="shut down")
        state = "generating" if self._generating else "idle" if self._awake else "asleep"
        return Health(ok=not self._failure, version=self._version, awake=self._awake, detail=self._failure or state)

    def shutdown(self) -> None:
        """Stop the server and free the shared memory. Idempotent."""
        if self._closed:
            return
        self._idle()
        self._closed = True
        self._stop_serving()
        if self._server is not None:
            if self._owns_server:
                self._server.close()
            self._sync.close()
        for staging in self._stagings.values():
            staging.close()
        self._stagings.clear()
        if self._owns_dispatcher:
            self.dispatcher.close()

    def _stop_serving(self) -> None:
        """From here on an unanswered health request means nothing, nor does one that is under way."""
        self._serving.clear()
        self._pauses += 1

    def _idle(self) -> None:
        if self._closed:
            raise EngineError("the engine is shut down")
        if self._generating:
            raise EngineError("the engine is generating; its on_complete callback must not call it")

    def _own_server(self) -> ServerProcess:
        if self._server is None:
            raise EngineError(f"rank {self._group.rank} of the engine's group has no server; rank 0 has it")
        return self._server

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.dispatcher.run(work)

    def _together(self, work: Callable[[], T]) -> T:
        """Do something on the owner; its result, or its ``EngineError``, on every member."""
        result: tuple[str, Any] | None = None
        if self.is_owner:
            try:
                result = "done", work()
            except EngineError as error:
                result = "failed", str(error)
        kind, value = self._group.broadcast(result)
        if kind == "failed":
            raise EngineError(value)
        return value

    def _give(self, loaded: _Loaded) -> DigestReport:
        return self._surviving(
            lambda: self._sync.load(loaded.stagings, loaded.hashes, loaded.version, awake=self._awake)
        )

    def _surviving(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something with the running server, or with a new one when this one does not survive it."""
        while True:
            self._ensure_started()
            try:
                return self._run(work())
            except UnreachableError as error:
                self._restart(str(error))

    def _ensure_started(self) -> None:
        server = self._own_server()
        if server.pid is None and server.was_started:
            self._restart("it has ended")
            return
        if server.pid is None:
            server.start()
        server.wait_ready(self.settings.start_timeout_s)

    def _restart(self, reason: str) -> None:
        server = self._own_server()
        server.stop()
        if self.num_restarts >= self.settings.max_restarts:
            self._failure = (
                f"the server was started again rollout.server.max_restarts={self.settings.max_restarts} times already, "
                f"and now: {reason}; {server.log_tail()}"
            )
            raise EngineError(self._failure)
        self.num_restarts += 1
        self._released = []
        server.start()
        server.wait_ready(self.settings.start_timeout_s)
        self._sync.restarted()

    def _watch(self) -> None:
        """While the engine may generate: bring the server back when it has ended or hangs."""
        looked, health = time.monotonic(), ServerHealth(self._sync.client)
        while not self._closed:
            time.sleep(_WATCH_S)
            pauses = self._pauses
            if not self._serving.is_set() or self._failure:
                looked, health = time.monotonic(), ServerHealth(self._sync.client)
                continue
            reason = "" if self._own_server().pid is not None else "it has ended"
            if not reason and time.monotonic() - looked >= self.settings.dispatch.health_interval_s:
                with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):  # the dispatcher is closing
                    reason = self._run(health.complaint(self.settings.dispatch.health_timeout_s))
                looked = time.monotonic()
            if reason:
                with self._lock:
                    if pauses == self._pauses and not self._closed:
                        self._bring_back(reason)

    def _bring_back(self, reason: str) -> None:
        with contextlib.suppress(EngineError):  # one that does not start is tried again until it may not
            self._restart(reason)
            if self._loaded is None:
                return
            try:
                self._give(self._loaded)
            except EngineError as error:
                self._failure = self._failure or str(error)

    def _drop_loaded(self) -> None:
        with self._lock:
            self._loaded = None
            if self._own_server().pid is not None:
                self._run(self._sync.forget_staging())

    def _fall_asleep(self, tags: list[str]) -> list[str]:
        """Returns what was released; the weights of a server that had to be started again are gone as well."""
        with self._lock:
            restarts = self.num_restarts
            self._surviving(self._sync.pause)
            if self._saves_memory:
                self._surviving(lambda: self._sync.release(tags))
                self._released = tags
            return list({*self._released, *(["weights"] if self.num_restarts > restarts else [])})

    def _wake_up(self, tags: list[str] | None) -> tuple[list[str], bool]:
        """Take back; returns what is still released, and whether this is a new server, which has no weights."""
        with self._lock:
            restarts = self.num_restarts
            self._ensure_started()
            try:
                for tag in ("weights", "kv_cache", "cuda_graph"):  # weights first: the caches take what is left
                    if tag in self._released and (tags is None or tag in tags):
                        self._run(self._sync.retake([tag]))
                        self._released = [other for other in self._released if other != tag]
                if not self._released:
                    self._run(self._sync.resume())
            except UnreachableError as error:
                self._restart(str(error))  # it starts with all of its memory
            return self._released, self.num_restarts > restarts
