"""The policy's loss against other ways to compute it: time, memory, bandwidth, and error against float64.

    python benchmarks/loss.py --output benchmarks/results/loss_cpu.json
    python benchmarks/loss.py --device cuda --output loss_gpu.json

Every way of ``loss_baselines.py`` gets the same logits [N, V], V = 152,064, and makes the same OREAL loss (released
mode: positives, negatives, k3 to the reference) and its gradient in the logits. Two workloads: ``responses``, in which
a tenth of the positions are prompts and carry no loss, as in training on long responses, and ``all_tokens``. The
reference's way passes over all positions in both, as it does in training.

A measurement is one forward and one backward on a fresh copy of the logits (not timed); the ways take turns,
``--repeats`` rounds. Times are by the wall clock and, on a CPU, by the process's CPU time, which a neighbour's load
disturbs least; all single values are kept. Peak memory counts the logits and every tensor made from them: torch's
allocator statistics on a GPU, storages alive between operations on a CPU. ``three_pass_GB_s`` is what three passes over
the logits (two reads and one write) make of the wall time, whatever a way really moves; ``share_of_copy`` is that over
the bandwidth of a copy on this machine.

On a CPU the measurement is made once with glibc's allocator as it is, which returns every large tensor to the system
and pays for new pages again and again, and once with one that keeps them (``MALLOC_MMAP_MAX_=0``), as a GPU's does.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_baselines import HEADS, WAYS, Case, Way, compile_anew
from torch import Tensor

from megatron_oreal.loss import LossSettings, make_coefficients
from megatron_oreal.loss.library import choose_kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_bytes import LiveBytes

VOCABULARY = 152_064  # Qwen2.5-7B and 32B
PROMPT_SHARE = 0.1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
PACKAGES = ("torch", "megatron-core", "triton", "liger-kernel", "transformer-engine", "cut-cross-entropy")


@functools.lru_cache(maxsize=2)
def draw_case(rows: int, workload: str, device: str) -> tuple[Tensor, Case]:
    """Float32 logits [rows, V] on the CPU, to be copied, and a positive and a negative sequence over them.

    Kept, because a GPU waits minutes for all of its draws.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, generator=g) * 2
    labels = torch.randint(0, VOCABULARY, (rows,), generator=g)
    certain = torch.arange(rows) % 2 == 0
    logits[certain, labels[certain]] = 21.5  # p of about 0.999, as most tokens of a trained model
    length = rows // 2
    prompt = round(length * PROMPT_SHARE) if workload == "responses" else 0
    active = (torch.arange(rows) % length) >= prompt
    ref = (logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] + torch.randn(rows, generator=g) * 0.1)[active]
    count = length - prompt
    made = make_coefficients(
        [count, count],
        [1, -1],
        [0.5, -0.5],
        LossSettings(),
        num_positive_tokens=count,
        num_negative_tokens=count,
        num_tokens=2 * count,
        scores=torch.randn(2 * count, generator=g),
        ref_logp=ref,
    )
    spread: dict[str, Any] = {}
    for name, vector in made.vectors().items():
        spread[name] = torch.zeros(rows).masked_scatter_(active, vector).to(device)
    return logits, Case(labels.to(device), active.to(device), type(made)(**spread))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> tuple[float, float]:
    synchronise(device)
    return time.perf_counter(), time.process_time()


def time_once(way: Way, logits: Tensor, case: Case, device: str) -> dict[str, list[float]]:
    """(wall, CPU) seconds of the forward and of the backward."""
    leaf = logits.clone().requires_grad_()
    times = [clock(device)]
    total = way(leaf, case)[0]
    times.append(clock(device))
    total.backward()
    times.append(clock(device))
    return {
        name: [b - a for a, b in zip(times[i], times[i + 1], strict=True)]
        for i, name in enumerate(("forward", "backward"))
    }


def peak_bytes(run: Callable[[], Any], given: int, device: str) -> int:
    """The most bytes alive while ``run`` runs, with ``given`` bytes of arguments."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return given + torch.cuda.max_memory_allocated() - before
    with LiveBytes() as watched:
        run()
    return given + watched.peak


def peak_of(way: Way, logits: Tensor, case: Case, device: str) -> int:
    """Forward and backward."""
    leaf = logits.clone().requires_grad_()
    return peak_bytes(lambda: way(leaf, case)[0].backward(), leaf.nbytes, device)  # noqa: PLW0108


def errors_of(way: Way, logits: Tensor, case: Case) -> dict[str, float | None]:
    """Against float64 of the same logits: log-probability and entropy (largest absolute), gradient (relative
    Frobenius norm), and the label's gradient entry (largest relative, over rows with one).
    """
    exact = logits.double().requires_grad_()
    total, logp, entropy = WAYS["plain_float64"](exact, case)
    total.backward()
    leaf = logits.clone().requires_grad_()
    found_total, found_logp, found_entropy = way(leaf, case)
    found_total.backward()
    assert exact.grad is not None and leaf.grad is not None and entropy is not None
    rows = case.active.nonzero().squeeze(1)
    mine, theirs = (g[rows, case.labels[rows]].double() for g in (leaf.grad, exact.grad))
    nonzero = theirs != 0
    return {
        "logp": float((found_logp - logp)[rows].abs().max()),
        "entropy": None if found_entropy is None else float((found_entropy - entropy)[rows].abs().max()),
        "gradient": float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()),
        "label_gradient": float(((mine - theirs) / theirs)[nonzero].abs().max()),
    }


def float64_formula(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain formula without its rounding to float32."""
    from loss_baselines import total_of

    log_probability = logits.log_softmax(-1)
    logp = log_probability.gather(1, case.labels.unsqueeze(1)).squeeze(1)
    detached = log_probability.detach()
    return total_of(logp, logp, case), logp.detach(), -(detached.exp() * detached).sum(-1)


WAYS["plain_float64"] = float64_formula


def copy_bandwidth(like: Tensor, device: str) -> float:
    """Bytes a second, read and written, of copying the logits; the best of five."""
    target = torch.empty_like(like)
    best = float("inf")
    for _ in range(6):
        began = clock(device)[0]
        target.copy_(like)
        best = min(best, clock(device)[0] - began)
    return 2 * like.nbytes / best


def summary(values: list[float], digits: int = 3) -> dict[str, Any]:
    return {"median": round(statistics.median(values), digits), "all": [round(value, digits) for value in values]}


def measure(names: list[str], rows: int, dtype: str, workload: str, device: str, repeats: int) -> dict[str, Any]:
    """All ways on one workload."""
    drawn, case = draw_case(rows, workload, device)
    logits = drawn.to(DTYPES[dtype], copy=True).to(device)
    bandwidth = copy_bandwidth(logits, device)
    compile_anew()
    times: dict[str, list[dict[str, list[float]]]] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            time_once(WAYS[name], logits, case, device)  # warm up, compile
            times[name] = []
        except Exception as error:  # whatever a baseline's package raises on a machine it was not made for
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    for _ in range(repeats):
        for name, runs in times.items():
            runs.append(time_once(WAYS[name], logits, case, device))
            gc.collect()
    results = {}
    first = Case(case.labels[:64], case.active[:64], case.coefficients[:64])
    for name, runs in times.items():
        # On a CPU the memory counter would see eager operations in the compiled code's place.
        seen = device == "cuda" or name != "torch.compile"
        peak = peak_of(WAYS[name], logits, case, device) if seen else None
        wall = [run["forward"][0] + run["backward"][0] for run in runs]
        results[name] = {
            "forward_ms": summary([1e3 * run["forward"][0] for run in runs]),
            "backward_ms": summary([1e3 * run["backward"][0] for run in runs]),
            "total_ms": summary([1e3 * seconds for seconds in wall]),
            "cpu_ms": summary([1e3 * (run["forward"][1] + run["backward"][1]) for run in runs]),
            "peak_bytes": peak,
            "peak_bytes_an_element": None if peak is None else round(peak / logits.numel(), 2),
            "three_pass_GB_s": round(3 * logits.nbytes / statistics.median(wall) / 1e9, 2),
            "share_of_copy": round(3 * logits.nbytes / statistics.median(wall) / bandwidth, 3),
            "error": errors_of(WAYS[name], logits[:64], first),
        }
    return {
        "dtype": dtype,
        "workload": workload,
        "rows": rows,
        "read_rows": int(case.active.sum()),
        "copy_GB_s": round(bandwidth / 1e9, 2),
        "ways": results,
        "absent": absent,
    }


def measure_heads(rows: int, hidden_size: int, device: str, repeats: int) -> dict[str, Any]:
    """Hidden states and weight in, loss and both gradients out, in bf16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    _, case = draw_case(rows, "responses", device)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, hidden_size, generator=g).to(dtype).to(device)
    weight = (torch.randn(VOCABULARY, hidden_size, generator=g) * hidden_size**-0.5).to(dtype).to(device)
    results: dict[str, Any] = {}
    for name, head in HEADS.items():

        def run(head: Any = head) -> None:
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            head(x, w, case).backward()

        try:
            run()
        except Exception as error:
            results[name] = {"absent": f"{type(error).__name__}: {error}"[:200]}
            continue
        times = []
        for _ in range(repeats):
            began = clock(device)[0]
            run()
            times.append(1e3 * (clock(device)[0] - began))
        flop = 6 * rows * hidden_size * VOCABULARY
        results[name] = {
            "ms": summary(times),
            "TFLOP_s_of_6NHV": round(flop / statistics.median(times) / 1e9, 2),
            "peak_bytes": peak_bytes(run, hidden.nbytes + weight.nbytes, device),
        }
    return {"rows": rows, "hidden_size": hidden_size, "dtype": str(dtype).removeprefix("torch."), "heads": results}


def hardware(device: str) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "kernels": choose_kernels(torch.device("cuda")).line}
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """The reference's way over ours."""
    if not {"ours", "reference"} <= row["ways"].keys():
        return {}  # row["absent"] says why
    ours, theirs = row["ways"]["ours"], row["ways"]["reference"]
    kinds = {"wall": "total_ms", "cpu": "cpu_ms"}
    found = {name: round(theirs[key]["median"] / ours[key]["median"], 2) for name, key in kinds.items()}
    return found | {"memory": round(theirs["peak_bytes"] / ours["peak_bytes"], 2)}


def child(
    arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None
) -> list[dict[str, Any]]:
    """Measure in this process; ``keep`` gets the rows so far after each of them."""
    torch.set_num_threads(arguments.threads)
    names = arguments.ways or [name for name in WAYS if name != "plain_float64"]
    if arguments.device == "cpu" and (arguments.heap, arguments.threads) != ("default", 1):
        names = ["ours", "reference"]
    rows = []
    for dtype in DTYPES:
        for workload in ("responses", "all_tokens"):
            row = measure(names, arguments.tokens, dtype, workload, arguments.device, arguments.repeats)
            rows.append(
                {"threads": arguments.threads, "heap": arguments.heap} | row | {"reference_over_ours": ratios(row)}
            )
            print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("ways",)}), file=sys.stderr)
            keep(rows)
    return rows


def spawn(arguments: argparse.Namespace, threads: int, heap: str) -> list[dict[str, Any]]:
    """Measure in a process with these threads and this allocator."""
    command = [sys.executable, __file__, "--child", "--threads", str(threads), "--heap", heap]
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    command += [part for name in arguments.ways or [] for part in ("--way", name)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} | (KEPT_HEAP if heap == "kept" else {})
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, help="rows N; default 96 on a CPU, 8192 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", action="append", dest="ways", help="only these (reference and ours are needed)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--heap", choices=["default", "kept"], default="default", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (96 if arguments.device == "cpu" else 8192)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    result: dict[str, Any] = {
        "hardware": hardware(arguments.device),
        "vocabulary": VOCABULARY,
        "prompt_share": PROMPT_SHARE,
        "repeats": arguments.repeats,
        "load_average_before_and_after": [round(os.getloadavg()[0], 2)],
        "rows": [],
        "heads": [],
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        """Write what there is: a machine that is lent for minutes may not see the end."""
        result["rows"] = rows
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    if arguments.device == "cuda":
        arguments.heap, arguments.threads = "torch", torch.get_num_threads()
        rows = child(arguments, keep)
        sizes = (3584, 5120)
    else:
        rows = [row for threads in (1, 2) for heap in ("default", "kept") for row in spawn(arguments, threads, heap)]
        torch.set_num_threads(1)
        sizes = (128,)
    for size in sizes:
        repeats = arguments.repeats if arguments.device == "cuda" else 3
        result["heads"].append(measure_heads(arguments.tokens, size, arguments.device, repeats))
        keep(rows)
    result["load_average_before_and_after"].append(round(os.getloadavg()[0], 2))
    keep(rows)
    if not arguments.output:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
