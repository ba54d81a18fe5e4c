"""Scaled-down twins of ``examples/configs``: the same file with tiny widths, short responses and few ranks.

A twin is the shipped YAML itself. Only what ``overrides`` lists is another: sizes, lengths, paths and the engine. Every
parallel dimension that has more than one rank in the original has more than one here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from dist import run_ranks
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.config_load import load_config
from megatron_oreal.data.chat import load_template

CONFIGS = tiny.REPOSITORY / "examples" / "configs"
SHAPES = tiny.REPOSITORY / "examples" / "models"
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
]
STEPS = 2


@dataclass(frozen=True)
class Machine:
    """A world: ``dp`` replicas of ``tp`` x ``pp`` ranks, ``per_node`` ranks on a node."""

    tp: int
    pp: int
    dp: int
    per_node: int = 8

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp


MACHINES = {
    "oreal_7b": Machine(4, 1, 8),
    "oreal_32b": Machine(8, 1, 16),
    "oreal_deepseek_distill_7b": Machine(4, 1, 8),
    "oreal_7b_without_reward_model": Machine(4, 1, 8),
    "oreal_7b_one_node": Machine(4, 1, 2),
    "oreal_1.5b_one_gpu": Machine(1, 1, 1, per_node=1),
}
"""What each config is for, by its name."""
TWINS = {name: Machine(*(min(2, size) for size in (m.tp, m.pp, m.dp))) for name, m in MACHINES.items()}


def real_config(name: str, *overrides: str) -> Any:
    """The shipped config."""
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def shape_dir(name: str) -> Path:
    """The directory under ``examples/models`` with the shape of a config's model."""
    return SHAPES / Path(real_config(name).model.path).name


def write_twin_model(name: str, path: Path) -> Path:
    """A random model of the config's family: its rope, norm and tied embeddings from the shape file, tiny sizes."""
    tokenizer = tiny.quickstart().make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in SPECIAL]})
    tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    tokenizer.chat_template = load_template("oreal")
    shape = json.loads((shape_dir(name) / "config.json").read_text())
    kept = {key: shape[key] for key in ("rope_theta", "rms_norm_eps", "tie_word_embeddings")}
    stop = tokenizer.convert_tokens_to_ids(real_config(name).model.stop_word)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + len(tokenizer) % 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        eos_token_id=stop,
        bos_token_id=None,
        **kept,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_data(path: Path) -> Path:
    """Additions with pass rates in every bucket, and one outside all."""
    rates = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    lines = [{"question": f"{i}+{i}", "gold_answer": str(2 * i), "pass_rate": rates[i % 6]} for i in range(24)]
    return tiny.write_lines(path, lines)


def overrides(name: str, folder: Path, *, engine: str = "embedded") -> list[str]:
    """All that makes a twin of a config; ``folder`` has ``model`` and ``train.jsonl``, and gets ``run``."""
    real, twin = real_config(name), TWINS[name]
    keys = [f"work_dir={folder / 'run'}", f"model.path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}"]
    keys += [f"parallel.tensor_model_parallel_size={twin.tp}", f"parallel.pipeline_model_parallel_size={twin.pp}"]
    keys += ["rollout.prompts_per_step=4", "rollout.prompt_repeat_k=4", "rollout.max_running_requests=16"]
    keys += ["rollout.gen_max_new=24", "rollout.gen_max_length=128", "parallel.max_tokens_per_microbatch=128"]
    keys += [f"total_steps={STEPS}", f"algorithm.actor_freeze_steps={min(1, real.algorithm.actor_freeze_steps)}"]
    keys += ["checkpoint.every=0", "verifier.num_processes=1", "verifier.checker=mixed_checker:judge_response"]
    if real.parallel.recompute_num_layers is not None:
        keys += ["parallel.recompute_num_layers=1"]
    if engine == "embedded":
        return [*keys, "device=cpu", "rollout.engine=embedded", "rollout.sglang={}", "rollout.engine_tp=1"]
    # With the memory saver, weights that sleep took away are NaN until they are loaded: a forgotten sync shows.
    keys += ["rollout.sglang={enable_memory_saver: true}", f"rollout.engine_tp={min(2, real.rollout.engine_tp)}"]
    # SGLang pads a vocabulary to multiples of 64; that of the real models needs none. So both split it at the same row.
    return [*keys, "device=cpu", "rollout.engine=sglang", "parallel.make_vocab_size_divisible_by=64"]


@dataclass(frozen=True)
class Job:
    """One training of a config, ``resume_from``: the checkpoint that its empty work_dir begins with."""

    name: str
    overrides: list[str]
    resume_from: str | None = None


def train_twins(jobs: Sequence[Job], timeout_s: float = 550) -> None:
    """Train twins of as many ranks, one after the other in one ``torchrun`` launch; fails with the ranks' output."""
    (ranks,) = {TWINS[job.name].ranks for job in jobs}
    trainings = [(CONFIGS / f"{job.name}.yaml", job.overrides, job.resume_from) for job in jobs]
    run_ranks("twin_workers:train_in_turn", ranks, {"trainings": trainings}, timeout_s=timeout_s)
