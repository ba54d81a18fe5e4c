"""Planned reshard against gathering everything, from Megatron ranks to engine ranks, over gloo on this machine.

    python benchmarks/reshard.py --output benchmarks/results/reshard.json

One bf16 model, the same ranks and the same process: each repeat runs all methods in turn, in an order that rotates, and
a run takes as long as its slowest rank. Both methods keep their buffers from one run to the next, write the same engine
tensors, and are compared bit for bit.

* ``planned``: ``Resharder.run``: every rectangle goes from one rank that has it to each rank that lacks it.
* ``verified``: the same, then ``Digester.check``, what training does at every publish.
* ``gathered``: ``Gatherer.run``: all-gather of every shard to every rank of a replica in buckets of the same size, HF
  tensors put together out of the buckets, the engine shard taken out of the HF tensors.

``received_mb`` is what the rank that receives most gets over the wire, without gloo's own overhead. With more ranks
than cores the times are of processes that wait for each other; ratios within a repeat are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.layout import (
    Digester,
    Layout,
    ModelSpec,
    RankGrid,
    Resharder,
    RopeSpec,
    ShardLayout,
    make_plan,
    megatron_layout,
    sglang_layout,
)
from megatron_oreal.layout.gather import Gatherer
from megatron_oreal.telemetry.machine import processor_and_cores

BUCKET_BYTES = 32 * 2**20
SPEC = ModelSpec(
    family="qwen2",
    num_layers=8,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=16384,
    max_position_embeddings=4096,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rope=RopeSpec(1e6),
)
CASES: dict[str, tuple[RankGrid, int]] = {
    "TP2 -> engine TP1 on every rank": (RankGrid(2, 1, 1), 1),
    "TP2 -> engine TP2": (RankGrid(2, 1, 1), 2),
    "PP2 -> engine TP2": (RankGrid(1, 2, 1), 2),
    "TP2 PP2 -> engine TP2, twice": (RankGrid(2, 2, 1), 2),
    "TP2 PP2 -> engine TP4": (RankGrid(2, 2, 1), 4),
    "TP4 -> engine TP1 on every rank": (RankGrid(4, 1, 1), 1),
    "TP2 DP2 -> engine TP2, twice": (RankGrid(2, 1, 2), 2),
}


def shard_tensors(shard: ShardLayout, fill: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    return {name: fill(shape) for name, shape in shard.params}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One case on this rank; times are those of the slowest rank."""
    grid, engine_tp = CASES[name]
    rank = dist.get_rank()
    source = megatron_layout(SPEC, tp=grid.tp, pp=grid.pp)
    engine = sglang_layout(SPEC, tp=engine_tp)
    places = grid.replicas(), engine, {i: range(i, grid.world_size, engine_tp) for i in range(engine_tp)}
    torch.manual_seed(grid.model_index(rank))  # the replicas of a shard are alike
    live = shard_tensors(source.shards[grid.model_index(rank)], lambda shape: torch.randn(shape).bfloat16())
    _agree_on_copies(source, grid, live)
    began = time.perf_counter()
    plan = make_plan(source, *places, cached=False)
    plan_seconds = time.perf_counter() - began
    shard = engine.shards[rank % engine_tp]
    held, gathered = (shard_tensors(shard, lambda shape: torch.empty(shape, dtype=torch.bfloat16)) for _ in range(2))
    resharder = Resharder(plan, rank, wire_dtype=torch.bfloat16, bucket_bytes=BUCKET_BYTES)
    digester = Digester(source, *places, wire_dtype=torch.bfloat16)
    gatherer = Gatherer(
        source, grid.replicas(), engine, rank % engine_tp, rank, dtype=torch.bfloat16, bucket_bytes=BUCKET_BYTES
    )

    def verified() -> None:
        resharder.run(live, held)
        digester.check(rank, 0, live, held)

    methods: dict[str, Callable[[], object]] = {
        "planned": lambda: resharder.run(live, held),
        "verified": verified,
        "gathered": lambda: gatherer.run(live, gathered),
    }
    for run in methods.values():  # allocates the buffers, touches the memory
        run()
    assert all(torch.equal(held[key], gathered[key]) for key in held), "the methods disagree"
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for repeat in range(repeats):
        order = list(methods)
        for method in order[repeat % 3 :] + order[: repeat % 3]:
            seconds[method].append(slowest(methods[method]))
    traffic = resharder.run(live, held)
    return {
        "case": name,
        "ranks": grid.world_size,
        "received_mb": {
            "planned": largest(traffic.received) / 1e6,
            "gathered": largest(gatherer.received) / 1e6,
        },
        "staged_mb": largest(traffic.staged) / 1e6,
        "seconds": {method: spread(times) for method, times in seconds.items()},
        "gathered_over_planned": ratios(seconds["gathered"], seconds["planned"]),
        "gathered_over_verified": ratios(seconds["gathered"], seconds["verified"]),
        "verified_over_planned": ratios(seconds["verified"], seconds["planned"]),
        "plan_seconds": round(plan_seconds, 3),
    }


def _agree_on_copies(source: Layout, grid: RankGrid, live: dict[str, Tensor]) -> None:
    """Tensor-parallel ranks hold copies of the norms: one value for all, so that every method gives the same bits."""
    for name, shape in source.shards[0].params + source.shards[-1].params:
        if len(shape) == 1 and "norm" in name and name in live:
            live[name].fill_(1.0)


def slowest(run: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def largest(count: int) -> int:
    value = torch.tensor(count)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def digest_rate() -> dict[str, float]:
    """GB of parameters hashed a second of one core, by its CPU time."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        spec = megatron_layout(SPEC, tp=1, pp=1)
        tensors = shard_tensors(spec.shards[0], lambda shape, dtype=dtype: torch.randn(shape).to(dtype))  # type: ignore[misc]
        digester = Digester(spec, {0: [0]}, spec, {0: [0]}, wire_dtype=dtype)
        digester.hash_source(0, tensors)
        began = time.process_time()
        digester.hash_source(0, tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        rates[str(dtype).removeprefix("torch.")] = round(size / (time.process_time() - began) / 1e9, 2)
    return rates


def worker(cases: list[str], repeats: int, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [measure(case, repeats) for case in cases]
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(rows))
    dist.destroy_process_group()


def launch(world: int, cases: list[str], repeats: int) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        command += ["--worker", file.name, "--repeats", str(repeats), "--cases", *cases]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.cases, args.repeats, args.worker)
        return
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "what": "seconds and bytes from Megatron ranks to engine ranks over gloo; see the script's docstring",
        "model": f"Qwen2 shape, {SPEC.num_parameters() / 1e6:.1f} M parameters, bf16, "
        f"{2 * SPEC.num_parameters() / 1e6:.0f} MB, buckets of {BUCKET_BYTES // 2**20} MiB",
        "hardware": processor_and_cores(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "repeats": args.repeats,
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "digest_gb_per_core_s": digest_rate(),
        "rows": [],
    }
    for world in sorted({CASES[case][0].world_size for case in args.cases}):
        cases = [case for case in args.cases if CASES[case][0].world_size == world]
        for row in launch(world, cases, args.repeats):
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
    report["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
