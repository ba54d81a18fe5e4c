"""Tokens per second of the embedded engine and of Hugging Face ``generate``, on the quickstart's kind of rollout.

    python benchmarks/embedded_engine.py --output benchmarks/results/embedded_engine.json

Both run the same randomly initialised Qwen2 (fp32, tied embeddings) on 64 prompts of 8 to 16 tokens, 16 samples each,
at temperature 1 without filters. Two workloads:

* ``stop``: the initialisation (std 0.02) leaves the next-token distribution nearly uniform, so the stop token ends a
  response with a probability near 1/50 a token: lengths are nearly geometric with mean 50, cut at 256. Like real
  responses, most are short and a few long.
* ``fixed``: no stop token, 64 tokens each: no schedule can win anything, what differs is the cost of a step.

``generate`` runs left-padded batches with its KV cache and stops a batch when its last response ended. It tries every
batch size of ``BATCHES`` on the first 16 prompts; its three fastest are then timed ``--repeats`` times on all prompts,
and the best of them by median is what the engine is compared with. The engine tries every slot count of ``SLOTS`` once;
the fastest is timed in turn with the others. Tokens are those of the responses, the stop token included, prompts and
padding not. Rates are by the wall clock and, for a machine that others use too, by the process's own CPU time (of all
its threads); with more threads than free cores neither means much.
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
from megatron_oreal.telemetry.machine import processor_and_cores

PAD, STOP, VOCABULARY = 0, 1, 40
PROMPTS, SAMPLES, TRIAL_PROMPTS, FINALISTS = 64, 16, 16, 3
BATCHES = (8, 16, 32, 64, 128, 256)
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


def rate(run: Run) -> tuple[float, float, int]:
    """Tokens a second by the wall clock and by CPU time, and tokens."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu), tokens


def by_speed(runs: dict[int, Run]) -> dict[int, int]:
    """Return tokens per CPU second of each size, the fastest first; a neighbour's load disturbs it least."""
    rates = {size: round(rate(run)[1]) for size, run in runs.items()}
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def spread(values: list[float], digits: int) -> dict[str, object]:
    return {"median": round(statistics.median(values), digits), "all": [round(value, digits) for value in values]}


def summary(measured: list[tuple[float, float, int]]) -> dict[str, object]:
    return {
        "tokens_per_s": spread([wall for wall, _, _ in measured], 0),
        "tokens_per_cpu_s": spread([cpu for _, cpu, _ in measured], 0),
        "mean_tokens_a_response": round(statistics.mean(n for _, _, n in measured) / (PROMPTS * SAMPLES), 1),
    }


def measure(model_dir: str, model: Qwen2ForCausalLM, workload: str, threads: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    max_new, stop = WORKLOADS[workload]
    prompts = build_prompts()
    engines = {
        slots: load_hf_engine(model_dir, dtype=torch.float32, max_running_requests=slots, max_length=512)
        for slots in SLOTS
    }
    engine_runs = {slots: engine_run(engine, prompts, max_new, stop) for slots, engine in engines.items()}
    trials = {batch: generate_run(model, prompts[:TRIAL_PROMPTS], batch, max_new, stop) for batch in BATCHES}
    engine_runs[SLOTS[0]](), generate_run(model, prompts, 256, 4, stop)()
    slots_tried, batches_tried = by_speed(engine_runs), by_speed(trials)
    slots = next(iter(slots_tried))
    finalists = list(batches_tried)[:FINALISTS]
    ours: list[tuple[float, float, int]] = []
    theirs: dict[int, list[tuple[float, float, int]]] = {batch: [] for batch in finalists}
    for _ in range(repeats):
        ours.append(rate(engine_runs[slots]))
        for batch in finalists:
            theirs[batch].append(rate(generate_run(model, prompts, batch, max_new, stop)))
    best = max(finalists, key=lambda batch: statistics.median(cpu for _, cpu, _ in theirs[batch]))
    pairs = list(zip(ours, theirs[best], strict=True))
    return {
        "workload": workload,
        "threads": threads,
        "embedded": {"slots": slots, "tokens_per_cpu_s_by_slots": slots_tried} | summary(ours),
        "generate": {"batch": best, "trial_tokens_per_cpu_s_by_batch": batches_tried} | summary(theirs[best]),
        "generate_other_finalists": {batch: summary(theirs[batch]) for batch in finalists if batch != best},
        "speedup_wall": spread([a[0] / b[0] for a, b in pairs], 2),
        "speedup_cpu": spread([a[1] / b[1] for a, b in pairs], 2),
        "load_average": round(os.getloadavg()[0], 2),
    }


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
        "hardware": processor_and_cores(),
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
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
