"""What a colocated step spends on changing between generation and training, phase by phase.

    python benchmarks/switch.py --output benchmarks/results/switch_cpu.json
    python benchmarks/switch.py --model qwen2.5-1.5b --ranks 1 --output benchmarks/results/switch_1.5b.json

A real run of ``megatron-oreal train`` with SGLang servers and every part of the actor offloaded (or those of
``--offload``, where host memory does not hold all), on a randomly initialised model of the named shape. The table has
the phases of ``time/sleep``, ``time/update`` and ``time/publish`` (what they mean: ``telemetry/names.py``): median and
range over the steps after ``--warmup``, on rank 0. Few and short responses are drawn: the switch costs the same after
long ones, whose generation is not what is measured here.

Shapes: ``tiny`` (for a machine without a GPU, where the memory saver of ``tests/sglang_cpu`` stands in), and those of
Qwen2.5-1.5B and 7B with their vocabulary, in bf16. ``--engine-tp`` ranks share a server. ``--frozen``: no model learns,
for shapes whose optimizer does not fit into the device; the switch is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.telemetry.machine import processor_and_cores

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
REST: dict[str, dict[str, Any]] = {
    "tiny": {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False},
    "qwen2.5-1.5b": {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
PARTS = ("optimizer", "reward_model", "reference", "policy")
PHASES = ("time/sleep", "time/update", "time/publish")


def prepare() -> ModuleType:
    """The quickstart's tokenizer."""
    spec = importlib.util.spec_from_file_location("prepare", REPOSITORY / "examples" / "quickstart" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_inputs(folder: Path, shape: str, is_cuda: bool) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], **REST[shape], max_position_embeddings=256, eos_token_id=3)
    with torch.device("cuda" if is_cuda else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16 if is_cuda else torch.float32)
    model.save_pretrained(folder / "model")
    del model
    if is_cuda:
        torch.cuda.empty_cache()  # for the run, which is another process
    prepare().make_tokenizer().save_pretrained(folder / "model")
    problems = [{"question": f"{a}+{a}", "gold_answer": str(2 * a)} for a in range(100, 132)]
    (folder / "train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return folder / "model"


def write_config(folder: Path, arguments: argparse.Namespace, is_cuda: bool) -> Path:
    tree = {
        "work_dir": str(folder / "run"),
        "total_steps": arguments.steps,
        "model": {"path": str(folder / "model"), "dtype": "bf16" if is_cuda else "fp32", "stop_word": "<|end|>"}
        | ({"reward_model": False} if arguments.frozen else {}),
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {
            "engine": "sglang",
            "engine_tp": arguments.engine_tp,
            "sglang": {"enable_memory_saver": True} | json.loads(arguments.sglang),
            "prompts_per_step": 8,
            "prompt_repeat_k": 4,
            "gen_max_new": 32,
            "gen_max_length": 64,
            "max_running_requests": 64,
            "max_logp_difference": None,
        },
        "algorithm": {"filter": "none", "actor_freeze_steps": arguments.steps if arguments.frozen else 0},
        "parallel": {
            "tensor_model_parallel_size": arguments.tp,
            "max_tokens_per_microbatch": 2048,
            "offload": arguments.offload,
        },
        "checkpoint": {"every": 0, "export_hf": False},
        "telemetry": {"tensorboard": False},
        "verifier": {"num_processes": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "megatron_oreal", "train", str(config)]
    command += ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1"})


def table(records: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Rows: phase, median, least and greatest seconds."""
    phases = sorted({name for record in records for name in record if name.startswith(PHASES)})
    rows = []
    for name in [*phases, "time/step"]:
        seconds = [record[name] for record in records if name in record]
        spread = {"min": min(seconds), "max": max(seconds)}
        rows.append({"phase": name, "median_s": statistics.median(seconds)} | {f"{k}_s": v for k, v in spread.items()})
    return rows


def hardware(is_cuda: bool) -> str:
    if is_cuda:
        return torch.cuda.get_device_name()
    return processor_and_cores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism of the actors")
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--offload", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the actor [all]")
    parser.add_argument("--sglang", default="{}", help="further server arguments, as JSON")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.model, is_cuda)
        train(write_config(folder, arguments, is_cuda), arguments.ranks)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][arguments.warmup : arguments.steps]
    rows = table(records)
    for row in rows:
        print(f"{row['phase']:<36}{row['median_s']:10.4f} s   {row['min_s']:.4f} .. {row['max_s']:.4f}")
    released = [record["memory/released_bytes"] for record in records if "memory/released_bytes" in record]
    result = {
        "what": "seconds of a colocated step's phases on rank 0; see the script's docstring",
        "model": arguments.model,
        "ranks": arguments.ranks,
        "tp": arguments.tp,
        "engine_tp": arguments.engine_tp,
        "frozen": arguments.frozen,
        "offload": arguments.offload,
        "steps": len(records),
        "hardware": hardware(is_cuda),
        "load_average_before": load,
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "sglang", "megatron-core")},
        "released_bytes": statistics.median(released) if released else None,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
