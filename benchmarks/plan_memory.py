"""The planner's memory against tensors that real ranks made: peak of live bytes, phase by phase, for seven settings.

    python benchmarks/plan_memory.py --output benchmarks/results/plan_memory.json --docs docs/planner_memory.md

Each setting runs two steps (update and publication, once the embedded engine's generation) on two or four gloo ranks;
every storage that an operation makes is followed until it is freed (``planner/live.py``), so that neither the allocator
nor Python counts. ``exact`` is ``planner.rank_memory``, ``quick`` is ``planner.quick_rank_memory``. Five settings have
corrected the planner's formulas; the others were predicted before they were first measured, and what was predicted then
is kept beside what is predicted now. Byte counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dist import run_ranks  # noqa: E402
from planner_memory_cases import BLIND_CASES, CASES, Case  # noqa: E402

from megatron_oreal.planner import quick_rank_memory, rank_memory  # noqa: E402
from megatron_oreal.planner.types import RankMemory  # noqa: E402

BEGIN, END = "<!-- plan_memory: begin -->", "<!-- plan_memory: end -->"


def rows_of(case: Case, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a rank: bytes by phase, measured (unless rows of an earlier result are kept), exact and quick.

    ``predicted_before``, of an earlier result alone: the peaks that were predicted before the first measurement.
    """
    measured = [row["measured"] for row in kept if "measured" in row]
    if not measured:
        ranks = run_ranks("planner_memory_cases:measure", case.world_size, {"cases": [case]}, timeout_s=1200)
        measured = [phases for (phases,) in ranks]
    rows = []
    for rank, phases in enumerate(measured):
        exact, quick = rank_memory(case.setting(), rank), quick_rank_memory(case.setting(), rank)
        rows.append(
            {
                "setting": case.name,
                "rank": rank,
                "measured": phases,
                "exact": {name: _total(exact, name) for name in phases},
                "quick": {name: _total(quick, name) for name in phases},
                "measured_peak": max(phases.values()),
                "exact_peak": max(_total(exact, name) or 0 for name in phases),
                "quick_peak": max(_total(quick, name) or 0 for name in phases),
            }
            | {key: row[key] for row in kept[rank : rank + 1] for key in ("predicted_before",) if key in row}
        )
    return rows


def _total(memory: RankMemory, phase: str) -> int | None:
    """None: the closed forms have no such phase."""
    return next((each.total for each in memory.phases if each.name == phase), None)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a rank."""
    lines = ["| setting | rank | phase of the peak | measured, MiB | exact | quick | worst phase, exact |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        measured = row["measured"]
        peak = max(measured, key=lambda name: measured[name])
        errors = {name: row["exact"][name] / size - 1 for name, size in measured.items() if row["exact"][name]}
        worst = max(errors, key=lambda name: abs(errors[name]))
        before = row.get("predicted_before")
        exact, quick = (
            f"{row[key] / row['measured_peak'] - 1:+.1%}"
            + (f" (blind {before[key] / row['measured_peak'] - 1:+.1%})" if before else "")
            for key in ("exact_peak", "quick_peak")
        )
        lines.append(
            f"| {row['setting']} | {row['rank']} | {peak} | {row['measured_peak'] / 2**20:.2f} "
            f"| {exact} | {quick} | {worst} {errors[worst]:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--docs", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--measured", type=Path, help="earlier result: predict again, measure what is not in it")
    parser.add_argument("--again", action="store_true", help="keep of --measured only what was predicted before")
    arguments = parser.parse_args()
    kept = json.loads(arguments.measured.read_text(encoding="utf-8"))["rows"] if arguments.measured else []
    for row in kept if arguments.again else []:
        del row["measured"]
    rows = []
    for case in (CASES | BLIND_CASES).values():
        rows += rows_of(case, [row for row in kept if row["setting"] == case.name])
    result = {
        "what": "live tensor bytes of gloo ranks at the peak of each phase, and the planner's; see the docstring",
        "versions": {name: version(name) for name in ("torch", "megatron-core")}
        | {"python": platform.python_version()},
        "rows": rows,
    }
    print(table(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.docs:
        text = arguments.docs.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        arguments.docs.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
