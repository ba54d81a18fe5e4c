"""Responses that the verifier pool judges in a second, by kind of answer and number of processes.

Prints one JSON line a measurement. Usage: ``python benchmarks/verifier_throughput.py [--processes 1 2] [--seconds 1]``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time

from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier import VerifierPool, VerifyItem

REASONING = "We set up the equation and simplify both sides. " * 400
KINDS = {
    "integer": ("{n}", "{n}"),
    "fraction": ("\\frac{{{n}}}{{7}}", "{n}/7"),
    "tuple": ("({n}, \\frac{{1}}{{2}})", "({n}, 0.5)"),
    "closed form": ("{n}\\sqrt{{8}}", "2 \\cdot {n}\\sqrt{{2}}"),
    "polynomial": ("(x+{n})^2", "x^2 + 2 \\cdot {n} x + {n}^2"),
    "math-verify": ("\\int_0^{{{n}}} x\\,dx", "\\int_0^{{{n}}} y\\,dy"),
}


def items_of(kind: str, count: int) -> list[VerifyItem]:
    answer, gold = KINDS[kind]
    return [
        VerifyItem(n, f"{REASONING}</think> so \\boxed{{{answer.format(n=n + 1)}}}<|im_end|>", gold.format(n=n + 1))
        for n in range(count)
    ]


def measure(kind: str, num_processes: int, seconds: float) -> dict[str, object]:
    config = VerifierConfig(num_processes=num_processes)
    with VerifierPool.from_config(config) as pool:
        pool.verify(items_of(kind, 4 * num_processes))
        count, elapsed = 16, 0.0
        while elapsed < seconds:
            count *= 2
            items = items_of(kind, count)
            start = time.perf_counter()
            judgements = pool.verify(items)
            elapsed = time.perf_counter() - start
    verdicts = {judgement.verdict.value for judgement in judgements}
    return {
        "kind": kind,
        "num_processes": num_processes,
        "items": count,
        "seconds": round(elapsed, 3),
        "items_per_second": round(count / elapsed, 1),
        "verdicts": sorted(verdicts),
        "response_chars": len(items[0].text),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="least duration of a measurement")
    args = parser.parse_args()
    for num_processes in args.processes:
        for kind in KINDS:
            print(json.dumps(measure(kind, num_processes, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
