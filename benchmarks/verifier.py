"""Responses that the verifier judges in a second, by kind of answer, against math-verify and the released code's way.

    python benchmarks/verifier.py --output benchmarks/results/verifier.json --table docs/FILE.md [--repeats 5]

``--table`` writes the table between the two ``verifier-throughput`` markers of a file.

Every response is 19 kB of reasoning and a boxed answer that is right. "ours" is ``VerifierPool`` with that many worker
processes, or without it ``judge_response`` in this process; "math-verify" is ``verify(parse(gold), parse(response))``
with its defaults, in this process; "released way" is ``verifier_reference.py``, in one process. A measurement takes
about ``--seconds``; repeats are interleaved, and what counts is their median. CPU seconds are those of all processes,
so they stand other load on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from megatron_oreal.config import VerifierConfig
from megatron_oreal.telemetry.machine import processor_and_cores
from megatron_oreal.verifier import Verdict, VerifierPool, VerifyItem
from megatron_oreal.verifier.rules import judge_response

REASONING = "We set up the equation and simplify both sides. " * 400
KINDS = {
    "integer": ("{n}", "{n}"),
    "fraction": ("\\frac{{{n}}}{{7}}", "{n}/7"),
    "tuple": ("({n}, \\frac{{1}}{{2}})", "({n}, 0.5)"),
    "closed form": ("{n}\\sqrt{{8}}", "2 \\cdot {n}\\sqrt{{2}}"),
    "polynomial": ("(x+{n})^2", "x^2 + 2 \\cdot {n} x + {n}^2"),
    "integral": ("\\int_0^{{{n}}} x\\,dx", "\\int_0^{{{n}}} y\\,dy"),
}
MAX_ITEMS = 4_000
BEGIN, END = "<!-- verifier-throughput:begin -->", "<!-- verifier-throughput:end -->"
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "mpmath")
REFERENCE_PACKAGES = ("sympy==1.14.0", "antlr4-python3-runtime==4.11.1")

Measurement = dict[str, float]


def items_of(kind: str, count: int) -> list[VerifyItem]:
    answer, gold = KINDS[kind]
    return [
        VerifyItem(n, f"{REASONING}</think> so \\boxed{{{answer.format(n=n + 1)}}}<|im_end|>", gold.format(n=n + 1))
        for n in range(count)
    ]


def run_ours(pool: VerifierPool, items: list[VerifyItem]) -> Measurement:
    workers = [psutil.Process(pid) for pid in pool.worker_pids]

    def cpu() -> float:
        return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)

    wall, used = time.perf_counter(), cpu()
    judgements = pool.verify(items)
    wall, used = time.perf_counter() - wall, cpu() - used
    assert all(judgement.verdict is Verdict.CORRECT for judgement in judgements)
    return {"seconds": wall, "cpu_seconds": used, "equal": len(items)}


def run_in_process(items: list[VerifyItem]) -> Measurement:
    words = config(1).thinking_finish_words
    wall, used = time.perf_counter(), time.process_time()
    equal = sum(judge_response(i.text, True, i.gold, words).verdict is Verdict.CORRECT for i in items)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - used, "equal": equal}


def run_math_verify(items: list[VerifyItem]) -> Measurement:
    from math_verify import parse, verify

    wall, used = time.perf_counter(), time.process_time()
    equal = sum(verify(parse(f"${item.gold}$"), parse(item.text)) for item in items)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - used, "equal": equal}


def run_reference(python: Path, items: list[VerifyItem]) -> Measurement:
    lines = "\n".join(json.dumps([item.text, item.gold]) for item in items)
    script = Path(__file__).with_name("verifier_reference.py")
    done = subprocess.run([python, script], input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script.name} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def reference_python(folder: Path) -> Path:
    """Return the interpreter of the environment that the released code's way runs in; made when it is not there."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REFERENCE_PACKAGES], check=True)
    return python


def sized(run: Callable[[list[VerifyItem]], Measurement], kind: str, seconds: float) -> list[VerifyItem]:
    """Return so many items that they take about ``seconds``; the first run also warms up."""
    count = 8
    run(items_of(kind, count))
    while (took := run(items_of(kind, count))["seconds"]) < seconds / 4 and count < MAX_ITEMS:
        count *= 4
    return items_of(kind, min(MAX_ITEMS, max(8, int(count * seconds / took))))


def summary(items: int, runs: list[Measurement]) -> dict[str, Any]:
    wall = sorted(items / run["seconds"] for run in runs)
    used = sorted(items / max(run["cpu_seconds"], 1e-9) for run in runs)
    digits = {"median": statistics.median, "low": min, "high": max}
    return {
        "items": items,
        "judged_equal": round(runs[0]["equal"] / items, 4),
        "items_per_s": {name: round(f(wall), 1) for name, f in digits.items()},
        "items_per_cpu_s": {name: round(f(used), 1) for name, f in digits.items()},
    }


def measure(kind: str, processes: list[int], seconds: float, repeats: int, python: Path) -> dict[str, Any]:
    """Measure every system on one kind, in turns, so that other load on the machine meets them alike."""
    pools = {f"ours, {n} process{'es' * (n > 1)}": VerifierPool.from_config(config(n)) for n in processes}
    try:
        systems: dict[str, Callable[[list[VerifyItem]], Measurement]] = {
            name: lambda items, pool=pool: run_ours(pool, items)  # type: ignore[misc]
            for name, pool in pools.items()
        }
        systems |= {
            "ours, no pool": run_in_process,
            "math-verify": run_math_verify,
            "released way": lambda items: run_reference(python, items),
        }
        batches = {name: sized(run, kind, seconds) for name, run in systems.items()}
        runs: dict[str, list[Measurement]] = {name: [] for name in systems}
        for _ in range(repeats):
            for name, run in systems.items():
                runs[name].append(run(batches[name]))
    finally:
        for pool in pools.values():
            pool.close()
    row: dict[str, Any] = {name: summary(len(batches[name]), runs[name]) for name in systems}
    mine = row["ours, no pool"]["items_per_cpu_s"]["median"]
    row["ratio"] = {
        other: round(mine / row[other]["items_per_cpu_s"]["median"], 2) for other in ("math-verify", "released way")
    }
    return row


def table(result: dict[str, Any]) -> str:
    """Return the table of the documentation: median items a second, and in brackets by CPU second; then the ratios."""
    kinds = result["kinds"]
    systems = [name for name in next(iter(kinds.values())) if name != "ratio"]
    lines = [
        f"| answer | {' | '.join(systems)} | ours to math-verify | ours to released way |",
        f"|---{'|---' * len(systems)}|---|---|",
    ]
    for kind, row in kinds.items():
        cells = [
            f"{row[name]['items_per_s']['median']:,.0f} ({row[name]['items_per_cpu_s']['median']:,.0f})"
            for name in systems
        ]
        ratios = [f"{row['ratio'][name]:g}" for name in ("math-verify", "released way")]
        lines.append(f"| {kind} | {' | '.join(cells + ratios)} |")
    load = result["load_average_1min"]
    measured = f"Medians of {result['repeats']} repeats on {result['hardware']}"
    return "\n".join([*lines, "", f"{measured}; load average {load['before']} before and {load['after']} after."])


def write_table(path: Path, result: dict[str, Any]) -> None:
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: no {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


def config(num_processes: int) -> VerifierConfig:
    return VerifierConfig(num_processes=num_processes, deadline_s=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown file with the two markers")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of worker processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="about what one measurement takes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference-venv", type=Path, help="environment of the released way [temporary]")
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        python = reference_python(arguments.reference_venv or Path(folder) / "venv")
        before, rows = os.getloadavg()[0], {}
        for kind in KINDS:
            rows[kind] = measure(kind, arguments.processes, arguments.seconds, arguments.repeats, python)
            print(kind, json.dumps(rows[kind]), flush=True)
    result = {
        "what": "responses judged a second; 19 kB of reasoning and a boxed answer that is right",
        "hardware": processor_and_cores(),
        "load_average_1min": {"before": round(before, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "reference_versions": list(REFERENCE_PACKAGES),
        "repeats": arguments.repeats,
        "ratio": "items per CPU second of ours in one process without the pool, over the other's; medians",
        "kinds": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table:
        write_table(arguments.table, result)


if __name__ == "__main__":
    main()
