"""The smallest real parts of a run: a model directory, data, a config file, and the command line in a subprocess.

The problems are coin tosses: a digit is asked and the worked solutions answer 0 and 1 equally often, so a model taught
from them answers a prompt with gold answer 1 correctly about every second time. Groups are then mixed without search.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

REPOSITORY = Path(__file__).parent.parent
PREPARE = REPOSITORY / "examples" / "quickstart" / "prepare.py"
CONTEXT = 32  # max_position_embeddings
STOP_WORD = "<|end|>"


def quickstart() -> ModuleType:
    """The quickstart's ``prepare.py`` as a module, for its tokenizer."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", PREPARE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(path: Path, *, seed: int = 0, heads: int = 4, kv_heads: int = 2) -> Path:
    """A random Qwen2 model of about 20,000 parameters with the quickstart's tokenizer, as a Hugging Face directory."""
    prepare = quickstart()
    config = Qwen2Config(
        vocab_size=len(prepare.SPECIAL) + len(prepare.WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.06,
        eos_token_id=prepare.SPECIAL.index(STOP_WORD),
        pad_token_id=prepare.SPECIAL.index("<|pad|>"),
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).float().save_pretrained(path)
    prepare.make_tokenizer().save_pretrained(path)
    return path


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def coin_prompts(gold_answer: str = "1") -> list[dict[str, str]]:
    """One prompt a digit."""
    return [{"question": str(digit), "gold_answer": gold_answer} for digit in range(10)]


def coin_solutions() -> list[dict[str, str]]:
    """To every digit the solutions 0 and 1."""
    return [{"question": str(digit), "solution": f"\\boxed{{{coin}}}"} for digit in range(10) for coin in (0, 1)]


def config_tree(folder: Path, model: Path) -> dict[str, Any]:
    """A config for data that stands in ``folder``; tests change its keys by overrides."""
    return {
        "work_dir": str(folder / "run"),
        "total_steps": 3,
        "device": "cpu",
        "model": {"path": str(model), "dtype": "fp32", "stop_word": STOP_WORD},
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {
            "prompts_per_step": 4,
            "prompt_repeat_k": 4,
            "top_p": 1.0,
            "gen_max_new": 6,
            "gen_max_length": 12,
            "max_running_requests": 16,
        },
        "algorithm": {"actor_freeze_steps": 1, "correct_threshold": 0.0},
        "optimizer": {"warmup_steps": 1, "actor_lr": 1e-3, "actor_min_lr": 1e-4, "token_level_rm_lr": 1e-3},
        "parallel": {"max_tokens_per_microbatch": 64},
        "checkpoint": {"every": 0},
        "verifier": {"num_processes": 1, "deadline_s": 300},  # of a machine that stands still for seconds
    }


def write_run(folder: Path, model: Path, *, gold_answer: str = "1") -> Path:
    """Prompts and a config file in ``folder``; returns the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", coin_prompts(gold_answer))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_tree(folder, model)))
    return path


def cli(*arguments: object, max_file_kb: int | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_oreal`` without a GPU, as a user starts it; ``max_file_kb``: with this ``ulimit -f``."""
    command = [sys.executable, "-m", "megatron_oreal", *map(str, arguments)]
    if max_file_kb is not None:  # a .pyc file that the limit cuts would break every later import
        limited = f'export PYTHONDONTWRITEBYTECODE=1 && ulimit -f {max_file_kb} && exec "$@"'
        command = ["bash", "-c", limited, "bash", *command]
    return _run(command)


def torchrun(nproc_per_node: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same under ``torchrun``."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]  # no name service
    return _run([*start, f"--nproc-per-node={nproc_per_node}", "-m", "megatron_oreal", *map(str, arguments)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)


def succeed(*arguments: object) -> str:
    """Run the command line and return its standard output; fails with its whole output when it does."""
    done = cli(*arguments)
    assert done.returncode == 0, (
        f"{arguments} exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    )
    return done.stdout


def metrics_of(work_dir: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl`` in the order they were written."""
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
