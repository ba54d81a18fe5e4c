"""How well a step's sequences are packed and balanced, against bounds and against the ways of other trainers.

    python benchmarks/packing.py --output benchmarks/results/packing.json

Lengths are log-normal, cut at the context length, as responses of a reasoning model are; every figure is a mean over
draws. Nothing runs on a device: loads are counted in the floating-point operations of ``WorkModel``.

The ways: ``sequential`` (rank by rank in the order given, a micro-batch closed when the next sequence does not fit),
``first-fit`` (first-fit-decreasing over the whole batch, its micro-batches dealt to the ranks, heaviest first),
``karmarkar-karp`` (the largest differencing method on the ranks' work, then on each rank's micro-batches, their number
from the tokens as verl has it), ``ours`` (``plan_microbatches``).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_oreal.data.packing import PASS_TOKENS, WorkModel, plan_microbatches

Plan = list[list[list[int]]]
"""Sequence indices by data-parallel rank and micro-batch."""
BUDGET = 16384
MODELS = {  # matrix parameters and attention width of Qwen2.5: layers * heads * head dimension
    "7B": WorkModel(matmul_params=7_070_000_000, attention_width=28 * 3584),
    "32B": WorkModel(matmul_params=31_980_000_000, attention_width=64 * 5120),
}
# name, model, sequences, data-parallel ranks, pipeline stages, mean length, sigma of its logarithm
CASES = [
    ("7B on 32 GPUs, TP 4", "7B", 128, 8, 1, 6000, 0.6),
    ("7B on 64 GPUs, TP 4", "7B", 128, 16, 1, 6000, 0.6),
    ("7B on 32 GPUs, TP 4, few kept", "7B", 40, 8, 1, 6000, 0.6),
    ("7B on 32 GPUs, TP 4, short", "7B", 128, 8, 1, 2000, 0.8),
    ("32B on 128 GPUs, TP 8", "32B", 128, 16, 1, 6000, 0.6),
    ("32B on 128 GPUs, TP 8, PP 2", "32B", 128, 8, 2, 6000, 0.6),
    ("32B on 128 GPUs, TP 8, PP 4", "32B", 128, 4, 4, 6000, 0.6),
    ("32B on 128 GPUs, TP 8, PP 4, short", "32B", 128, 4, 4, 2000, 0.8),
    ("7B on 32 GPUs, TP 4, nothing filtered", "7B", 1024, 8, 1, 6000, 0.6),
]
SCALES = [(1024, 8, 1), (2048, 128, 1), (2048, 128, 4), (16384, 16, 1), (16384, 128, 1), (16384, 128, 4)]


def draw_lengths(count: int, mean: float, sigma: float, seed: int) -> list[int]:
    """Log-normal lengths with this mean before they are cut to [64, BUDGET]."""
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, 64, BUDGET).astype(int).tolist()


def sequential(lengths: Sequence[int], costs: Sequence[int], ranks: int) -> Plan:
    """Equal numbers of sequences a rank, packed in order."""
    plan: Plan = []
    for members in np.array_split(np.arange(len(lengths)), ranks):
        batches: list[list[int]] = []
        room = 0
        for i in members.tolist():
            if lengths[i] > room:
                batches.append([])
                room = BUDGET
            batches[-1].append(i)
            room -= lengths[i]
        plan.append(batches)
    return plan


def first_fit(lengths: Sequence[int], costs: Sequence[int], ranks: int) -> Plan:
    """First-fit-decreasing over all sequences, then the heaviest micro-batch to the lightest rank."""
    batches: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for b, room in enumerate(rooms):
            if lengths[i] <= room:
                batches[b].append(i)
                rooms[b] -= lengths[i]
                break
        else:
            batches.append([i])
            rooms.append(BUDGET - lengths[i])
    count = -(-len(batches) // ranks)
    plan: Plan = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for batch in sorted(batches, key=lambda batch: -sum(costs[i] for i in batch)):
        lightest = min((r for r in range(ranks) if len(plan[r]) < count), key=lambda r: loads[r])
        plan[lightest].append(batch)
        loads[lightest] += sum(costs[i] for i in batch)
    return plan


def largest_differencing(costs: Sequence[int], indices: Sequence[int], parts: int) -> list[list[int]]:
    """Karmarkar and Karp (1982) for ``parts`` sets: the two partial partitions that differ most are laid opposite."""
    heap = []
    for order, i in enumerate(indices):
        sets: list[tuple[int, list[int]]] = [(costs[i], [i])] + [(0, []) for _ in range(parts - 1)]
        heap.append((-costs[i], order, sets))
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(x + y, m + n) for (x, m), (y, n) in zip(a, reversed(b), strict=True)]
        joined.sort(key=lambda each: -each[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], order, joined))
        order += 1
    return [members for _, members in heap[0][2]] if heap else [[] for _ in range(parts)]


def karmarkar_karp(lengths: Sequence[int], costs: Sequence[int], ranks: int) -> Plan:
    """Ranks by work; on each rank as many micro-batches as the tokens of the fullest rank ask for."""
    members = largest_differencing(costs, range(len(lengths)), ranks)
    count = max(-(-sum(lengths[i] for i in rank) // BUDGET) for rank in members)
    return [largest_differencing(costs, rank, count) for rank in members]


def ours(work: WorkModel, stages: int) -> Callable[[Sequence[int], Sequence[int], int], Plan]:
    """The trainer's."""
    return lambda lengths, costs, ranks: (
        plan_microbatches(lengths, dp_size=ranks, max_tokens=BUDGET, work=work, pipeline_stages=stages).ranks
    )


def measure(plan: Plan, lengths: Sequence[int], costs: Sequence[int], stages: int, pass_cost: int) -> dict[str, float]:
    """``time``: of the slowest rank over that of equal shares in the fewest micro-batches, the longest sequence whole.

    Every micro-batch costs ``pass_cost`` besides its sequences; the heaviest is waited for once a further stage.
    """
    loads = [[sum(costs[i] for i in batch) for batch in rank] for rank in plan]
    totals = [sum(rank) for rank in loads]
    count = max(map(len, plan))
    tokens = [sum(lengths[i] for i in batch) for rank in plan for batch in rank]
    least = -(-sum(lengths) // (BUDGET * len(plan)))
    slowest = max(sum(rank) + len(rank) * pass_cost + (stages - 1) * (max(rank) + pass_cost) for rank in loads)
    ideal = sum(totals) / len(plan) + least * pass_cost + (stages - 1) * (max(costs) + pass_cost)
    return {
        "balance": max(totals) * len(plan) / sum(totals),
        "microbatches": count,
        "microbatches_least": least,
        "idle_microbatches": sum(count - sum(map(bool, rank)) for rank in plan),
        "over_budget": sum(n > BUDGET for n in tokens),
        "fullest_microbatch": max(tokens) / BUDGET,
        "bubble_share": (stages - 1) * max(map(max, loads)) / slowest,
        "time": slowest / ideal,
    }


def compare(draws: int) -> list[dict[str, Any]]:
    """Every way on every case."""
    rows = []
    for name, model, count, ranks, stages, mean, sigma in CASES:
        work = MODELS[model]
        ways = {"sequential": sequential, "first-fit": first_fit, "karmarkar-karp": karmarkar_karp}
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(draws):
            lengths = draw_lengths(count, mean, sigma, seed)
            costs = [work(length) for length in lengths]
            for way, plan in (ways | {"ours": ours(work, stages)}).items():
                found.setdefault(way, []).append(
                    measure(plan(lengths, costs, ranks), lengths, costs, stages, work(PASS_TOKENS))
                )
        means = {
            way: {key: round(float(np.mean([each[key] for each in measured])), 4) for key in measured[0]}
            for way, measured in found.items()
        }
        case = {"sequences": count, "dp": ranks, "pp": stages, "mean_length": mean, "sigma": sigma}
        rows.append({"name": name, **case, "ways": means})
    return rows


def scale() -> list[dict[str, Any]]:
    """Processor seconds, the least of five, that every rank spends on the plan of all."""
    rows = []
    for count, ranks, stages in SCALES:
        lengths = draw_lengths(count, 6000, 0.6, 0)
        seconds = []
        for _ in range(5):
            begin = time.process_time()
            plan_microbatches(lengths, dp_size=ranks, max_tokens=BUDGET, work=MODELS["32B"], pipeline_stages=stages)
            seconds.append(time.process_time() - begin)
        rows.append({"sequences": count, "dp": ranks, "pp": stages, "seconds": round(min(seconds), 3)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For a reader."""
    keys = ["balance", "microbatches", "idle_microbatches", "over_budget", "bubble_share", "time"]
    lines = []
    for row in rows:
        lines.append(f"{row['name']}: {row['sequences']} sequences, DP {row['dp']}, PP {row['pp']}")
        lines.append("  " + " " * 16 + "".join(f"{key:>19}" for key in keys))
        for way, values in row["ways"].items():
            lines.append(f"  {way:<16}" + "".join(f"{values[key]:>19.3f}" for key in keys))
    return "\n".join(lines)


def main() -> None:
    """Measure, print and, with ``--output``, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=50, help="draws of lengths a case")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    cases, scales = compare(arguments.draws), scale()
    print(table(cases))
    print(json.dumps(scales))
    if arguments.output:
        machine = {"python": platform.python_version(), "processor": platform.machine()}
        result = {"budget": BUDGET, "draws": arguments.draws, "cases": cases, "planning": scales, "machine": machine}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
