"""SGLang as an ``Engine``: a server of its own, its weights, its sleep, and its return after a failure."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_oreal.layout import DigestReport, Layout, ModelSpec, sglang_layout
from megatron_oreal.rollout.checks import checked_prompts
from megatron_oreal.rollout.engine import Completion, EngineError, Health, Request, SamplingParams
from megatron_oreal.rollout.sglang import args as arguments
from megatron_oreal.rollout.sglang.digests import shard_digester
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher, Endpoint, Progress
from megatron_oreal.rollout.sglang.group import EngineGroup, SoloGroup
from megatron_oreal.rollout.sglang.handover import Buckets, Handover
from megatron_oreal.rollout.sglang.keeper import Loaded, ServerKeeper
from megatron_oreal.rollout.sglang.process import ServerProcess
from megatron_oreal.rollout.sglang.settings import ServerSettings
from megatron_oreal.rollout.sglang.staging import HostSegment, ShardStaging, padded_bytes, weight_groups
from megatron_oreal.rollout.sglang.weights import TAGS, Part, WeightSync

T = TypeVar("T")
OnComplete = Callable[[int, Completion], None]


class SglangEngine:
    """An ``Engine`` on one SGLang server of ``tp`` tensor-parallel workers, shared by the trainer ranks of ``group``.

    Every member makes this object with the same arguments and makes the same calls. The first member owns the server
    and generates; each member has ``tp / group.size`` of the engine's shards (``layout`` says what stands where:
    ``sglang_layout`` of this ``tp``). Weights come in two ways: whole shards in ``weight_shards``, host memory that the
    server's workers read; or, from a trainer's device, through ``stage``, group by group.

    ``devices``: the CUDA devices of the group, as ``CUDA_VISIBLE_DEVICES`` spells them. ``server_args``: SGLang's own
    names, from ``rollout.sglang``. While the engine may generate, a thread watches the server: one that ended or hangs
    is started again, gets the loaded version from the kept shards, and only then answers with it.
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
        self.device, self._dtype = torch.device(device), dtype
        arguments.check_model(spec, self.device, tp)
        if self.device.type == "cuda":
            arguments.check_allocator(os.environ)
        self._group = group or SoloGroup()
        assert tp % self._group.size == 0, f"{self._group.size} ranks cannot share the shards of tp={tp}"
        self.layout: Layout = sglang_layout(spec, tp=tp, device="cuda" if self.device.type == "cuda" else "cpu")
        self._digester = shard_digester(spec, tp, self.device.type, dtype)
        self._stagings: dict[int, ShardStaging] = {}
        self._groups = weight_groups(self.layout, dtype, self.settings.bucket_bytes)
        self._buckets: Buckets | None = None
        self._handover: Handover | None = None
        self._version, self._awake, self._closed, self._generating = -1, True, False, False
        self._weights_gone = False
        self._owns_dispatcher = dispatcher is None
        self.dispatcher = dispatcher or Dispatcher(self.settings.dispatch)
        self._server: ServerProcess | None = None
        self._keeper: ServerKeeper | None = None
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
            self._counts = "sampling_backend" not in user
            self._owns_server = server is None
            environment = arguments.server_environment(self.device, list(devices), tp)
            self._server = server or self._make_server(final, environment, folder, name)
            self._keeper = self._make_keeper(self._server, str(model_dir), bool(final["enable_memory_saver"]))

    def _make_server(
        self, server_args: Mapping[str, Any], environment: Mapping[str, str], folder: Path, name: str
    ) -> ServerProcess:
        host = self.settings.host
        return ServerProcess(server_args, environment, folder, name=name, host=host, counter_sampler=self._counts)

    def _make_keeper(self, server: ServerProcess, model_dir: str, saves_memory: bool) -> ServerKeeper:
        timeout_s = self.settings.control_timeout_s
        client = self.dispatcher.client(server.url)
        self._sync = WeightSync(client, model_dir, tp=self.tp, digester=self._digester, timeout_s=timeout_s)
        return ServerKeeper(server, self._sync, self.dispatcher, self.settings, saves_memory=saves_memory)

    @property
    def is_owner(self) -> bool:
        """True on the rank that has the server and generates."""
        return self._group.rank == 0

    @property
    def num_restarts(self) -> int:
        """Times that the server was started again, on the rank that has it."""
        return self._keeper.num_restarts if self._keeper is not None else 0

    @property
    def _failure(self) -> str:
        return self._keeper.failure if self._keeper is not None else ""

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is and what its weights are called now, for a dispatcher over several engines."""
        return Endpoint(self._own().server.url, self._sync.label(self._version))

    def start(self) -> None:
        """Start the server without waiting for it; anything that needs it waits. Idempotent."""
        self._idle()
        if self._server is not None and self._server.pid is None:
            self._server.start()

    def wait_ready(self) -> None:
        """Return when the server answers; raises ``EngineError`` with the end of its log when it does not."""
        self.start()
        self._together(lambda: self._own().server.wait_ready(self.settings.start_timeout_s))

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_complete: OnComplete | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        enough: Callable[[], bool] | None = None,
        endpoints: Sequence[Endpoint] | None = None,
        keep: bool = True,
    ) -> list[Completion]:
        """Draw one response per request, in request order; ``Dispatcher.generate`` says what callbacks and ``keep`` do.

        ``endpoints``: of other engines too, for a rank that dispatches for all; by default this engine's own.
        ``kept_mass`` is NaN where a filter is on and ``rollout.sglang.sampling_backend`` names another sampler than
        ours. Raises as ``EmbeddedEngine.generate`` does, and ``EngineError`` when the server cannot be brought back.
        """
        self._idle()
        if not self._awake:
            raise EngineError("generate: the engine is asleep; call wake first")
        if self._version < 0:
            raise EngineError("generate: no weights are loaded yet; call load_weights first")
        if self._weights_gone and endpoints is None:
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
                keep=keep,
            )
        except EngineError as error:
            raise EngineError(f"{error}; {self._failure}" if self._failure else str(error)) from None
        finally:
            self._generating = False

    def weight_buffers(self) -> Mapping[str, Tensor]:
        """Return this rank's shard in the engine's layout, in host memory that the server's worker reads."""
        shards = self.weight_shards()
        if len(shards) != 1:
            raise EngineError(f"weight_buffers: this rank stages {len(shards)} shards; use weight_shards")
        return next(iter(shards.values()))

    def weight_shards(self) -> dict[int, Mapping[str, Tensor]]:
        """Return the shards of this rank whole, by tensor-parallel rank of the engine; allocated when first asked.

        Not to be written while the engine generates: a server that has to be restarted takes its weights from here.
        """
        self._idle()
        share = self.tp // self._group.size
        for rank in range(self._group.rank * share, (self._group.rank + 1) * share):
            if rank not in self._stagings:
                shapes = self.layout.shards[rank].shapes
                nbytes = sum(padded_bytes(shape, self._dtype) for shape in shapes.values())
                segment = HostSegment.create(nbytes, f"shard{rank}")
                if self.device.type == "cuda":
                    segment.pin()
                self._stagings[rank] = ShardStaging(shapes, self._dtype, segment)
        return {rank: staging.tensors for rank, staging in self._stagings.items()}

    def stage(self, version: int) -> Handover:
        """Begin a version: what is written into the result goes to the server group by group, two groups at a time.

        ``load_weights`` of the same version ends it. From here on nothing is generated until then. For members with one
        shard each; a collective of the group. Raises ``EngineError``, on every member, when there is no server.
        """
        self._idle()
        self._require_newer(version)
        assert self._group.size == self.tp, "every member stages one shard"
        self._drop_handover()
        self._stop_serving()
        self._weights_gone = True
        rank = self._group.rank
        if self._buckets is None:
            self._buckets = Buckets(self.layout.shards[rank], self._groups, self._dtype, self.device)
        keep = self.weight_shards()[rank] if self.settings.keep_weights else None
        self._together(lambda: self._own().forget_loaded())
        self._handover = Handover(
            version,
            self._groups,
            self._buckets,
            self._group,
            rank,
            self._digester,
            dtype=self._dtype,
            keep=keep,
            feed=functools.partial(self._feed, version) if self.is_owner else None,
            post=self._run,
        )
        return self._handover

    def load_weights(self, version: int) -> DigestReport:
        """Make what all members have staged, or have written to ``weight_shards``, the server's weights.

        A collective of the group. The version counts when every worker has acknowledged it and holds the staged bytes.
        Before the first one the engine's weights are overwritten with noise. Raises ``EngineError``, on every member,
        unless it is a newer one and arrives; a server that fails meanwhile is started again, ``max_restarts`` times.
        """
        self._idle()
        self._require_newer(version)
        handover = self._handover
        if handover is not None and handover.version != version:
            self._drop_handover()
            handover = None
        shards = self.weight_shards() if handover is None else {}
        hashes = {rank: self._digester.hash_source(rank, tensors) for rank, tensors in shards.items()}
        if handover is not None:
            hashes = {self._group.rank: handover.hashes()}
        is_kept = handover is None or self.settings.keep_weights
        mine = {
            rank: (self._stagings[rank].describe() if is_kept else None, each.cpu()) for rank, each in hashes.items()
        }
        self._stop_serving()
        self._weights_gone = True
        parts = self._group.gather(mine)

        def load() -> DigestReport:
            assert parts is not None
            merged = {rank: item for part in parts for rank, item in part.items()}
            stagings, hashes = zip(*(merged[rank] for rank in range(self.tp)), strict=True)
            loaded = Loaded(version, list(stagings), list(hashes))
            return self._own().load(loaded, handover, awake=self._awake)

        report = self._together(load)
        self._version, self._weights_gone = version, False
        if self._awake:
            self._serve()
        return report

    def release_staging(self) -> None:
        """Free the memory that ``stage`` and its digests work in, until it is called again; the kept shards stay.

        A collective of the group.
        """
        self._idle()
        self._drop_handover()
        self._together(lambda: self._own().unmap_staging())
        self._digester.release()
        if self._buckets is not None:
            self._buckets.close()

    def sleep(self, tags: Sequence[str] = TAGS) -> None:
        """Drop all requests and caches, and give device memory of ``tags`` back where the server's memory saver is on.

        Idempotent. Released weights have to be loaded anew.
        """
        self._idle()
        if not self._awake:
            return
        self._stop_serving()
        released = self._together(lambda: self._own().fall_asleep(list(tags)))
        self._weights_gone = self._weights_gone or "weights" in released
        self._awake = False

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory of ``tags`` again, by default all that was released. Idempotent.

        A colocated step wakes in two parts: ``wake(["weights"])``, ``load_weights``, then ``wake()``.
        """
        self._idle()
        left, is_new = self._together(lambda: self._own().wake_up(None if tags is None else list(tags)))
        self._awake = not left
        self._weights_gone = self._weights_gone or is_new
        if self._awake and self._version >= 0 and not self._weights_gone:
            self._serve()

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
        if self._handover is not None:
            self._handover.cancel()
            self._handover = None
        if self._buckets is not None:
            self._buckets.close()
        if self._keeper is not None:
            self._keeper.close(stop_server=self._owns_server)
        for staging in self._stagings.values():
            staging.close()
        self._stagings.clear()
        if self._owns_dispatcher:
            self.dispatcher.close()

    def _serve(self) -> None:
        if self._keeper is not None:
            self._keeper.serve()

    def _stop_serving(self) -> None:
        if self._keeper is not None:
            self._keeper.stop_serving()

    def _idle(self) -> None:
        if self._closed:
            raise EngineError("the engine is shut down")
        if self._generating:
            raise EngineError("the engine is generating; its on_complete callback must not call it")

    def _own(self) -> ServerKeeper:
        if self._keeper is None:
            raise EngineError(f"rank {self._group.rank} of the engine's group has no server; rank 0 has it")
        return self._keeper

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

    def _require_newer(self, version: int) -> None:
        if version <= self._version:
            raise EngineError(f"load_weights: version {version} is not newer than the loaded version {self._version}")

    def _drop_handover(self) -> None:
        if self._handover is not None:
            self._handover.abandon()
            self._handover = None

    def _feed(self, version: int, parts: asyncio.Queue[Part | None]) -> concurrent.futures.Future[Any]:
        return self.dispatcher.submit(self._sync.feed(parts, version, awake=self._awake))
