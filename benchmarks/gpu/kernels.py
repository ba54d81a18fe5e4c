"""The loss kernels' times against the bandwidth of a copy on the same GPU.

    python benchmarks/gpu/kernels.py --output OUT.json [--tune] [--rows 8192 --widths 19008 152064]

Each pass alone, at the widths of a 152,064-token vocabulary under TP 8, 4, 2 and 1, on random logits that are restored
before every measurement and then pushed out of the L2 cache. "share" is the algorithmic bytes (statistics 2 an element
in bf16, gradient 4) a second over the measured copy bandwidth. Before it measures, it prints what the copy bandwidth
predicts. ``--tune`` compiles the kernels with other sizes (threads a block, bytes in flight a thread, row order) and
compares them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import ceilings, describe, time_ms

from megatron_oreal.loss import LossSettings, TokenCoefficients, nvcc
from megatron_oreal.loss.kernels import Kernels
from megatron_oreal.loss.library import choose_kernels

WIDTHS = (19008, 38016, 76032, 152064)
FLUSH_BYTES = 2**29  # written between two measurements: several times any L2 cache
GOAL = 0.85  # share of the copy bandwidth that the statistics and the gradient are to reach


def draw(rows: int, width: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    memory = torch.empty(rows * stride, dtype=dtype, device="cuda")
    for part in memory.split(2**28):
        part.normal_(0, 3)
    return memory.as_strided((rows, width), (stride, 1))


def measure(
    kernels: Kernels, rows: int, width: int, dtype: torch.dtype, copy: float, *, stride: int = 0, active: float = 1.0
) -> dict[str, Any]:
    """Statistics, combine, gradient and all of them in a row, for one shape; ``active``: share of rows that count."""
    source = draw(rows, width, stride or width, dtype)
    logits = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device="cuda").copy_(source)
    labels = torch.randint(0, width, (rows,), device="cuda")
    mask = None if active == 1 else torch.rand(rows, device="cuda") < active
    weights = torch.rand(rows, device="cuda") if mask is None else mask.float()
    zero = torch.zeros(rows, device="cuda")
    coefficients = TokenCoefficients(weights, zero, zero, kl_anchor=zero)
    columns = {"vocab_start": 0, "vocab_size": width, "temperature": 1.0}
    statistics = kernels.row_statistics(logits, labels, **columns, active=mask)
    state = kernels.combine(statistics[None], coefficients, temperature=1.0, active=mask).state

    def all_three() -> None:
        found = kernels.row_statistics(logits, labels, **columns, active=mask)
        joined = kernels.combine(found[None], coefficients, temperature=1.0, active=mask)
        kernels.gradient_(logits, labels, joined.state, **columns)

    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def restore() -> None:
        logits.copy_(source)
        other.zero_()

    times = {
        "statistics": time_ms(
            lambda: kernels.row_statistics(logits, labels, **columns, active=mask), before=other.zero_
        ),
        "combine": time_ms(lambda: kernels.combine(statistics[None], coefficients, temperature=1.0, active=mask)),
        "gradient": time_ms(lambda: kernels.gradient_(logits, labels, state, **columns), before=restore),
        "all": time_ms(all_three, before=restore),
    }
    element = rows * width * logits.element_size()
    counted = element * (1.0 if mask is None else float(mask.float().mean()))
    moved = {"statistics": counted, "gradient": element + counted, "all": element + 2 * counted}
    row: dict[str, Any] = {
        "rows": rows,
        "width": width,
        "stride": stride or width,
        "dtype": str(dtype),
        "active": active,
    }
    for name, time in times.items():
        row[f"{name}_ms"] = {key: round(value, 4) for key, value in time.items()}
        if name in moved:
            row[f"{name}_tb_per_s"] = round(moved[name] / time["median"] / 1e9, 3)
            row[f"{name}_share"] = round(moved[name] / time["median"] / 1e9 / copy, 3)
    row["meets_goal"] = min(row["statistics_share"], row["gradient_share"]) >= GOAL
    return row


def measure_weights(kernels: Kernels, tokens: int, sequences: int) -> dict[str, Any]:
    """The token-weight kernel with coefficients, both rescalings."""
    scores = torch.randn(tokens, device="cuda")
    cu_seqlens = torch.arange(0, tokens + 1, tokens // sequences, device="cuda")
    strengths = torch.rand(sequences, 2, dtype=torch.float64, device="cuda")
    row: dict[str, Any] = {"tokens": tokens, "sequences": sequences}
    for rescale in ("threshold", "topk"):
        settings = LossSettings(rescale=rescale)  # type: ignore[arg-type]
        time = time_ms(
            lambda settings=settings: kernels.token_coefficients(  # type: ignore[misc]
                scores, cu_seqlens, strengths, settings, num_tokens=tokens, kl=1e-6
            )
        )
        row[f"{rescale}_ms"] = round(time["median"], 4)
    return row


def variants(quick: bool) -> list[tuple[str, ...]]:
    """Compile-time sizes to compare; the first is the default."""
    pairs = [(256, 128), (256, 64), (512, 64), (128, 128), (512, 128), (128, 64)]
    pairs = pairs[:4] if quick else pairs
    found: list[tuple[str, ...]] = [()]
    for threads, flight in pairs:
        found.append((f"OREAL_STATISTICS_THREADS={threads}", f"OREAL_STATISTICS_BYTES={flight}"))
        found.append((f"OREAL_GRADIENT_THREADS={threads}", f"OREAL_GRADIENT_BYTES={flight}"))
    found.append(("OREAL_GRADIENT_LAST_ROW_FIRST=0",))
    return found


def tune(copy: float, shapes: list[tuple[int, int]], quick: bool) -> list[dict[str, Any]]:
    """Compile every variant for this GPU (side by side) and time it."""
    compiler = nvcc.find_nvcc()
    assert compiler is not None, "--tune needs nvcc"
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(8) as pool:

        def build(job: tuple[int, tuple[str, ...]]) -> Path | str:
            path = Path(folder) / f"variant{job[0]}.so"
            try:
                nvcc.compile_library(compiler, path, [arch], defines=job[1])
            except nvcc.BuildError as error:
                return str(error)
            return path

        wanted = variants(quick)
        for defines, built in zip(wanted, pool.map(build, enumerate(wanted)), strict=True):
            row: dict[str, Any] = {"defines": list(defines)}
            if isinstance(built, str):
                row["error"] = built[-300:]
            else:
                for count, width in shapes:
                    found = measure(Kernels(built), count, width, torch.bfloat16, copy)
                    row[f"{count}x{width}"] = {k: v for k, v in found.items() if k.endswith("_share")}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--tune", action="store_true", help="compare compile-time sizes instead")
    parser.add_argument("--quick", action="store_true", help="fewer variants")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    choice = choose_kernels(torch.device("cuda"))
    if choice.kernels is None:
        raise SystemExit(choice.line)
    limits = ceilings()
    result: dict[str, Any] = {"machine": describe(), "kernels": choice.line, "ceilings": limits}
    copy = limits["copy_tb_per_s"]
    print(json.dumps(result, indent=1), flush=True)
    if arguments.tune:
        result["variants"] = tune(copy, list(itertools.product([8192], arguments.widths)), arguments.quick)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        return
    result["rows"] = []
    shapes = [(rows, width, torch.bfloat16, {}) for rows, width in itertools.product(arguments.rows, arguments.widths)]
    first = arguments.rows[0], arguments.widths[0]
    shapes.append((*first, torch.float32, {}))
    shapes.append((*first, torch.bfloat16, {"active": 0.5}))
    shapes.append((first[0], first[1] - 1, torch.bfloat16, {}))  # rows off 16-byte boundaries
    shapes.append((first[0], first[1] - 1, torch.bfloat16, {"stride": first[1]}))
    for rows, width, dtype, options in shapes:
        predicted = rows * width * (2 if dtype == torch.bfloat16 else 4) / copy / 1e9
        print(f"{rows} x {width} {dtype} {options}: at copy bandwidth statistics {predicted:.3f} ms, gradient "
              f"{2 * predicted:.3f} ms")  # fmt: skip
        row = measure(choice.kernels, rows, width, dtype, copy, **options)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()
    result["token_weights"] = [measure_weights(choice.kernels, n, s) for n, s in ((32768, 2), (32768, 64), (8192, 8))]
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    missed = [row for row in result["rows"] if not row["meets_goal"] and not row["stride"] % 8]
    print(f"{len(missed)} of {len(result['rows'])} shapes under {GOAL:.0%} of the copy bandwidth")


if __name__ == "__main__":
    main()
