"""Settings of different kinds, and what their actors and engines really take on gloo ranks."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_oreal.actor import offload
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.actor.parallel import destroy_parallel, init_parallel
from megatron_oreal.config_load import parse_config
from megatron_oreal.data.packing import PackItem
from megatron_oreal.layout import ModelSpec, embedded_layout
from megatron_oreal.layout.model_spec import model_spec_from_config
from megatron_oreal.planner.live import LiveStorages
from megatron_oreal.planner.types import Setting
from megatron_oreal.planner.watch import PhaseWatch
from megatron_oreal.platform import Platform, init_distributed, shutdown_distributed
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Request, SamplingParams
from megatron_oreal.telemetry import PhaseTimers

PROMPT = 40


def small_spec(**changes: Any) -> ModelSpec:
    """Qwen2's form, small: widths that are no multiples of each other, so that a mix-up shows."""
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 515,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return model_spec_from_config(shape | changes)


@dataclass(frozen=True)
class Case:
    """One setting that is measured; ``lengths``: of the kept sequences."""

    name: str
    world_size: int
    parallel: dict[str, Any]
    dtype: str = "bf16"
    reward_model: bool = True
    shape: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (900, 700, 1000, 1024, 300, 512, 800, 640)
    max_length: int = 1024

    def setting(self, **changes: Any) -> Setting:
        """As the planner takes it; ``changes``: of ``Setting``'s fields."""
        length = self.max_length
        tree = {
            "work_dir": "unused",
            "device": "cpu",
            "model": {"path": "unused", "stop_word": "x", "dtype": self.dtype, "reward_model": self.reward_model},
            "data": {"train": "unused"},
            "rollout": {
                "gen_max_length": length,
                "gen_max_new": length - PROMPT,
                "prompts_per_step": 4,
                "prompt_repeat_k": 4,
                "max_running_requests": 8,
            },
            "algorithm": {"actor_freeze_steps": 0},
            "parallel": {"max_tokens_per_microbatch": length} | self.parallel,
        }
        fields: dict[str, Any] = {
            "config": parse_config(tree),
            "spec": small_spec(**self.shape),
            "world_size": self.world_size,
            "ranks_per_node": self.world_size,
            "implementation": "local",
            "device": "cpu",
            "reserve_bytes": 0,
            "lengths": self.lengths,
            "prompt_tokens": PROMPT,
        }
        return Setting(**(fields | changes))


_FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_QUICK: dict[str, Any] = {"lengths": (120, 128, 100, 90), "max_length": 128}
CASES = {
    case.name: case
    for case in (
        Case("TP2, sequence parallel, bf16", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        Case("PP2, bf16, no reward model", 2, {"pipeline_model_parallel_size": 2}, reward_model=False),
        Case(
            "PP2, VPP2, fp32",
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            dtype="fp32",
        ),
        Case(
            "DP2, full recompute, all offloaded, bf16",
            2,
            _FULL_RECOMPUTE | {"offload": ["optimizer", "reward_model", "reference", "policy"]},
        ),
        Case(
            "DP2, vocabulary of 30,000, fp32",
            2,
            {},
            dtype="fp32",
            shape={"vocab_size": 30000, "hidden_size": 64},
            lengths=(900, 700, 300, 512),
        ),
    )
}
"""The five of the benchmark: what they showed has corrected the planner's formulas."""
BLIND_CASES = {
    case.name: case
    for case in (
        Case(
            "TP2, PP2, sequence parallel, attention and MLP recomputed, bf16",
            4,
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "mlp"],
            },
        ),
        Case(
            "Qwen3, tied, TP2, sequence parallel, 2 of 4 layers recomputed, 2 offloaded, bf16",
            2,
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
                "max_tokens_per_microbatch": 1500,
                "offload": ["reference", "reward_model"],
            },
            shape={"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": True},
            lengths=(700, 730, 600, 350, 400, 720, 90, 733),
            max_length=768,
        ),
    )
}
"""Predicted before they were first measured; the result file keeps what was predicted then."""
CI_CASES = {
    case.name: case
    for case in (
        Case("TP2, SP", 2, CASES["TP2, sequence parallel, bf16"].parallel, reward_model=False, **_QUICK),
        Case("DP2, recompute, offload", 2, CASES["DP2, full recompute, all offloaded, bf16"].parallel, **_QUICK),
    )
}
"""Two that take seconds, of one world size."""


def sequences_of(setting: Setting) -> list[TrainSequence]:
    """The step's kept sequences, random tokens."""
    rng = np.random.default_rng(0)
    sequences = []
    for index, length in enumerate(setting.lengths or ()):
        ids = rng.integers(0, setting.spec.vocab_size, length)
        item = PackItem(ids[: setting.prompt_tokens], ids[setting.prompt_tokens :])
        sequences.append(TrainSequence(item, 1 if index % 2 else -1, 0.5, 0.5))
    return sequences


def measure(cases: list[Case]) -> list[dict[str, int]]:
    """Worker: ``_measure`` of each case, all of this world size."""
    platform = init_distributed("cpu", 300)
    measured = []
    for case in cases:
        measured.append(_measure(case, platform))
        destroy_parallel()
        gc.collect()
    platform.barrier()
    shutdown_distributed()
    return measured


def _measure(case: Case, platform: Platform) -> dict[str, int]:
    """Live bytes at the peak of each phase of a real rank's second step; the embedded engine is there too.

    Parts wait in host memory as ``run.publish`` leaves them. Host copies do not count, though here both are one memory.
    """
    setting = case.setting()
    torch.manual_seed(0)
    grid = init_parallel(setting.config.parallel, platform)
    rollout, dtype = setting.config.rollout, torch.bfloat16 if case.dtype == "bf16" else torch.float32
    drawn = rollout.prompts_per_step * rollout.prompt_repeat_k // case.world_size  # by a rank
    running = min(drawn, rollout.max_running_requests)
    with LiveStorages() as storages, mock.patch.object(offload, "_slabs", _ignored(storages)):
        engine = EmbeddedEngine(setting.spec, dtype=dtype, max_running_requests=running, max_length=case.max_length)
        storages.restart()
        actor = Actor(setting.config, setting.spec, grid, platform)
        peaks = {"start": sum(storages.peak.values())}
        _initialise(actor)
        for step in range(2):
            actor.offloader.offload("optimizer", "reward_model", "reference")
            storages.restart()
            actor.publish(embedded_layout(setting.spec), dict(engine.weight_buffers()), step, PhaseTimers())
            peaks["publish"] = sum(storages.peak.values())
            actor.offloader.offload("policy")
            actor.release_publisher()
            if step == 1:
                engine.load_weights(step)
                storages.restart()
                sampling = SamplingParams(1.0, 1.0, 0, case.max_length, case.max_length, None)
                prompt = np.arange(PROMPT, dtype=np.int32)
                engine.generate([Request(prompt + i, i) for i in range(running)], sampling)
                peaks["generate"] = sum(storages.peak.values())
            gc.collect()  # Megatron's interleaved schedule leaves reference cycles that hold tensors
            watch = PhaseWatch(storages)
            with watch.actor():
                actor.update(sequences_of(setting), step, watch)
        peaks |= {phase: sum(peak.values()) for phase, peak in watch.peaks.items()}
        storages.restart()
        actor.offloader.load("policy", "optimizer", "reward_model")
        peaks["checkpoint"] = sum(storages.peak.values())
    return peaks


def _initialise(actor: Actor) -> None:
    models = [(actor.policy, actor.policy_optimizer), (actor.reference, None)]
    models.append((actor.reward_model, actor.reward_model_optimizer))
    actor.offloader.load()
    for model, optimizer in models:
        if model is None:
            continue
        with torch.no_grad():
            for name, parameter in model.parameters().items():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
        if optimizer is not None:
            optimizer.reload_model_params()


def _ignored(storages: LiveStorages) -> Any:
    make = offload._slabs

    def slabs(size: int, *, pinned: bool) -> list[torch.Tensor]:
        with storages.ignoring():
            return make(size, pinned=pinned)

    return slabs
