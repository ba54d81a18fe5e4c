"""All samples of a step through all engines: one queue, one event loop in a thread, every request answered once.

``schedule.py`` decides who gets what; here are the sockets, clocks and failures. An engine is in rotation while its
health endpoint answers; it is taken out when it does not, when it answers with other weights than asked for, or when
its connection breaks, and what it had goes to the others. It comes back by itself once it says that it has the weights
of the step: whoever owns the server restarts it and gives them to it (``engine.SglangEngine``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import queue
import random
import resource
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import numpy as np

from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang.client import (
    Health,
    RefusedError,
    ServerClient,
    UnreachableError,
    generate_body,
    has_filter,
)
from megatron_oreal.rollout.sglang.schedule import Assignment, Schedule

T = TypeVar("T")
_SPARE_DESCRIPTORS = 256
_RETURN_POLL_S = 1.0
_CONTROL_TIMEOUT_S = 5.0
_KEEPALIVE_S = 4.0
"""SGLang closes connections that were idle for 5 s (``SGLANG_TIMEOUT_KEEP_ALIVE``): a request must never be sent on one
that the server is closing, for a POST cannot be told from one that was lost."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and the label its weights must have (``meta_info.weight_version``) for a response to count."""

    url: str
    weight_version: str


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """``rollout.server``: deadlines in seconds; ``retry_delay_s`` doubles with every attempt, with jitter."""

    step_deadline_s: float = 3600.0
    request_timeout_s: float = 1800.0
    health_interval_s: float = 10.0
    health_timeout_s: float = 30.0
    recover_timeout_s: float = 300.0
    max_attempts: int = 4
    retry_delay_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """``tokens`` of the responses that are complete, and their rate since the call began."""

    done: int
    total: int
    in_flight: int
    tokens: int
    tokens_per_s: float
    engines: int


class Dispatcher:
    """Owns the event loop and the connections, which are reused over steps. ``close`` when done."""

    def __init__(self, settings: DispatchSettings | None = None):
        self.settings = settings or DispatchSettings()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dispatcher", daemon=True)
        self._thread.start()
        self._session = self.run(_open_session())
        self._foreign: int | None = None
        self._closed = False

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and return its result; for other threads than the loop's."""
        future = self.submit(work)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begin a coroutine on the loop; for other threads than the loop's."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def client(self, url: str) -> ServerClient:
        """Return a client whose methods are awaited on this loop (through ``run``)."""
        return ServerClient(url, self._session)

    def generate(
        self,
        endpoints: Sequence[Endpoint],
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        vocab_size: int,
        window: int,
        kept_mass: bool = True,
        on_complete: Callable[[int, Completion], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        enough: Callable[[], bool] | None = None,
        keep: bool = True,
    ) -> list[Completion]:
        """Draw one response per request, in request order; every engine has at most ``window`` of them at a time.

        Callbacks run in the calling thread: ``on_complete`` once for each request as it is done, ``on_progress`` about
        once a second, ``enough`` after each completion. When it returns True the requests that are not done are given
        up as empty completions with ``finish_reason="abort"``. That favours short responses: use it knowingly.
        ``keep`` False: ``on_complete`` alone gets the responses, nothing of them is held here, and none is returned.

        Raises ``EngineError`` when a request is refused or fails ``max_attempts`` times, when no engine is in rotation
        for ``recover_timeout_s``, or at the step's deadline; nothing is left running then.
        """
        if not requests:
            return []
        if not endpoints:
            raise EngineError("generate: there is no engine")
        if self._foreign is None:
            self._foreign = len(os.listdir("/proc/self/fd"))
        window = affordable_window(window, len(endpoints), self._foreign)
        events: queue.SimpleQueue[tuple[int, Completion] | Progress | None] = queue.SimpleQueue()
        clients = [self.client(endpoint.url) for endpoint in endpoints]
        bodies = _Bodies(requests, sampling, vocab_size, kept_mass and has_filter(sampling))
        step = _Step(self.settings, endpoints, clients, bodies, window, events.put)
        future = asyncio.run_coroutine_threadsafe(step.run(), self._loop)
        results: list[Completion | None] = [None] * len(requests)
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Progress):
                    if on_progress is not None:
                        on_progress(event)
                    continue
                index, completion = event
                if keep:
                    results[index] = completion
                if on_complete is not None:
                    on_complete(index, completion)
                if enough is not None and enough():
                    enough = None
                    self._loop.call_soon_threadsafe(step.stop_early)
            future.result()
        except BaseException:
            future.cancel()
            step.ended.wait(2 * _CONTROL_TIMEOUT_S)
            raise
        return [completion for completion in results if completion is not None]

    def close(self) -> None:
        """Cancel what still runs, close the connections and end the loop. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError):
            self.run(self._end(), _CONTROL_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONTROL_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:  # threads may wait for them
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CONTROL_TIMEOUT_S / 2)
        await self._session.close()


class _Bodies:
    """The JSON of each request, made when it is sent: 100,000 of them would be gigabytes."""

    def __init__(self, requests: Sequence[Request], sampling: SamplingParams, vocab_size: int, kept_mass: bool):
        self.requests, self.sampling, self.vocab_size, self.kept_mass = requests, sampling, vocab_size, kept_mass
        self._run, self._serial = uuid.uuid4().hex, itertools.count()

    def make(self, assignment: Assignment) -> dict[str, Any]:
        """SGLang aborts by prefix of the request id: all have one length, so that none is another's prefix.

        Nor is one used again: a server that has not noticed yet that a request was given up refuses its id.
        """
        return generate_body(
            self.requests[assignment.index],
            self.sampling,
            rid=f"{self._run}-{assignment.index:08d}-{next(self._serial):08d}",
            vocab_size=self.vocab_size,
            kept_mass=self.kept_mass,
        )


class _Step:
    """One ``generate`` call on the event loop."""

    def __init__(
        self,
        settings: DispatchSettings,
        endpoints: Sequence[Endpoint],
        clients: Sequence[ServerClient],
        bodies: _Bodies,
        window: int,
        emit: Callable[[tuple[int, Completion] | Progress | None], None],
    ):
        self.settings, self.endpoints, self.clients, self.bodies, self.emit = (
            settings,
            endpoints,
            clients,
            bodies,
            emit,
        )
        requests = bodies.requests
        self.schedule = Schedule(
            prompt_keys(requests),
            [len(request.prompt_ids) for request in requests],
            len(endpoints),
            window=window,
            expected_new_tokens=bodies.sampling.max_new_tokens,
            max_attempts=settings.max_attempts,
        )
        self.ended = threading.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._suspect = [asyncio.Event() for _ in endpoints]
        self._reasons = ["" for _ in endpoints]
        self._error: EngineError | None = None
        self._stopped_early = False
        self._none_in_since: float | None = None
        self._began = time.monotonic()
        self._tokens = 0

    async def run(self) -> None:
        """Until every request is done, or none of them ever will be; nothing of the step runs afterwards."""
        keepers = [asyncio.create_task(self._keep(engine)) for engine in range(len(self.endpoints))]
        keepers.append(asyncio.create_task(self._report()))
        for keeper in keepers:
            keeper.add_done_callback(self._watch)
        try:
            await self._feed()
        finally:
            given_up = bool(self._tasks)
            for task in [*keepers, *self._tasks.values()]:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([*keepers, *self._tasks.values()], timeout=_CONTROL_TIMEOUT_S)
            if given_up:
                await self._abort_all()
            if self._stopped_early and self._error is None:
                self._emit_given_up()
            self.ended.set()
            self.emit(None)
        if self._error is not None:
            raise self._error

    def stop_early(self) -> None:
        """Give up what is not done."""
        self._stopped_early = True
        self._changed.set()

    async def _feed(self) -> None:
        deadline = self._began + self.settings.step_deadline_s
        while not self.schedule.done and not self._stopped_early and self._error is None:
            self._changed.clear()
            while (assignment := self.schedule.next(time.monotonic())) is not None:
                task = self._tasks[assignment.index] = asyncio.create_task(self._one(assignment))
                task.add_done_callback(self._watch)
            now = time.monotonic()
            if now >= deadline:
                self._fail(
                    f"generate: rollout.server.step_deadline_s={self.settings.step_deadline_s:g} has passed with "
                    f"{self._count_done()} of {len(self.bodies.requests)} responses{self._state()}"
                )
                return
            due = self.schedule.wait_until()
            wait = min(deadline, due if due is not None and due > now else deadline, now + 1.0) - now
            await _wait(self._changed, wait)
            self._check_some_engine_is_in()

    async def _one(self, assignment: Assignment) -> None:
        """Send one request and file what comes of it."""
        index, engine = assignment.index, assignment.engine
        try:
            body = self.bodies.make(assignment)
            generated = await self.clients[engine].generate(body, self.bodies.sampling, self.settings.request_timeout_s)
        except RefusedError as error:
            self._fail(f"request {index}: {error}")
        except UnreachableError as error:
            self._suspect[engine].set()
            self._retry(assignment, str(error))
        else:
            expected, found = self.endpoints[engine].weight_version, generated.weight_version
            if found != expected:
                self._take_out(engine, f"it answered with weights {found!r} instead of {expected!r}")
            elif generated.completion.finish_reason == "abort":
                self._retry(assignment, f"{self.endpoints[engine].url} aborted it")
            elif self.schedule.finished(index, len(generated.completion.token_ids)):
                del self._tasks[index]
                self._tokens += len(generated.completion.token_ids)
                self.emit((index, generated.completion))
        self._changed.set()

    def _retry(self, assignment: Assignment, reason: str) -> None:
        if not self.schedule.is_in(assignment.engine):
            return  # taken out meanwhile, and this request with it
        delay = self.settings.retry_delay_s * 2 ** (assignment.attempt - 1) * random.uniform(0.5, 1.0)
        if self.schedule.failed(assignment.index, time.monotonic() + delay):
            del self._tasks[assignment.index]
        else:
            self._fail(f"request {assignment.index} failed {assignment.attempt} times, last: {reason}{self._state()}")

    async def _keep(self, engine: int) -> None:
        """Watch an engine: out of rotation when it does not answer, in again when it has the step's weights."""
        settings, client, wanted = self.settings, self.clients[engine], self.endpoints[engine].weight_version
        health = Health(client)
        while True:
            if self.schedule.is_in(engine):
                await _wait(self._suspect[engine], settings.health_interval_s)
                self._suspect[engine].clear()
                if complaint := await health.complaint(settings.health_timeout_s):
                    self._take_out(engine, complaint)
                continue
            await asyncio.sleep(_RETURN_POLL_S)
            try:
                info = await client.get("/model_info", _CONTROL_TIMEOUT_S)
                if (found := (info or {}).get("weight_version")) != wanted:
                    self._reasons[engine] = f"it has weights {found!r} instead of {wanted!r}"
                    continue
                await client.get("/health", settings.health_timeout_s)
            except EngineError as error:
                self._reasons[engine] = str(error)
                continue
            health = Health(client)
            self.schedule.put_in(engine)
            self._changed.set()

    def _take_out(self, engine: int, reason: str) -> None:
        if not self.schedule.is_in(engine):
            return
        self._reasons[engine] = reason
        for index in self.schedule.take_out(engine):
            task = self._tasks.pop(index, None)
            if task is not None and task is not asyncio.current_task():
                task.cancel()
            self.schedule.returned(index)
        self._changed.set()

    def _check_some_engine_is_in(self) -> None:
        if any(self.schedule.is_in(engine) for engine in range(len(self.endpoints))):
            self._none_in_since = None
            return
        now = time.monotonic()
        self._none_in_since = self._none_in_since or now
        if now - self._none_in_since > self.settings.recover_timeout_s:
            self._fail(
                f"generate: no engine has answered for rollout.server.recover_timeout_s="
                f"{self.settings.recover_timeout_s:g}{self._state()}"
            )

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            elapsed = time.monotonic() - self._began
            engines = sum(self.schedule.is_in(engine) for engine in range(len(self.endpoints)))
            total, in_flight = len(self.bodies.requests), self.schedule.num_in_flight
            rate = self._tokens / elapsed
            self.emit(Progress(self._count_done(), total, in_flight, self._tokens, rate, engines))

    async def _abort_all(self) -> None:
        """Tell the engines to drop what nobody waits for any more; those that do not listen are drained by a flush."""
        body = {"rid": "", "abort_all": True}
        calls = [client.post("/abort_request", body, _CONTROL_TIMEOUT_S) for client in self.clients]
        await asyncio.gather(*calls, return_exceptions=True)

    def _emit_given_up(self) -> None:
        empty = Completion(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), "abort")
        for index in range(len(self.bodies.requests)):
            if self.schedule.finished(index, 0):
                self.emit((index, empty))

    def _count_done(self) -> int:
        return len(self.bodies.requests) - self.schedule.num_waiting - self.schedule.num_in_flight

    def _watch(self, task: asyncio.Task[None]) -> None:
        """End the step with a task's error of a kind that nothing expects: it would wait for it until its deadline."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"generate: {error!r}{self._state()}")

    def _fail(self, message: str) -> None:
        if self._error is None:
            self._error = EngineError(message)
        self._changed.set()

    def _state(self) -> str:
        """What is wrong with which engine, for messages."""
        lines = [
            f"{endpoint.url}: {reason}"
            for endpoint, reason in zip(self.endpoints, self._reasons, strict=True)
            if reason
        ]
        return "; " + "; ".join(lines) if lines else ""


def prompt_keys(requests: Sequence[Request]) -> list[bytes]:
    """Keys equal for requests of the same prompt; those that share its array, as the K samples do, share one object."""
    keys = {id(request.prompt_ids): request.prompt_ids.tobytes() for request in requests}
    return [keys[id(request.prompt_ids)] for request in requests]


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, which the time's end does too.

    ``asyncio.wait_for`` makes a task for every wait, and before Python 3.12 it swallows a cancellation that comes in
    the moment in which the event is set.
    """
    alarm = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        alarm.cancel()


async def _open_session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def affordable_window(window: int, num_engines: int, held: int = 0) -> int:
    """At most what the process may have open at once, after raising its own limit as far as it may.

    ``held``: descriptors that others have: the sockets between the ranks alone may be thousands.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = held + _SPARE_DESCRIPTORS
    wanted = window * num_engines + spare
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        window = min(window, max(1, (soft - spare) // num_engines))
    return window
