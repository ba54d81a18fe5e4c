"""What must be seen on a GPU before anything is claimed for one: correctness first, then a few timings.

    python benchmarks/gpu/first_run.py --output OUT.json [--device cuda|cpu] [--hidden 1024 --layers 8]

One process. For each dtype and layer implementation that is there (TransformerEngine and torch-native): the actor's
log-probabilities against transformers', policy equal to reference before the first step, three updates, the weights in
the embedded engine and its log-probabilities against the actor's; then tokens a second of an update and of generation.
Runs on a CPU too, so that the script itself is known to work before a GPU is borrowed; then it says so in the result.
The exit status is 1 when a combination failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform as host
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.actor.build import DTYPES
from megatron_oreal.actor.parallel import destroy_parallel, init_parallel
from megatron_oreal.config_load import parse_config
from megatron_oreal.data.packing import PackItem
from megatron_oreal.layout import embedded_layout, load_model_spec
from megatron_oreal.platform import Platform, init_distributed, shutdown_distributed
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Request, SamplingParams

VOCABULARY = 4096
# |difference| of log-probabilities that is rounding: fp32 accumulated in another order, bf16 activations.
TOLERANCE = {"fp32": 2e-3, "bf16": 0.25}


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A random Qwen2 model with biases and norms away from their neutral values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.8, 1.2)
        elif "bias" in name:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder / "model")
    return folder / "model"


def draw(engine: EmbeddedEngine, count: int, new_tokens: int) -> tuple[list[TrainSequence], float]:
    """Responses of the engine to random prompts, as sequences to train on, and its tokens a second."""
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, VOCABULARY, rng.integers(8, 200)).astype(np.int32), i) for i in range(count)]
    began = time.perf_counter()
    completions = engine.generate(requests, SamplingParams(1.0, 1.0, 0, new_tokens, 2048, None))
    seconds = time.perf_counter() - began
    sequences = [
        TrainSequence(PackItem(r.prompt_ids, c.token_ids), 1 if i % 2 else -1, 0.5 if i % 2 else -0.5, 0.5, c.logp)
        for i, (r, c) in enumerate(zip(requests, completions, strict=True))
    ]
    return sequences, sum(len(c.token_ids) for c in completions) / seconds


def check(
    path: Path, dtype: str, implementation: str, platform: Platform, count: int, new_tokens: int
) -> dict[str, Any]:
    """All checks and timings of one combination."""
    rates = dict.fromkeys(("actor_lr", "actor_min_lr", "token_level_rm_lr", "token_level_rm_lr_min"), 1e-5)
    config = parse_config(
        {
            "work_dir": str(path.parent),
            "device": platform.device.type,
            "model": {"path": str(path), "stop_word": "unused", "dtype": dtype},
            "data": {"train": "unused"},
            "rollout": {"gen_max_length": 2048, "gen_max_new": 1024},
            "algorithm": {"actor_freeze_steps": 0, "correct_threshold": 0.0},
            "optimizer": {"warmup_steps": 0} | rates,
            "parallel": {"max_tokens_per_microbatch": 8192, "transformer_impl": implementation},
        }
    )
    grid = init_parallel(config.parallel, platform)
    actor = Actor(config, load_model_spec(path), grid, platform)
    actor.load_hf()
    engine = EmbeddedEngine(
        actor.spec, dtype=DTYPES[dtype], device=platform.device, max_running_requests=count, max_length=2048
    )
    actor.publish(embedded_layout(actor.spec), dict(engine.weight_buffers()))
    engine.load_weights(0)
    sequences, generated_per_s = draw(engine, count, new_tokens)
    batch = actor.make_batch(sequences)
    policy = [logp for logp, _ in actor.logprobs(actor.policy, batch)]
    reference = actor.reference_logps(batch)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(platform.device)
    difference = 0.0
    for microbatch, logp in zip(batch.microbatches, policy, strict=True):
        expected = torch.cat([hf_logp(hf, sequence, platform.device) for sequence in microbatch.sequences])
        difference = max(difference, float((logp.float() - expected).abs().max()))
    seconds = []
    for step in range(4):
        platform.synchronize()
        began = time.perf_counter()
        result = actor.update(sequences, step)
        platform.synchronize()
        seconds.append(time.perf_counter() - began)
        if step == 0:
            first = result
    tokens = sum(sequence.num_tokens for sequence in sequences)
    destroy_parallel()
    identical = all(torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    assert first.sums.logp_gap is not None
    engine_difference = first.sums.logp_gap.max
    return {
        "dtype": dtype,
        "implementation": implementation,
        "max_logp_difference_to_transformers_fp32": difference,
        "policy_equals_reference_bit_for_bit": identical,
        "max_logp_difference_engine_to_actor": engine_difference,
        "loss_reward_model_first": first.sums.values["reward_model"],
        "loss_reward_model_last": result.sums.values["reward_model"],
        "update_seconds": [round(s, 4) for s in seconds],
        "update_tokens_per_s": tokens / min(seconds[1:]),
        "generated_tokens_per_s": generated_per_s,
        "passed": identical
        and difference < TOLERANCE[dtype]
        and engine_difference < TOLERANCE[dtype]
        and result.sums.values["reward_model"] < first.sums.values["reward_model"],
    }


@torch.no_grad()
def hf_logp(model: torch.nn.Module, sequence: TrainSequence, device: torch.device) -> torch.Tensor:
    """Hugging Face's fp32 log-probabilities of a response, [n]."""
    ids = torch.tensor(np.concatenate([sequence.item.prompt_ids, sequence.item.response_ids]), device=device).long()
    first = len(sequence.item.prompt_ids)
    return model(ids[None]).logits[0].log_softmax(-1)[first - 1 : -1].gather(1, ids[first:, None])[:, 0]


def combinations(engine: bool) -> list[tuple[str, str]]:
    """(layers, dtype) that a run may have; ``engine``: TransformerEngine is there, whose layers take bf16 alone."""
    return [*([("transformer_engine", "bf16")] if engine else []), ("local", "fp32"), ("local", "bf16")]


def versions() -> dict[str, str]:
    """Of what matters, where it is installed."""
    found = {"python": host.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", "transformer-engine", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    platform = init_distributed(arguments.device, 300)
    engine = platform.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    name = torch.cuda.get_device_name() if platform.is_cuda else f"CPU: {host.processor() or host.machine()}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder), arguments.hidden, arguments.layers)
        for implementation, dtype in combinations(engine):
            try:
                row = check(path, dtype, implementation, platform, arguments.count, arguments.new_tokens)
            except Exception:  # one broken combination must not cost the borrowed machine's time for the others
                row = {"dtype": dtype, "implementation": implementation, "passed": False}
                row["error"] = traceback.format_exc()[-3000:]
                destroy_parallel()
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
            arguments.output.write_text(
                json.dumps({"device": name, "versions": versions(), "rows": rows}, indent=1) + "\n"
            )
    shutdown_distributed()
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
