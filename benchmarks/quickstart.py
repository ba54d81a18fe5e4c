"""Run the quickstart with several seeds and record what it shows: pass@1 before and after, and how long it takes.

    python benchmarks/quickstart.py --seeds 0 1 2 --output benchmarks/results/quickstart.json [--picture PNG]

Every number is read from the run's own metrics.jsonl and from check_export.py's comparison with transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from megatron_oreal.telemetry.machine import processor_and_cores

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "megatron-core", "transformers", "math-verify")


def run_seed(seed: int, folder: Path) -> tuple[dict, Path]:
    """One quickstart; returns its row and the path of its curves."""
    work = folder / f"seed{seed}"
    began = time.perf_counter()
    command = ["bash", str(ROOT / "examples/quickstart.sh"), "--seed", str(seed), "--work-dir", str(work)]
    done = subprocess.run(
        [*command, "--python", sys.executable], stdout=subprocess.PIPE, text=True, check=False, cwd=folder
    )
    if done.returncode:
        sys.exit(f"quickstart with seed {seed} failed:\n{done.stdout[-3000:]}")
    records = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in records if "eval/pass_at_1" in r]
    alone = re.search(r"transformers alone\s+([\d.]+)\s+([\d.]+)", done.stdout)
    assert alone is not None
    steps = [r["time/step"] - r.get("time/evaluate", 0.0) for r in records if "loss/total" in r]
    row = {
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "before": _evaluation(evaluated[0]),
        "after": _evaluation(evaluated[-1]),
        "export_in_transformers": {"sampled": float(alone[1]), "greedy": float(alone[2])},
        "curve": [[r["step"], round(r["eval/pass_at_1"], 4)] for r in evaluated],
        "median_step_seconds": round(sorted(steps)[len(steps) // 2], 3),
    }
    return row, work / "run/report.png"


def _evaluation(record: dict) -> dict:
    keys = {"sampled": "pass_at_1", "low": "pass_at_1_low", "high": "pass_at_1_high", "greedy": "greedy"}
    return {name: round(record[f"eval/{key}"], 4) for name, key in keys.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="where the first seed's curves are copied")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            row, picture = run_seed(seed, Path(folder))
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.picture and seed == arguments.seeds[0]:
                arguments.picture.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, arguments.picture)
            result = {
                "what": "examples/quickstart.sh: pass@1 on 200 held-out additions, before and after 60 steps",
                "hardware": processor_and_cores(),
                "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
                "rows": rows,
            }
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
