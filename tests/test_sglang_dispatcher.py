"""The dispatcher over several HTTP servers that speak SGLang's JSON, each with failures of its own kind.

SGLang itself fails in ``test_sglang_faults.py``; here are more servers, and more failures, than a test machine can run.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import os
import re
import resource
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from sglang_server import needs_sglang

from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang import dispatcher as module
from megatron_oreal.rollout.sglang.client import signed_seed
from megatron_oreal.rollout.sglang.dispatcher import (
    Dispatcher,
    DispatchSettings,
    Endpoint,
    Progress,
    affordable_window,
    prompt_keys,
)

LABEL = "run:3"
SAMPLING = SamplingParams(1.0, 0.9, 0, max_new_tokens=8, max_length=64, stop_token_id=None)
SETTINGS = DispatchSettings(
    step_deadline_s=200, request_timeout_s=150, health_interval_s=0.3, health_timeout_s=60, recover_timeout_s=100
)
"""Patient: a pause of the machine is no failure of a server."""
IMPATIENT = replace(SETTINGS, health_timeout_s=0.3)
"""Finds out a server that hangs; one that is only slow comes back."""


class Server:
    """Answers a request with tokens that its seed determines. ``faults`` are consumed, one a request, first to last.

    ``hanging``: it answers nothing; ``holds``: no request for tokens while this is so.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.label, self.delay_s, self.hanging = LABEL, 0.0, False
        self.holds: Callable[[], bool] = lambda: False
        self.served: list[int] = []
        self.ids: set[str] = set()
        self.concurrent = self.most_concurrent = 0
        self.aborts = 0
        self.connections: set[int] = set()
        self._kept: list[object] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if id(request.transport) not in self.connections:
            self.connections.add(id(request.transport))
            self._kept.append(request.transport)  # so that no other one gets its id
        body = await request.json()
        seed = body["sampling_params"]["sampling_seed"]
        if body["rid"] in self.ids:  # SGLang: while it has not noticed yet that the client has gone
            return web.json_response({"error": {"message": "Duplicate request ID detected"}}, status=400)
        self.ids.add(body["rid"])
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        try:
            await asyncio.sleep(self.delay_s)
            while self.hanging or self.holds():
                await asyncio.sleep(0.05)
            fault = self.faults.pop(0) if self.faults else ""
            if fault == "reset":
                request.transport.close()
                return web.Response()
            if fault in ("400", "500"):
                return web.json_response({"error": {"message": "the input is too long"}}, status=int(fault))
            if fault == "garbage":
                return web.json_response({"output_ids": [1, 2]})
            if fault == "overflow":
                meta = {"finish_reason": {"type": "length"}, "weight_version": self.label}
                return web.json_response({"output_ids": [2**40], "meta_info": meta})
            self.served.append(seed)
            tokens = [(seed + i) % 97 for i in range(1 + seed % 8)]
            kind = "abort" if fault == "abort" else "length"
            meta = {
                "finish_reason": {"type": kind},
                "weight_version": "run:2" if fault == "stale" else self.label,
                "output_token_logprobs": [[-0.5, token, None] for token in tokens],
                "output_token_sampling_logprobs": [0.75 for _ in tokens],
            }
            return web.json_response({"output_ids": tokens, "meta_info": meta})
        finally:
            self.concurrent -= 1

    async def health(self, request: web.Request) -> web.Response:
        while self.hanging:
            await asyncio.sleep(0.05)
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborts += 1
        return web.Response()


class Cluster:
    """Servers on an event loop of their own."""

    def __init__(self, count: int) -> None:
        self.servers = [Server() for _ in range(count)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runners: list[web.AppRunner] = []
        self.endpoints = [Endpoint(self._call(self._start(server)), LABEL) for server in self.servers]
        self.dispatcher = Dispatcher(SETTINGS)

    async def _start(self, server: Server) -> str:
        app = web.Application()
        app.add_routes(
            [
                web.post("/generate", server.generate),
                web.get("/health", server.health),
                web.get("/model_info", server.model_info),
                web.post("/abort_request", server.abort),
            ]
        )
        runner = web.AppRunner(app)
        self._runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def generate(self, count: int, *, samples: int = 4, window: int = 16, **options) -> list[Completion]:
        self.seen: Counter[int] = Counter()
        requests = [Request(np.array([1 + i // samples, 2], dtype=np.int32), i) for i in range(count)]
        return self.dispatcher.generate(
            self.endpoints,
            requests,
            SAMPLING,
            vocab_size=97,
            window=window,
            on_complete=lambda index, completion: self.seen.update([index]),
            **options,
        )

    def check(self, completions: list[Completion], count: int) -> None:
        assert self.seen == Counter(range(count))
        for seed, completion in enumerate(completions):
            assert completion.token_ids.tolist() == [(seed + i) % 97 for i in range(1 + seed % 8)]
            assert completion.kept_mass == 0.75
            assert completion.logp.tolist() == [-0.5] * (1 + seed % 8)

    def close(self) -> None:
        self.dispatcher.close()
        for server, runner in zip(self.servers, self._runners, strict=True):
            server.hanging, server.holds = False, lambda: False
            self._call(runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONTROL_TIMEOUT_S", 60.0)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(module, "_KEEPALIVE_S", 600.0)  # these servers do not close what is idle
    cluster = Cluster(3)
    yield cluster
    cluster.close()


def test_requests_are_shared_within_the_windows_and_connections_are_reused(cluster):
    for server in cluster.servers:
        server.delay_s = 0.005
    for _ in range(2):
        cluster.check(cluster.generate(400, window=8), 400)
    for server in cluster.servers:
        assert server.most_concurrent <= 8
        assert len(server.served) > 2 * 400 / 3 / 2
        assert len(server.connections) <= 8 + 1


@pytest.mark.parametrize("fault", ["reset", "500", "garbage", "abort"])
def test_a_failing_request_is_answered_by_another_server(cluster, fault):
    cluster.servers[1].faults = [fault] * 3
    cluster.check(cluster.generate(60), 60)
    assert sum(len(server.served) for server in cluster.servers) == 60 + 3 * (fault == "abort")


def test_a_server_with_other_weights_gets_nothing_more_and_its_answers_do_not_count(cluster):
    cluster.servers[0].label = "run:2"
    cluster.check(cluster.generate(200), 200)
    assert len(cluster.servers[0].served) <= 16, "at most its first window"


def test_a_server_that_returns_with_the_right_weights_gets_requests_again(cluster):
    late, *others = cluster.servers
    late.label = "run:2"
    for server in others:  # they leave the other half to it
        server.holds = lambda: sum(len(other.served) for other in others) >= 100 and len(late.served) <= 16

    def progress(state: Progress) -> None:
        if state.done > 50:
            late.label = LABEL

    cluster.check(cluster.generate(200, window=8, on_progress=progress), 200)
    assert len(late.served) > 16


def test_a_hanging_server_loses_its_requests_to_the_others(cluster):
    cluster.servers[2].hanging = True
    cluster.dispatcher.settings = replace(IMPATIENT, request_timeout_s=3600)
    cluster.check(cluster.generate(120), 120)
    assert cluster.servers[2].served == []


def test_a_server_that_only_stalled_gets_its_requests_again_under_other_ids(cluster):
    cluster.endpoints = cluster.endpoints[:1]
    cluster.dispatcher.settings = IMPATIENT
    stalled = cluster.servers[0]
    stalled.hanging = True

    def progress(state: Progress) -> None:
        if state.engines == 0:
            stalled.hanging = False

    cluster.check(cluster.generate(40, on_progress=progress), 40)
    assert len(stalled.ids) > 40


def test_a_refused_request_ends_the_step_with_the_servers_words(cluster):
    cluster.servers[0].faults = ["400"]
    with pytest.raises(EngineError, match=r"request \d+: .*/generate answered 400: .*the input is too long"):
        cluster.generate(60)


def test_a_request_that_fails_everywhere_ends_the_step(cluster):
    for server in cluster.servers:
        server.faults = ["garbage"] * 50
    with pytest.raises(EngineError, match=r"request 0 failed 4 times, last: .*unexpected reply"):
        cluster.generate(1)


def test_a_reply_that_nothing_expects_ends_the_step_at_once(cluster):
    for server in cluster.servers:
        server.faults = ["overflow"]
    with pytest.raises(EngineError, match=r"generate: OverflowError"):
        cluster.generate(3, samples=1)


def test_responses_that_are_not_kept_are_completed_all_the_same(cluster):
    assert cluster.generate(30, keep=False) == []
    assert cluster.seen == Counter(range(30))


def test_without_any_server_the_step_ends_after_the_recovery_timeout(cluster):
    cluster.dispatcher.settings = replace(IMPATIENT, recover_timeout_s=3)
    for server in cluster.servers:
        server.hanging = True
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no engine has answered for rollout\.server\.recover_timeout_s=3; http"):
        cluster.generate(10)
    assert time.monotonic() - began > 3


def test_giving_up_the_rest_tells_the_servers_to_drop_it(cluster):
    servers = cluster.servers
    for server in servers:  # after a third of the requests to the abort
        server.holds = lambda: sum(len(each.served) for each in servers) >= 100 and not servers[0].aborts
    got = cluster.generate(300, window=8, enough=lambda: cluster.seen.total() >= 24)
    assert cluster.seen == Counter(range(300))
    reasons = Counter(completion.finish_reason for completion in got)
    assert 24 <= reasons["length"] < 300
    assert reasons["abort"] == 300 - reasons["length"]
    assert [server.aborts for server in cluster.servers] == [1, 1, 1]


def test_no_thread_task_or_socket_outlives_the_dispatcher():
    threads, before = set(threading.enumerate()), sockets()
    cluster = Cluster(2)
    cluster.generate(50)
    cluster.close()
    end = time.monotonic() + 60
    while set(threading.enumerate()) - threads and time.monotonic() < end:
        time.sleep(0.05)
    assert set(threading.enumerate()) - threads == set()
    assert sockets() - before == set()
    assert asyncio.all_tasks(cluster.dispatcher._loop) == set()


def test_a_thread_that_waits_for_the_dispatcher_does_not_outlive_it():
    dispatcher = Dispatcher(SETTINGS)
    begun = threading.Event()

    async def work() -> None:
        begun.set()
        await asyncio.sleep(3600)

    def wait() -> None:
        with contextlib.suppress(concurrent.futures.CancelledError):
            dispatcher.run(work())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert begun.wait(60)
    dispatcher.close()
    thread.join(60)
    assert not thread.is_alive()


def test_requests_in_flight_leave_room_for_the_descriptors_that_others_have(cluster, monkeypatch):
    limits = [1024, 2000]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.__setitem__(slice(2), wanted))
    assert affordable_window(512, 4, held=1000) == (2000 - 1000 - 256) // 4
    assert limits == [2000, 2000]
    assert affordable_window(100, 4, held=1000) == 100
    held = []

    def keep(window: int, engines: int, others: int) -> int:
        held.append((others, len(os.listdir("/proc/self/fd"))))
        return window

    monkeypatch.setattr(module, "affordable_window", keep)
    for _ in range(2):
        cluster.generate(50)
    assert held[0][0] == held[1][0], "its own connections are not the others'"
    assert 0 < held[0][0] <= held[0][1]


def test_the_samples_of_a_prompt_cost_the_memory_of_one_prompt():
    prompt, equal, other = (np.full(2**16, value, dtype=np.int32) for value in (1, 1, 2))
    requests = [Request(ids, seed) for ids in (prompt, equal, other) for seed in range(64)]
    tracemalloc.start()
    keys = prompt_keys(requests)
    assert tracemalloc.get_traced_memory()[1] < 8 * prompt.nbytes
    tracemalloc.stop()
    assert set(keys[:128]) == {prompt.tobytes()}
    assert set(keys[128:]) == {other.tobytes()}


@needs_sglang
def test_idle_connections_are_closed_before_sglang_closes_them():
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations
    source = (Path(package) / "srt" / "environ.py").read_text()
    assert int(re.search(r"SGLANG_TIMEOUT_KEEP_ALIVE = EnvInt\((\d+)\)", source)[1]) > module._KEEPALIVE_S


def sockets() -> set[str]:
    """Of this process, by numbers that none has again."""
    links = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{entry}"))
    return {link for link in links if link.startswith("socket:")}


def test_seeds_travel_as_signed_64_bit_numbers():
    assert [signed_seed(seed) for seed in (0, 2**63 - 1, 2**63, 2**64 - 1, -1, 2**64)] == [
        0,
        2**63 - 1,
        -(2**63),
        -1,
        -1,
        0,
    ]
