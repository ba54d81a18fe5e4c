"""Plans from Megatron ranks to the SGLang engines beside them, for 7B on 32 and 32B on 128 GPUs, from metadata alone.

    python benchmarks/reshard_plans.py --output benchmarks/results/reshard_plans.json --docs docs/layout.md

Every row is one plan: the policy of a Megatron layout (bf16) to engines of ``engine_tp`` ranks all over the world,
neighbours or ``gpu_step`` GPUs apart (SGLang's ``--gpu-id-step``), 8 ranks a node. Sizes and counts follow from the
plan and are the same everywhere; ``seconds`` (and ``cpu_seconds``, for a machine that others use too) are those of one
process that builds both layouts and the plan from nothing, as every rank does once a run, on one core.

The all-gather method, for comparison, is what trainers do that rebuild Hugging Face tensors on every rank and let the
engine slice them: each rank receives the whole model but its own part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_oreal.layout import ModelSpec, Plan, RankGrid, RopeSpec, make_plan, megatron_layout, sglang_layout
from megatron_oreal.layout.statistics import format_bytes
from megatron_oreal.telemetry.machine import processor_and_cores

ITEMSIZE, RANKS_PER_NODE = 2, 8
MODELS = {
    "Qwen2.5-7B": ModelSpec(
        "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6)
    ),
    "Qwen2.5-32B": ModelSpec(
        "qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6)
    ),
}
BEGIN, END = "<!-- reshard_plans: begin -->", "<!-- reshard_plans: end -->"


@dataclass(frozen=True)
class Case:
    """A model, its Megatron layout, and the tensor-parallel size of the engines."""

    model: str
    tp: int
    pp: int
    dp: int
    engine_tp: int
    gpu_step: int = 1
    make_vocab_size_divisible_by: int = 1

    def engine_ranks(self) -> dict[int, list[int]]:
        """Rank in the engine to global ranks."""
        ranks = range(self.tp * self.pp * self.dp)
        return {
            index: [rank for rank in ranks if rank // self.gpu_step % self.engine_tp == index]
            for index in range(self.engine_tp)
        }


CASES = [
    *(Case("Qwen2.5-7B", 4, 1, 8, engine_tp) for engine_tp in (1, 2, 4)),
    Case("Qwen2.5-7B", 4, 1, 8, 2, gpu_step=2),
    *(Case("Qwen2.5-32B", 8, 4, 4, engine_tp) for engine_tp in (4, 8)),
    *(Case("Qwen2.5-32B", 8, 1, 16, engine_tp) for engine_tp in (4, 8)),
    Case("Qwen2.5-32B", 8, 1, 16, 4, gpu_step=2),
    Case("Qwen2.5-32B", 8, 1, 16, 8, make_vocab_size_divisible_by=128),
]


def plan_of(case: Case) -> Plan:
    spec = MODELS[case.model]
    grid = RankGrid(case.tp, case.pp, case.dp)
    source = megatron_layout(
        spec,
        tp=case.tp,
        pp=case.pp,
        vocab_divisor=case.make_vocab_size_divisible_by,
        transformer_impl="transformer_engine",
    )
    dest = sglang_layout(spec, tp=case.engine_tp)
    return make_plan(source, grid.replicas(), dest, case.engine_ranks(), ranks_per_node=RANKS_PER_NODE, cached=False)


def sizes(case: Case, plan: Plan) -> dict[str, Any]:
    """Bytes and counts of a plan; ``received`` and ``sent`` are per GPU."""
    stats = plan.statistics.in_bytes(ITEMSIZE)
    world = case.tp * case.pp * case.dp
    model = MODELS[case.model].num_parameters() * ITEMSIZE
    own = [sum(_held(plan, rank).values()) * ITEMSIZE for rank in range(world)]
    return {
        "gpus": world,
        "model_bytes": model,
        "received_mean": sum(stats.received.values()) // world,
        "received_max": max(stats.received.values(), default=0),
        "all_gather_mean": sum(model - held for held in own) // world,
        "received_to_lower_bound": stats.ratio,
        "sent_max": max(stats.sent.values(), default=0),
        "sent_max_lower_bound": stats.send_bound,
        "cross_node_total": stats.cross_node,
        "in_place_max": max(stats.aliased.values(), default=0),
        "pairs": stats.pairs,
        "rectangles": stats.rectangles,
        "contiguous_messages": stats.messages,
        "largest_message": stats.largest_message,
        "nothing_moves": stats.nothing_moves,
    }


def _held(plan: Plan, rank: int) -> dict[tuple[str, tuple], int]:
    """Elements of the HF tensors that a rank holds, by rectangle: padding is not part of the model."""
    found = {}
    for block in plan.source_shards[rank].blocks:
        size = 1
        for start, stop in block.source:
            size *= stop - start
        found[block.tensor, block.source] = size
    return found


def measure(case: Case, repeats: int) -> dict[str, Any]:
    wall, cpu = [], []
    for _ in range(repeats):
        begin = time.perf_counter(), time.process_time()
        plan = plan_of(case)
        wall.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
    return case.__dict__ | sizes(case, plan) | {"seconds": spread(wall), "cpu_seconds": spread(cpu)}


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 3), "all": [round(value, 3) for value in values]}


def table(report: dict[str, Any]) -> str:
    """Return the rows as Markdown, between the markers of the document."""
    lines = [
        BEGIN,
        "| model, Megatron layout | engine TP | received a GPU, mean / max | lower bound × | all-gather a GPU | "
        "busiest sender (its bound ×) | cross-node, all | pairs / rectangles / runs | plan, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        divisor = row["make_vocab_size_divisible_by"]
        layout = f"{row['model']} TP{row['tp']}·PP{row['pp']}·DP{row['dp']}"
        if divisor != 1:
            layout += f", vocabulary divisible by {divisor}"
        bound = row["sent_max_lower_bound"]
        received = " / ".join(format_bytes(row[key]) for key in ("received_mean", "received_max"))
        cells = [
            layout,
            str(row["engine_tp"]) + (f", step {row['gpu_step']}" if row["gpu_step"] != 1 else ""),
            "**nothing moves**" if row["nothing_moves"] else received,
            f"{row['received_to_lower_bound']:.2f}",
            format_bytes(row["all_gather_mean"]),
            f"{format_bytes(row['sent_max'])} ({row['sent_max'] / bound:.3f})" if bound else "0",
            format_bytes(row["cross_node_total"]) if row["cross_node_total"] else "0",
            f"{row['pairs']:,} / {row['rectangles']:,} / {row['contiguous_messages']:,}",
            f"{row['cpu_seconds']['median']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--docs", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give at least 1")
    report: dict[str, Any] = {
        "what": "plans from Megatron ranks to colocated SGLang engines, bf16, 8 ranks a node; see the docstring",
        "hardware": f"{processor_and_cores()}, one used",
        "versions": {"python": platform.python_version(), "numpy": version("numpy")},
        "repeats": args.repeats,
        "rows": [],
    }
    for case in CASES:
        row = measure(case, args.repeats)
        report["rows"].append(row)
        print(f"{case}: {row['seconds']['median']} s", flush=True)
    report["load_average_at_the_end"] = round(os.getloadavg()[0], 2)
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.docs is not None:
        text = args.docs.read_text()
        before, rest = text.split(BEGIN)
        args.docs.write_text(before + table(report) + rest.split(END)[1])
    print(table(report))


if __name__ == "__main__":
    main()
