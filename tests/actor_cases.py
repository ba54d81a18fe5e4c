"""Workers and small models for the actor tests; each worker runs on every rank of a real gloo world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.batch import Batch, TrainSequence
from megatron_oreal.actor.parallel import ParallelGrid, init_parallel
from megatron_oreal.checkpoint import Checkpoints
from megatron_oreal.config import Config
from megatron_oreal.config_load import parse_config
from megatron_oreal.data.packing import PackItem
from megatron_oreal.layout import embedded_layout, load_model_spec
from megatron_oreal.platform import Platform, init_distributed, shutdown_distributed
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Request, SamplingParams

OTHER_MOMENTS = (0.5, 0.75), 1e-3  # betas and eps that a run is resumed with in the end
VOCABULARY = 101  # odd: the vocabulary needs padding under TP 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
}


def make_model(name: str, folder: Path) -> Path:
    """A random model whose norms and biases differ from their neutral values, so that a mix-up shows."""
    config_class, model_class, extra = MODELS[name]
    settings = {"tie_word_embeddings": False} | extra
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            **settings,
        )
    ).float()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.1)
    path = folder / name
    model.save_pretrained(path)
    return path


def make_config(path: Path, work_dir: Path, parallel: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """A config whose learning rates make three steps visible."""
    rates = dict.fromkeys(("actor_lr", "actor_min_lr", "token_level_rm_lr", "token_level_rm_lr_min"), 1e-3)
    tree: dict[str, Any] = {
        "work_dir": str(work_dir),
        "device": "cpu",
        "model": {"path": str(path), "stop_word": "unused", "dtype": "fp32"},
        "data": {"train": "unused"},
        "rollout": {"gen_max_length": 128, "gen_max_new": 64},
        "algorithm": {"actor_freeze_steps": 0},
        "optimizer": {"warmup_steps": 0} | rates,
        "parallel": {"max_tokens_per_microbatch": 128} | parallel,
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return parse_config(tree)


def make_sequences(count: int, seed: int = 0) -> list[TrainSequence]:
    """Random sequences of different lengths, one of a single response token, both rewards."""
    rng = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        prompt = rng.integers(0, VOCABULARY, rng.integers(2, 9))
        response = rng.integers(0, VOCABULARY, 1 if index == 1 else rng.integers(2, 40))
        reward = 1 if index % 2 else -1
        item = PackItem(prompt, response)
        sequences.append(TrainSequence(item, reward, reward * (0.3 + 0.1 * index), 0.2 + 0.05 * index))
    return sequences


def start(config: Config) -> tuple[Platform, ParallelGrid, Actor]:
    platform = init_distributed("cpu", 400)
    grid = init_parallel(config.parallel, platform)
    actor = Actor(config, load_model_spec(config.model.path), grid, platform)
    actor.load_hf()
    return platform, grid, actor


def hf_logps(model: torch.nn.Module, sequence: TrainSequence) -> torch.Tensor:
    """Hugging Face's log-probabilities of a response, [n]."""
    ids = torch.tensor(np.concatenate([sequence.item.prompt_ids, sequence.item.response_ids])).long()
    with torch.no_grad():
        logp = model(ids[None]).logits[0].log_softmax(-1)
    first = len(sequence.item.prompt_ids)
    return logp[first - 1 : -1].gather(1, ids[first:, None])[:, 0]


def max_difference(batch: Batch, logps: list[torch.Tensor], model: torch.nn.Module) -> float:
    """Largest |Megatron - Hugging Face| over a batch's response tokens."""
    worst = 0.0
    for microbatch, logp in zip(batch.microbatches, logps, strict=True):
        expected = [hf_logps(model, sequence) for sequence in microbatch.sequences]
        if expected:
            worst = max(worst, float((logp - torch.cat(expected)).abs().max()))
    return worst


def compare_with_hf(paths: list[Path], work_dir: Path, parallel: dict[str, Any]) -> dict[str, float]:
    """Model name -> largest difference of log-probabilities; 0 on ranks without the last stage."""
    worst = {}
    for path in paths:
        config = make_config(path, work_dir, parallel)
        platform = init_distributed("cpu", 400)
        grid = init_parallel(config.parallel, platform)
        actor = Actor(config, load_model_spec(path), grid, platform, policy_only=True)
        actor.load_hf()
        batch = actor.make_batch(make_sequences(8))
        logps = [logp for logp, _ in actor.logprobs(actor.policy, batch)]
        actor.export(work_dir / f"{path.name}-{grid.tp}-{grid.pp}")
        if logps:
            worst[path.name] = max_difference(
                batch, logps, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            )
        else:
            worst[path.name] = 0.0
        from megatron_oreal.actor.parallel import destroy_parallel

        destroy_parallel()
    shutdown_distributed()
    return worst


def three_steps(path: Path, work_dir: Path, parallel: dict[str, Any], count: int = 10, **sections: Any) -> list[dict]:
    """Losses and gradient norms of three updates on the same trajectories."""
    config = make_config(path, work_dir, parallel, **sections)
    platform, _, actor = start(config)
    steps = []
    for step in range(3):
        result = actor.update(make_sequences(count), step)
        numbers = dict(result.sums.values)
        steps.append(
            numbers | {"policy_norm": result.policy_grad_norm, "reward_model_norm": result.reward_model_grad_norm}
        )
    platform.barrier()
    shutdown_distributed()
    return steps


def first_step_exactness(path: Path, work_dir: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Policy against reference before any update, and the embedded engine against the actor."""
    config = make_config(path, work_dir, parallel)
    _, _, actor = start(config)
    assert actor.reference is not None
    engine = EmbeddedEngine(actor.spec, dtype=torch.float32, max_running_requests=4, max_length=128)
    actor.publish(embedded_layout(actor.spec), dict(engine.weight_buffers()))
    engine.load_weights(0)
    sampling = SamplingParams(1.0, 1.0, 0, 30, 128, None)
    drawn = []
    for index, sequence in enumerate(make_sequences(6)):
        request = Request(np.asarray(sequence.item.prompt_ids, dtype=np.int32), seed=index)
        completion = engine.generate([request], sampling)[0]
        item = PackItem(request.prompt_ids, completion.token_ids)
        drawn.append(TrainSequence(item, 1 if index % 2 else -1, 0.5, 0.5, completion.logp))
    batch = actor.make_batch(drawn)
    policy = [logp for logp, _ in actor.logprobs(actor.policy, batch)]
    reference = actor.reference_logps(batch)
    result = actor.update(drawn, 0)
    gap = result.sums.logp_gap
    assert gap is not None
    shutdown_distributed()
    return {
        "identical": all(torch.equal(a, b) for a, b in zip(policy, reference, strict=True)),
        "kl": result.sums.values["kl"],
        "k3": result.sums.values["k3"],
        "engine_difference": gap.max,
        "tokens": gap.count,
    }


def two_syncs(path: Path, work_dir: Path, parallel: dict[str, Any]) -> list[bool]:
    """After each of two updates: is the engine's greedy output that of the exported model in transformers?"""
    config = make_config(path, work_dir, parallel)
    platform, _, actor = start(config)
    engine = EmbeddedEngine(actor.spec, dtype=torch.float32, max_running_requests=4, max_length=128)
    prompts = [np.asarray(sequence.item.prompt_ids, dtype=np.int32) for sequence in make_sequences(4, seed=3)]
    equal = []
    previous: list[list[int]] = []
    for version in range(2):
        actor.update(make_sequences(10), version)
        actor.publish(embedded_layout(actor.spec), dict(engine.weight_buffers()))
        engine.load_weights(version)
        out = work_dir / f"sync{version}"
        actor.export(out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        greedy = SamplingParams(0.0, 1.0, 0, 24, 128, None)
        ours = [c.token_ids.tolist() for c in engine.generate([Request(p, 0) for p in prompts], greedy)]
        theirs = [
            model.generate(torch.tensor(p)[None].long(), max_new_tokens=24, do_sample=False, eos_token_id=None)[
                0, len(p) :
            ].tolist()
            for p in prompts
        ]
        equal.append(ours == theirs and ours != previous)
        previous = ours
        platform.barrier()
    shutdown_distributed()
    return equal


def save_and_resume(
    path: Path, work_dir: Path, parallel: dict[str, Any], resume_parallel: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    """Two steps, save, two more; then the saved state again (perhaps in another layout) and the same two steps.

    In the end once more, with other betas and another eps than those of the saved parameter groups.
    """
    config = make_config(path, work_dir, parallel, **sections)
    platform, grid, actor = start(config)
    checkpoints = Checkpoints(work_dir, 2, platform)
    sequences = make_sequences(10)
    for step in range(2):
        actor.update(sequences, step)
    checkpoints.save(actor, 2, {"at": "two"})
    straight = [actor.update(sequences, step) for step in (2, 3)]
    weights = {name: tensor.clone() for name, tensor in actor.policy.parameters().items()}
    if resume_parallel is not None:
        from megatron_oreal.actor.parallel import destroy_parallel

        destroy_parallel()
        config = make_config(path, work_dir, resume_parallel, **sections)
        grid = init_parallel(config.parallel, platform)
        actor = Actor(config, actor.spec, grid, platform)
        actor.load_hf()
    newest = checkpoints.newest()
    position = checkpoints.load(actor, 2)
    resumed = [actor.update(sequences, step) for step in (2, 3)]
    same_bits = resume_parallel is None and all(
        torch.equal(weights[name], tensor) for name, tensor in actor.policy.parameters().items()
    )
    config.optimizer.betas, config.optimizer.eps = OTHER_MOMENTS
    checkpoints.load(actor, 2)
    actor.update(sequences, 2)
    groups = [g for o in (actor.policy_optimizer, actor.reward_model_optimizer) if o for g in o.megatron.param_groups]
    platform.barrier()
    shutdown_distributed()
    return {
        "newest": newest,
        "position": position,
        "straight": [(r.sums.values, r.policy_grad_norm, r.reward_model_grad_norm) for r in straight],
        "resumed": [(r.sums.values, r.policy_grad_norm, r.reward_model_grad_norm) for r in resumed],
        "same_bits": same_bits,
        "other_moments": [(tuple(group["betas"]), group["eps"]) for group in groups],
    }
