"""The dispatcher against an HTTP server that speaks SGLang's JSON: throughput, memory and sockets at 10,000 requests
in flight.

    python benchmarks/dispatcher.py [--requests 40000] [--in-flight 10000] [--servers 2] [--out FILE.json]

The servers hold every request for ``--hold`` seconds, as generation would, so that all are open at once; how many they
can answer in a second at most is measured in the same run by a plain client: the same body again and again on as many
connections, replies read and not parsed. Both clients run in this process, one after the other; the servers have
processes of their own, on the same cores: rates depend on what else the machine does, CPU times a request hardly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from megatron_oreal.rollout.engine import EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang.client import generate_body
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher, DispatchSettings, Endpoint, affordable_window

LABEL = "benchmark:0"
VOCABULARY = 151_936
SAMPLING = SamplingParams(1.0, 0.9, 0, max_new_tokens=32, max_length=4096, stop_token_id=7)


def serve(port: int, hold_s: float) -> None:
    """One server process."""
    connections: set[Any] = set()

    async def generate(request: web.Request) -> web.Response:
        connections.add(request.transport)
        body = await request.json()
        await asyncio.sleep(hold_s)
        count = body["sampling_params"]["max_new_tokens"]
        tokens = [(sum(body["input_ids"]) + i) % VOCABULARY for i in range(count)]
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": count},
            "weight_version": LABEL,
            "completion_tokens": count,
            "output_token_logprobs": [[-0.1234567, token, None] for token in tokens],
            "output_token_sampling_mask": [[] for _ in tokens],
            "output_token_sampling_logprobs": [0.951234 for _ in tokens],
        }
        return web.json_response({"output_ids": tokens, "meta_info": meta})

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def opened(request: web.Request) -> web.Response:
        return web.json_response(len(connections))

    app = web.Application()
    app.add_routes([web.post("/generate", generate), web.get("/health", health), web.get("/opened", opened)])
    web.run_app(app, host="127.0.0.1", port=port, print=None, backlog=16384, access_log=None)


async def plain_client(urls: list[str], in_flight: int, total: int, body: bytes) -> tuple[float, float]:
    """Requests a second of a loop that does nothing else, and its own CPU time a request in milliseconds."""
    left = iter(range(total))
    connector = aiohttp.TCPConnector(limit=0)

    async def worker(url: str) -> None:
        for _ in left:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as reply:
                assert reply.status == 200
                await reply.read()

    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker(f"{urls[i % len(urls)]}/generate") for i in range(in_flight)))
        return total / (time.perf_counter() - began), (time.process_time() - cpu) / total * 1000


class Watch:
    """The largest number of sockets and the largest memory of this process while it runs."""

    def __init__(self) -> None:
        self.sockets, self.rss_mb = 0, 0.0
        self._on = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._on:
            self.rss_mb = max(self.rss_mb, rss_mb())
            self.sockets = max(self.sockets, num_sockets())
            time.sleep(0.25)

    def stop(self) -> None:
        """End the watch."""
        self._on = False
        self._thread.join()


def rss_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_sockets() -> int:
    """Open sockets of this process."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{entry}").startswith("socket:")
        except OSError:
            continue
    return count


def make_requests(total: int) -> list[Request]:
    """16 samples a prompt of 64 tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, 64).astype(np.int32) for _ in range(-(-total // 16))]
    return [Request(prompts[i // 16], i) for i in range(total)]


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def wait_for(urls: list[str], dispatcher: Dispatcher) -> None:
    """Until every server answers."""
    end = time.monotonic() + 120
    for url in urls:
        while True:
            try:
                dispatcher.run(dispatcher.client(url).get("/health", 1.0))
                break
            except EngineError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


@contextlib.contextmanager
def running_servers(count: int, hold_s: float) -> Iterator[list[str]]:
    """The URLs of server processes that end with the block."""
    context = multiprocessing.get_context("spawn")
    ports = free_ports(count)
    servers = [context.Process(target=serve, args=(port, hold_s), daemon=True) for port in ports]
    for server in servers:
        server.start()
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for server in servers:
            server.terminate()
            server.join()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Plain client, dispatcher, plain client again."""
    requests = make_requests(options.requests)
    window = affordable_window(-(-options.in_flight // options.servers), options.servers)
    body = generate_body(requests[0], SAMPLING, rid="0" * 50, vocab_size=VOCABULARY, kept_mass=True)
    with running_servers(options.servers, options.hold) as urls:
        dispatcher = Dispatcher(DispatchSettings(health_timeout_s=120.0))
        try:
            wait_for(urls, dispatcher)
            plain = [run_plain(urls, window, options.requests, body)]
            found = dispatch(dispatcher, urls, requests, window)
        finally:
            dispatcher.close()  # its idle connections would count against the plain client's
        plain.append(run_plain(urls, window, options.requests, body))
    return {
        "requests": options.requests,
        "servers": options.servers,
        "window_per_server": window,
        "hold_s": options.hold,
        "plain_client_requests_per_s": [round(rate) for rate, _ in plain],
        "plain_client_cpu_ms_per_request": [round(cpu, 3) for _, cpu in plain],
        "ratio_to_the_servers_limit": round(found["dispatcher_requests_per_s"] / max(rate for rate, _ in plain), 3),
        **found,
    }


def run_plain(urls: list[str], window: int, total: int, body: dict[str, Any]) -> tuple[float, float]:
    return asyncio.run(plain_client(urls, window * len(urls), total, json.dumps(body).encode()))


def dispatch(dispatcher: Dispatcher, urls: list[str], requests: list[Request], window: int) -> dict[str, Any]:
    """One ``generate`` call under watch."""
    before = dispatcher.run(count_opened(dispatcher, urls))
    gc.collect()
    rss_before, watch, seen = rss_mb(), Watch(), Counter()
    in_flight = [0]
    began, cpu = time.perf_counter(), time.process_time()
    completions = dispatcher.generate(
        [Endpoint(url, LABEL) for url in urls],
        requests,
        SAMPLING,
        vocab_size=VOCABULARY,
        window=window,
        on_complete=lambda index, completion: seen.update([index]),
        on_progress=lambda state: in_flight.append(state.in_flight),
    )
    rate, cpu = len(requests) / (time.perf_counter() - began), (time.process_time() - cpu) / len(requests)
    watch.stop()
    assert seen == Counter(range(len(requests))), "a request was not answered exactly once"
    return {
        "dispatcher_requests_per_s": round(rate),
        "dispatcher_cpu_ms_per_request": round(cpu * 1000, 3),
        "largest_in_flight_seen": max(in_flight),
        "sockets_at_most": watch.sockets,
        "connections_opened": dispatcher.run(count_opened(dispatcher, urls)) - before,
        "rss_before_mb": round(rss_before),
        "rss_at_most_mb": round(watch.rss_mb),
        "of_which_results_mb": round(sum(c.token_ids.nbytes + c.logp.nbytes for c in completions) / 2**20, 1),
    }


async def count_opened(dispatcher: Dispatcher, urls: list[str]) -> int:
    total = 0
    for url in urls:
        async with dispatcher._session.get(f"{url}/opened") as reply:
            total += int(await reply.text())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--hold", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dispatcher.json")
    options = parser.parse_args()
    result = {
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "aiohttp": aiohttp.__version__,
        "load_average_before": round(os.getloadavg()[0], 1),
        **measure(options),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
