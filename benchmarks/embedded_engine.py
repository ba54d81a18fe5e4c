"""Tokens per second of the embedded engine and of Hugging Face ``generate``, on the quickstart's kind of rollout.

    python benchmarks/embedded_engine.py --output benchmarks/results/embedded_engine.json

Both run the same randomly initialised Qwen2 (fp32, tied embeddings) on 64 prompts of 8 to 16 tokens, 16 samples each, at
temperature 1 without filters. Two workloads:

* ``stop``: the initialisation (std 0.02) leaves the next-token distribution nearly uniform, so the stop token ends a
  response with a probability near 1/40 a token: lengths are nearly geometric with mean 40, cut at 256. Like real
  responses, most are short and a few long.
* ``fixed``: no stop token, 64 tokens each: no schedule can win anything, what differs is the cost of a step.

``generate`` runs left-padded batches with its KV cache, stops a batch when its last response ended, and is given every
batch size of ``BATCHES``; the engine every slot count of ``SLOTS``. Each side's fastest is timed ``--repeats`` times,
the two sides in turn. Tokens are those of the responses, the stop token included, prompts and padding not.
transformers' own continuous batching (``generate_batch``) refuses to start on a CPU in 5.12 (it finds no memory).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Request, SamplingParams
from megatron_oreal.rollout.hf_weights import load_hf_engine

PAD, STOP, VOCABULARY = 0, 1, 40
PROMPTS, SAMPLES = 64, 16
BATCHES = (64, 128, 256, 512, 1024)
SLOTS = (64, 128, 256, 512)
WORKLOADS = {"stop": (256, STOP), "fixed": (64, None)}

Run = Callable[[], int]


def build_model(layers: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).eval()


def build_prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, size=rng.integers(8, 17)).astype(np.int32) for _ in range(PROMPTS)]


def engine_run(engine: EmbeddedEngine, prompts: list[np.ndarray], max_new: int, stop: int | None) -> Run:
    sampling = SamplingParams(1.0, 1.0, 0, max_new, 512, stop)
    requests = [Request(prompt, i * SAMPLES + k) for i, prompt in enumerate(prompts) for k in range(SAMPLES)]

    def run() -> int:
        return sum(len(completion.token_ids) for completion in engine.generate(requests, sampling))

    return run


def generate_run(model: Qwen2ForCausalLM, prompts: list[np.ndarray], batch: int, max_new: int, stop: int | None) -> Run:
    rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
    batches = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(row) for row in part)
        ids = torch.full((len(part), width), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, width - len(row) :] = torch.from_numpy(row)
            mask[i, width - len(row) :] = 1
        batches.append((ids, mask))
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}

    @torch.inference_mode()
    def run() -> int:
        total = 0
        for ids, mask in batches:
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new, eos_token_id=stop, pad_token_id=PAD, **options
            )[:, ids.shape[1] :]
            ended = (out == STOP).cumsum(dim=1) > 0 if stop is not None else torch.zeros_like(out, dtype=torch.bool)
            total += out.numel() - int(ended[:, :-1].sum())
        return total

    return run


def rate(run: Run) -> tuple[float, int]:
    """Tokens a second, and tokens."""
    start = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - start), tokens


def fastest(runs: dict[int, Run]) -> tuple[int, dict[int, float]]:
    rates = {size: round(rate(run)[0]) for size, run in runs.items()}
    return max(rates, key=lambda size: rates[size]), rates


def measure(model_dir: str, model: Qwen2ForCausalLM, workload: str, threads: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    max_new, stop = WORKLOADS[workload]
    prompts = build_prompts()
    engines = {
        slots: load_hf_engine(model_dir, dtype=torch.float32, max_running_requests=slots, max_length=512)
        for slots in SLOTS
    }
    contenders = {
        "embedded": {slots: engine_run(engine, prompts, max_new, stop) for slots, engine in engines.items()},
        "generate": {batch: generate_run(model, prompts, batch, max_new, stop) for batch in BATCHES},
    }
    contenders["embedded"][SLOTS[0]](), generate_run(model, prompts, 1024, 4, stop)()
    tried = {name: fastest(runs) for name, runs in contenders.items()}
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, runs in contenders.items():
            results[name].append(rate(runs[tried[name][0]]))
    row: dict[str, object] = {"workload": workload, "threads": threads}
    for name, measured in results.items():
        rates = [r for r, _ in measured]
        row[name] = {
            "tokens_per_s": {"median": round(statistics.median(rates)), "all": [round(r) for r in rates]},
            "mean_tokens_a_response": round(statistics.mean(n for _, n in measured) / (PROMPTS * SAMPLES), 1),
            "slots" if name == "embedded" else "batch": tried[name][0],
            "tried_once": tried[name][1],
        }
    ratios = [ours / theirs for (ours, _), (theirs, _) in zip(*results.values(), strict=True)]
    row["speedup"] = {"median": round(statistics.median(ratios), 2), "all": [round(r, 2) for r in ratios]}
    return row


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = build_model(args.layers)
    report: dict[str, object] = {
        "what": "response tokens a second, 64 prompts x 16 samples, temperature 1; see the script's docstring",
        "model": f"Qwen2, hidden 96, {args.layers} layers, 4 heads, 2 KV heads, ffn 256, vocabulary 40, fp32, "
        f"{model.num_parameters():,} parameters",
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers", "numpy")},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as model_dir:
        model.save_pretrained(model_dir)
        for workload in args.workloads:
            for threads in args.threads:
                row = measure(model_dir, model, workload, threads, args.repeats)
                report["rows"] = [*report["rows"], row]  # type: ignore[misc]
                print(json.dumps(row), flush=True)
    report["load_average_after"] = round(os.getloadavg()[0], 2)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
