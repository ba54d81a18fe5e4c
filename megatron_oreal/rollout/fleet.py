"""All engines of a run, moved together: no rank goes on before every engine has done what was asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_oreal.platform import Platform
from megatron_oreal.rollout.engine import Engine, EngineError
from megatron_oreal.rollout.sglang.dispatcher import Endpoint
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.rollout.sglang.handover import Handover
from megatron_oreal.telemetry import PhaseTimers

T = TypeVar("T")
_SETTLE_S = 0.2
_SHARE = 0.9
"""Of the bytes that are expected back: allocators round, and the trainer's own may grow a little meanwhile."""


class Fleet:
    """This rank's engine among those of all ranks; every method is called by all ranks alike.

    ``endpoints``: of the servers, with the label that the current version has there; empty for embedded engines.
    Whatever fails on one engine raises ``EngineError`` on every rank, with the first failing rank's words.
    """

    def __init__(self, engine: Engine, platform: Platform, *, memory: ReleasedMemory | None = None):
        self.engine, self.platform = engine, platform
        self.endpoints: list[Endpoint] = []
        self._memory = memory
        self._restarts = 0
        self._asleep = False

    @property
    def is_served(self) -> bool:
        """True where engines are servers beside the ranks, which sleep while the actors train."""
        return isinstance(self.engine, SglangEngine)

    def start(self) -> None:
        """Start the servers and return at once."""
        if isinstance(self.engine, SglangEngine):
            self._together(self.engine.start, "the engines' servers to be started")

    def wait_ready(self) -> None:
        """Return when all servers answer."""
        if isinstance(self.engine, SglangEngine):
            self._together(self.engine.wait_ready, "the engines' servers to start")

    def sleep(self, timers: PhaseTimers | None = None) -> float | None:
        """Have the engines drop their caches and give their device memory back, and measure that they did.

        Returns the bytes that came back on this rank's device, None where nothing is measured. Idempotent.
        """
        timers, engine = timers or PhaseTimers(), self.engine
        if not isinstance(engine, SglangEngine) or self._asleep:
            return None
        if self._memory is not None:
            self._memory.mark()

        def sleep() -> int:
            engine.sleep()
            return engine.num_restarts

        with timers("release"):
            restarts = sum(self._all_together(sleep, "the engines to fall asleep"))
        self._asleep = True
        if self._memory is None:
            return None
        if restarts != self._restarts:
            self._restarts = restarts
            self._memory.expect_another()
        with timers("memory"):
            return self._together(self._memory.wait, "the engines' device memory")

    def wake_weights(self) -> None:
        """Have sleeping engines take the memory of their weights, which are undefined until they are loaded."""
        if isinstance(self.engine, SglangEngine) and self._asleep:
            engine = self.engine
            self._together(lambda: engine.wake(["weights"]), "the engines' weights to wake")

    def stage(self, version: int) -> Mapping[str, Tensor] | Handover:
        """Return where this rank's weights of ``version`` are to be written: into servers group by group."""
        engine = self.engine
        if isinstance(engine, SglangEngine):
            self.endpoints = []
            return self._together(lambda: engine.stage(version), "every engine to be ready for new weights")
        return engine.weight_buffers()

    def load_weights(self, version: int) -> None:
        """Make what the ranks have staged the weights that generate, visible once every engine has acknowledged it."""
        self.endpoints = []

        def load() -> Endpoint | None:
            self.engine.load_weights(version)
            served = isinstance(self.engine, SglangEngine) and self.engine.is_owner
            return self.engine.endpoint if served else None  # type: ignore[attr-defined]

        found = self._all_together(load, f"every engine to acknowledge version {version}")
        self.endpoints = [endpoint for endpoint in found if endpoint is not None]

    def wake_cache(self) -> None:
        """Have engines take the rest of their memory, and generate again. Idempotent."""
        if isinstance(self.engine, SglangEngine) and self._asleep:
            self._together(self.engine.wake, "the engines to wake")
            self._asleep = False

    def release_staging(self) -> None:
        """Give the memory back in which the ranks have staged weights; what restarted servers load is kept."""
        if isinstance(self.engine, SglangEngine):
            self._together(self.engine.release_staging, "the engines to let go of the staging memory")

    def shutdown(self) -> None:
        """Stop this rank's server, when it has one. Not a collective. Idempotent."""
        self.engine.shutdown()

    def _together(self, work: Callable[[], T], what: str) -> T:
        """Do something on every rank; ``EngineError`` on all when it fails on any."""
        own: list[T] = []
        self._all_together(lambda: own.append(work()), what)
        return own[0]

    def _all_together(self, work: Callable[[], Any], what: str) -> list[Any]:
        """The same, and every rank's result on every rank."""
        result, error = None, None
        try:
            result = work()
        except EngineError as caught:
            error = str(caught)
        found = self.platform.gather_objects((result, error), what)
        errors = [said for _, said in found if said is not None]
        if errors:
            raise EngineError(errors[0])
        return [each for each, _ in found]


class ReleasedMemory:
    """Whether an engine that fell asleep gave its device memory back: measured on the device, with a deadline.

    ``free_bytes``: of the device now. ``least``: bytes that must come back the first time (the engine's weights); from
    then on it is what came back the first time, caches included, for a server's memory does not change its size while
    it runs.
    """

    def __init__(self, free_bytes: Callable[[], int], least: int, timeout_s: float):
        self._free_bytes, self._least, self._timeout_s = free_bytes, least, timeout_s
        self._before: int | None = None
        self.expect_another()

    def expect_another(self) -> None:
        """Forget what came back: a server that was started again sized its caches by what was free then."""
        self._expected, self._is_first = self._least, True

    @classmethod
    def of_device(cls, device: torch.device, least: int, timeout_s: float) -> ReleasedMemory:
        """Measure a CUDA device."""

        def free_bytes() -> int:
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info(device)[0])

        return cls(free_bytes, least, timeout_s)

    def mark(self) -> None:
        """Measure before the engine falls asleep."""
        self._before = self._free_bytes()

    def wait(self) -> float:
        """Return the bytes that came back since ``mark``; raises ``EngineError`` when too few do in time."""
        assert self._before is not None
        end = time.monotonic() + self._timeout_s
        freed = self._free_bytes() - self._before
        while freed < _SHARE * self._expected:
            if time.monotonic() > end:
                raise EngineError(
                    f"sleep: {freed / 2**20:.0f} MiB of device memory came back within {self._timeout_s:g} s "
                    f"(rollout.server.control_timeout_s), {self._expected / 2**20:.0f} MiB were expected: another "
                    "process takes memory on this device, or the server's memory saver does not release it"
                )
            time.sleep(_SETTLE_S)
            freed = self._free_bytes() - self._before
        if self._is_first:
            time.sleep(_SETTLE_S)
            freed = max(freed, self._free_bytes() - self._before)
            self._expected, self._is_first = freed, False
        return float(freed)
