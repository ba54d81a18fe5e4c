"""Held-out problems: sampled pass@1 with its interval, and greedy accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_oreal.algorithm import request_seed
from megatron_oreal.config import Config
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.run import open_run
from megatron_oreal.telemetry import grouped_interval, names, pass_at_1
from megatron_oreal.verifier.verdict import Verdict

# Evaluations draw with seeds of a step that no training step has, the same at every evaluation: differences between
# two evaluations are then less noisy than either.
_EVALUATION_STEP = -1


def evaluate(
    sampler: RolloutSampler,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    *,
    quiet: bool = False,
) -> dict[str, float]:
    """pass@1 over ``num_samples`` samples a problem at the training temperature, top-p and top-k off; and greedy.

    An unknown verdict counts as not solved: accuracy is a claim about what was shown to be right. ``quiet``: no bars.
    """
    full = replace(sampling, top_p=1.0, top_k=0)
    sampled = _correct(sampler, prompts, num_samples, full, run_seed, None if quiet else "evaluate")
    greedy = _correct(
        sampler, prompts, 1, replace(full, temperature=0.0), run_seed, None if quiet else "evaluate greedy"
    )
    interval = grouped_interval(sampled)
    return {
        names.EVAL_PASS_AT_1: pass_at_1(sampled),
        names.EVAL_PASS_AT_1_LOW: interval.low,
        names.EVAL_PASS_AT_1_HIGH: interval.high,
        names.EVAL_GREEDY: pass_at_1(greedy),
    }


def _correct(
    sampler: RolloutSampler,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    label: str | None,
) -> np.ndarray:
    """Bool [problems, samples]."""
    drawn = sampler.sample(
        prompts, num_samples, sampling, lambda group, k: request_seed(run_seed, _EVALUATION_STEP, group, k), label
    )
    verdicts = [
        trajectory.judgement is not None and trajectory.judgement.verdict is Verdict.CORRECT for trajectory in drawn
    ]
    return np.array(verdicts).reshape(len(prompts), num_samples)


def evaluate_model(config: Config) -> dict[str, float]:
    """Evaluate ``model.path`` on ``evaluation.data`` and print pass@1. Raises ``UserError`` without evaluation data."""
    if config.evaluation.data is None:
        raise UserError("evaluation.data is missing: give held-out problems (question, gold_answer)")
    with open_run(config, policy_only=True) as run:
        run.actor.load_hf()
        run.publish()
        result = evaluate(run.rollouts, run.held_out, config.evaluation.num_samples, run.sampling, config.seed)
        run.say(
            f"pass@1 on {len(run.held_out)} problems: sampled {result[names.EVAL_PASS_AT_1]:.3f} "
            f"[{result[names.EVAL_PASS_AT_1_LOW]:.3f}, {result[names.EVAL_PASS_AT_1_HIGH]:.3f}] "
            f"({config.evaluation.num_samples} samples each), greedy {result[names.EVAL_GREEDY]:.3f}"
        )
    return result
