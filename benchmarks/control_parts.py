"""The parts of the control path that need no exchange between ranks: schedule, dispatcher, plans, digests, groups."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from reshard_plans import MODELS

from megatron_oreal.layout import Digester, RankGrid, make_plan, megatron_layout, sglang_layout
from megatron_oreal.rollout.engine import Request, SamplingParams
from megatron_oreal.rollout.sglang.client import loads, parse_generated
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher, DispatchSettings, Endpoint
from megatron_oreal.rollout.sglang.schedule import Schedule

Say = Callable[[str], None]
SPEC = MODELS["Qwen2.5-32B"]
LABEL, TOKENS, WINDOW = "benchmark:0", 64, 256
WORLDS = (8, 32, 128, 1024)
ENGINES, REQUESTS = (8, 32, 128, 1024), (1024, 4096, 16384)


# Schedule


class _Counted(Schedule):
    """Counts how often the load of an engine is looked at."""

    looks = 0

    def outstanding_tokens(self, engine: int) -> float:
        """As ``Schedule``'s."""
        self.looks += 1
        return super().outstanding_tokens(engine)


def schedule_steps(engines: int, requests: int) -> dict[str, Any]:
    """Give out and finish 16 samples a prompt, always the response that has been in flight for longest."""
    prompts = [i // 16 for i in range(requests)]
    schedule = _Counted(prompts, [100] * requests, engines, window=WINDOW, expected_new_tokens=4000)
    rng, running, assigned = np.random.default_rng(0), [], 0
    began = time.thread_time()
    while not schedule.done:
        while (given := schedule.next()) is not None:
            running.append(given.index)
            assigned += 1
        for index in running[: max(1, len(running) // 8)]:
            schedule.finished(index, int(rng.integers(100, 8000)))
        del running[: max(1, len(running) // 8)]
    return {
        "engines": engines,
        "requests": requests,
        "assigned": assigned,
        "looks": schedule.looks,
        "cpu_s": round(time.thread_time() - began, 4),
    }


def measure_schedule(say: Say) -> list[dict[str, Any]]:
    """Over engines and over requests."""
    rows = [schedule_steps(engines, requests) for engines in ENGINES for requests in REQUESTS]
    say(f"schedule: {rows[-1]}")
    return rows


# Dispatcher


def serve(ports: Any, engines: int) -> None:
    """One process with many end points that answer at once."""
    reply = json.dumps(reply_of(TOKENS)).encode()

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=reply, content_type="application/json")

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": LABEL})

    async def run() -> None:
        app = web.Application()
        app.add_routes([web.post("/generate", generate), web.get("/health", health), web.get("/model_info", info)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for _ in range(engines):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.put([address[1] for address in runner.addresses])
        await asyncio.Event().wait()

    asyncio.run(run())


def reply_of(tokens: int) -> dict[str, Any]:
    """What SGLang says to one request, as far as it is read."""
    ids = list(range(100_000, 100_000 + tokens))
    meta = {
        "finish_reason": {"type": "length", "length": tokens},
        "weight_version": LABEL,
        "output_token_logprobs": [[-0.123456789, token, None] for token in ids],
        "output_token_sampling_logprobs": [0.912345678 for _ in ids],
    }
    return {"output_ids": ids, "meta_info": meta}


@contextmanager
def endpoints(count: int) -> Iterator[list[Endpoint]]:
    """End points of one server process that ends with the block."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    server = context.Process(target=serve, args=(ports, count), daemon=True)
    server.start()
    try:
        yield [Endpoint(f"http://127.0.0.1:{port}", LABEL) for port in ports.get(timeout=120)]
    finally:
        server.terminate()
        server.join()


def dispatch(targets: Sequence[Endpoint], requests: int) -> dict[str, Any]:
    """One ``generate`` over all end points; CPU time of this process, all threads."""
    prompt = np.arange(100, dtype=np.int32)
    asked = [Request(prompt + i // 16, i) for i in range(requests)]
    sampling = SamplingParams(1.0, 0.9, 0, TOKENS, 16384, 7)
    dispatcher = Dispatcher(DispatchSettings(health_timeout_s=120.0))
    seen: list[int] = []
    try:
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        dispatcher.generate(
            targets,
            asked,
            sampling,
            vocab_size=SPEC.vocab_size,
            window=max(1, 1024 // len(targets)),
            on_complete=lambda index, completion: seen.append(index),
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    finally:
        dispatcher.close()
    assert sorted(seen) == list(range(requests)), "a request was not answered exactly once"
    return {"engines": len(targets), "requests": requests, "cpu_s": round(cpu, 3), "seconds": round(wall, 3)}


def parsing(tokens: int) -> float:
    """Microseconds of CPU for each token of a reply, from bytes to arrays."""
    content, sampling = json.dumps(reply_of(tokens)).encode(), SamplingParams(1.0, 0.9, 0, tokens, 2 * tokens, 7)
    times = []
    for _ in range(5):
        began = time.thread_time()
        parse_generated(loads(content), sampling)
        times.append(time.thread_time() - began)
    return round(min(times) / tokens * 1e6, 3)


def measure_dispatcher(say: Say) -> dict[str, Any]:
    """Over requests at the most engines and over engines at a middle number of requests; and the price of a token."""
    rows = []
    for engines, counts in ((128, REQUESTS), (32, REQUESTS[1:2]), (8, REQUESTS[1:2])):
        with endpoints(engines) as targets:
            dispatch(targets, 256)  # connections are made, code is warm
            rows += [dispatch(targets, count) for count in counts]
        say(f"dispatcher: {rows[-1]}")
    return {
        "tokens_a_response": TOKENS,
        "rows": rows,
        "parse_us_per_token": {str(tokens): parsing(tokens) for tokens in (1000, 4000, 16000)},
    }


# Plans and digests


def plan_sizes(world: int, engine_tp: int) -> dict[str, Any]:
    """32B, TP 8, the rest data-parallel, to engines of ``engine_tp``, as every rank plans it once; and its digests."""
    grid = RankGrid(8, 1, world // 8)
    source = megatron_layout(SPEC, tp=8, pp=1, vocab_divisor=1, transformer_impl="transformer_engine")
    dest = sglang_layout(SPEC, tp=engine_tp)
    places = {index: list(range(index, world, engine_tp)) for index in range(engine_tp)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, began = _peak_kb(), time.thread_time()
    plan = make_plan(source, grid.replicas(), dest, places, ranks_per_node=8, cached=False)
    planned = time.thread_time() - began
    grown = _peak_kb() - before
    began = time.thread_time()
    digester = Digester(source, grid.replicas(), dest, places, wire_dtype=torch.bfloat16)
    made = time.thread_time() - began
    lengths = [digester._length(rank) for rank in range(world)]
    vectors = _consistent(digester, grid, places)
    began = time.thread_time()
    report = digester.compare(vectors)
    compared = time.thread_time() - began
    assert not isinstance(report, str), report
    return {
        "ranks": world,
        "engine_tp": engine_tp,
        "copies": len(plan),
        "peers": plan.max_peers,
        "plan_cpu_s": round(planned, 3),
        "plan_peak_mb": round(grown / 1024, 1),
        "digester_cpu_s": round(made, 3),
        "digest_bytes_in": 8 * max(lengths) * (world - 1),
        "compare_cpu_s": round(compared, 3),
    }


def _peak_kb() -> int:
    """The most resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _consistent(digester: Digester, grid: RankGrid, places: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """What every rank would send if all held the same weights: a cell's digest is its number."""
    source, dest = digester._held
    source_of = {rank: index for index, ranks in grid.replicas().items() for rank in ranks}
    dest_of = {rank: index for index, ranks in places.items() for rank in ranks}
    return {
        rank: np.concatenate([[0, 0], source[source_of[rank]].numbers, dest[dest_of[rank]].numbers])
        for rank in sorted(source_of)
    }


def measure_plans(say: Say) -> list[dict[str, Any]]:
    """Each in a process of its own, for its memory."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for world in WORLDS:
        for engine_tp in (4, 8):
            with context.Pool(1) as pool:
                rows.append(pool.apply(plan_sizes, (world, engine_tp)))
            say(f"plan: {rows[-1]}")
    return rows


# Groups


def group_counts(world: int) -> dict[str, Any]:
    """What Megatron makes for 32B at TP 8 in a world of fake ranks: groups that every rank has to take part in making.

    ``own``: of these, those that this rank is in; ``peers``: ranks that it shares them with, counted in each. A run
    makes gloo groups beside some of them, which the fake backend cannot.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    made, peers, new_group = [0], [], dist.new_group

    def counted(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if ranks is None or 0 in ranks:
            peers.append((world if ranks is None else len(ranks)) - 1)
        return new_group(ranks, *arguments, **options)

    dist.new_group = counted
    began = time.thread_time()
    mpu.initialize_model_parallel(tensor_model_parallel_size=8, create_gloo_process_groups=False)
    taken = time.thread_time() - began
    return {"ranks": world, "made": made[0], "own": len(peers), "peers": sum(peers), "cpu_s": round(taken, 3)}


def measure_groups(say: Say) -> list[dict[str, Any]]:
    """Each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for world in WORLDS:
        with context.Pool(1) as pool:
            rows.append(pool.apply(group_counts, (world,)))
        say(f"groups: {rows[-1]}")
    return rows


PARTS: dict[str, Callable[[Say], Any]] = {
    "schedule": measure_schedule,
    "dispatcher": measure_dispatcher,
    "plans": measure_plans,
    "groups": measure_groups,
}


# Tables


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by the name of their place in the document."""
    steps, schedule, dispatcher = report["steps"], report["schedule"], report["dispatcher"]
    return {
        "steps": _step_table(steps),
        "orders": _order_table(steps["orders"]),
        "schedule": _rows(
            ["engines", "requests", "engine loads looked at", "CPU s"],
            [[row["engines"], row["requests"], row["looks"], row["cpu_s"]] for row in schedule],
        ),
        "dispatcher": _rows(
            ["end points", "requests", "CPU s", "CPU ms a request"],
            [
                [row["engines"], row["requests"], row["cpu_s"], f"{1000 * row['cpu_s'] / row['requests']:.2f}"]
                for row in dispatcher["rows"]
            ],
        ),
        "parsing": _rows(["tokens of a response", "CPU µs a token"], list(dispatcher["parse_us_per_token"].items())),
        "plans": _rows(
            [
                "ranks",
                "engine TP",
                "copies",
                "peers at most",
                "plan, CPU s",
                "plan, peak MB",
                "digests, CPU s",
                "digests to rank 0",
                "compare, CPU s",
            ],
            [
                [
                    row["ranks"],
                    row["engine_tp"],
                    row["copies"],
                    row["peers"],
                    row["plan_cpu_s"],
                    row["plan_peak_mb"],
                    row["digester_cpu_s"],
                    _bytes(row["digest_bytes_in"]),
                    row["compare_cpu_s"],
                ]
                for row in report["plans"]
            ],
        ),
        "groups": _rows(
            ["ranks", "groups made by every rank", "groups of rank 0", "its peers in them", "CPU s"],
            [[row["ranks"], row["made"], row["own"], row["peers"], row["cpu_s"]] for row in report["groups"]],
        ),
    }


def _step_table(steps: dict[str, Any]) -> str:
    most = steps["rows"][-1]
    pieces = dict(most["pieces"])
    pieces["sample, embedded engines"] = steps["embedded"]
    pieces["save, 300 tokens a response"] = steps["saving_300_tokens"]
    rows = []
    for name, ranks in pieces.items():
        for rank in ("rank 0", "last rank"):
            cost = ranks[rank]
            moved = [_bytes(cost["bytes_in"]), _bytes(cost["bytes_out"])]
            messages = f"{cost['messages_in']:,} / {cost['messages_out']:,}"
            rows.append([name, rank, *moved, messages, f"{cost['cpu_s']:.3f}"])
    return _rows(["piece", "rank", "in", "out", "messages in / out", "CPU s"], rows)


def _order_table(orders: dict[str, Any]) -> str:
    def cell(piece: str, cost: str) -> str:
        both = orders[piece][cost]
        return " / ".join("–" if both[axis] is None else f"{both[axis]:.2f}" for axis in ("ranks", "samples"))

    costs = ("bytes_in", "bytes_out", "messages_in", "messages_out", "cpu_s")
    return _rows(
        ["piece", "bytes in", "bytes out", "messages in", "messages out", "CPU time"],
        [[piece, *(cell(piece, cost) for cost in costs)] for piece in orders],
    )


def write_tables(path: Path, report: dict[str, Any]) -> None:
    """Replace the tables between their markers in a document."""
    text = path.read_text()
    for name, table in tables(report).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


__all__ = ["PARTS", "plan_sizes", "schedule_steps", "tables", "write_tables"]
