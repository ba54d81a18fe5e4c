"""Plan the shipped configs anew:  python examples/plans/make.py [CONFIG...] [--table]

Writes CONFIG.GPU.json and CONFIG.GPU.txt, the text with the search's ranking, beside this script, and the table of
docs/configs.md; with --table the table alone. Nothing is fetched and no GPU is needed: shapes are in examples/models.
Ends with status 1 when a config does not fit any more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "configs.md"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
RUNS = [
    ("oreal_1.5b_one_gpu", 1, "a100-80g"),
    ("oreal_7b_one_node", 8, "a100-80g"),
    ("oreal_7b", 32, "a100-80g"),
    ("oreal_7b_without_reward_model", 32, "a100-80g"),
    ("oreal_deepseek_distill_7b", 32, "a100-80g"),
    ("oreal_32b", 128, "a100-80g"),
    ("oreal_7b", 32, "h100"),
    ("oreal_32b", 128, "h100"),
]
"""Config, GPUs, kind of GPU: the published runs', and for the published models the one after it."""
GPUS_A_NODE = 8
TOP = 3
HEAD = """\
| config | GPUs | Megatron | engines | weights moved by a publish | peak of a GPU, GiB | step, s | tokens/s a GPU |
|---|---|---|---|---|---|---|---|"""


def options(name: str, ranks: int, gpu: str) -> list[str]:
    """What stands behind ``megatron-oreal plan`` for a run, the search left out."""
    nodes = ["--world-size", str(ranks), "--ranks-per-node", str(min(ranks, GPUS_A_NODE))]
    return [f"examples/configs/{name}.yaml", *nodes, "--gpu", gpu]


def plan(name: str, ranks: int, gpu: str) -> bool:
    """Write the plan of one run, or nothing when it does not fit."""
    from megatron_oreal.plan_options import add_arguments
    from megatron_oreal.planner.plan import make_report
    from megatron_oreal.planner.report import as_text
    from megatron_oreal.planner.report_json import as_json

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([*options(name, ranks, gpu), "--search", "--top", str(TOP)])
    report = make_report(arguments)
    if not report.fits:
        print(as_text(report))
        return False
    (HERE / f"{name}.{gpu}.txt").write_text(as_text(report) + "\n")
    (HERE / f"{name}.{gpu}.json").write_text(as_json(replace(report, search=None)) + "\n")
    return True


def row(plan: dict[str, Any]) -> str:
    """One plan's line in the table."""
    world, step, memory = plan["world"], plan["step"], plan["memory"]
    sizes = f"TP{world['tp']}·PP{world['pp']}·DP{world['dp']}"
    engines = f"{world['engines']} × TP{world['engine_tp']}"
    moved = f"{plan['reshard']['received_total'] / 1e9:.1f} GB" if plan["reshard"]["received_total"] else "none"
    peak = f"{memory['peak'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f}, {memory['peak_phase']}"
    name = Path(plan["config"]).name
    return (
        f"| `{name}` | {world['ranks']} × {plan['gpu']['name']} | {sizes} | {engines} | {moved} | {peak} | "
        f"{step['seconds']:.0f} | {step['tokens_per_s_per_gpu']:.0f} |"
    )


def with_table(page: str) -> str:
    """The page with the table of all committed plans between its marks."""
    plans = [HERE / f"{name}.{gpu}.json" for name, _, gpu in reversed(RUNS)]
    lines = [HEAD, *(row(json.loads(path.read_text())) for path in plans if path.exists())]
    before, _, rest = page.partition(BEGIN)
    return "\n".join([f"{before}{BEGIN}", *lines, END]) + rest.partition(END)[2]


def main() -> int:
    """Plan, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    arguments = parser.parse_args()
    unknown = set(arguments.configs) - {name for name, *_ in RUNS}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(dict.fromkeys(name for name, *_ in RUNS))}")
    os.chdir(ROOT)  # so that the plans name files by their paths in the repository
    for name, ranks, gpu in [] if arguments.table else RUNS:
        if arguments.configs and name not in arguments.configs:
            continue
        print(f"{name} on {ranks} x {gpu}", flush=True)
        if not plan(name, ranks, gpu):
            print(f"error: {name} does not fit on {ranks} x {gpu}", file=sys.stderr)
            return 1
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
