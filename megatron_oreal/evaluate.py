"""Held-out problems: sampled pass@1 with its interval, and greedy accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.algorithm import request_seed
from megatron_oreal.config import Config
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.rollout.sampler import RolloutSampler
from megatron_oreal.run import open_run
from megatron_oreal.telemetry import grouped_interval, names, pass_at_1

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

    A response with an unknown verdict leaves its problem's pass rate, as in training; ``eval/unknown_share`` is the
    share of both kinds of samples that did, and the accuracy is NaN where all did. ``quiet``: no bars.
    """
    full = replace(sampling, top_p=1.0, top_k=0)
    sampled = _rewards(sampler, prompts, num_samples, full, run_seed, None if quiet else "evaluate")
    greedy = _rewards(
        sampler, prompts, 1, replace(full, temperature=0.0), run_seed, None if quiet else "evaluate greedy"
    )
    solved = known_correct(sampled)
    interval = grouped_interval(solved)
    everything = np.concatenate([sampled.ravel(), greedy.ravel()])
    return {
        names.EVAL_PASS_AT_1: pass_at_1(solved),
        names.EVAL_PASS_AT_1_LOW: interval.low,
        names.EVAL_PASS_AT_1_HIGH: interval.high,
        names.EVAL_GREEDY: pass_at_1(known_correct(greedy)),
        names.EVAL_UNKNOWN_SHARE: int((everything == 0).sum()) / max(len(everything), 1),
    }


def known_correct(rewards: NDArray[np.int8]) -> list[list[bool]]:
    """Return for every problem which of its samples with a known verdict are correct; ``rewards`` int8 [G, K]."""
    return [(problem[problem != 0] == 1).tolist() for problem in rewards]


def require_known(result: Mapping[str, float], limit: float) -> None:
    """Raise ``UserError`` when more of an evaluation than ``limit`` (``verifier.max_unknown_share``) is unknown."""
    share = result[names.EVAL_UNKNOWN_SHARE]
    if share > limit:
        raise UserError(
            f"verifier.max_unknown_share={limit}: {share:.0%} of the evaluation's verdicts are unknown, and accuracy "
            "on the rest is no estimate for all: repair the judge (verifier.hosts, judge.timeout_s, judge.deadline_s), "
            "or raise the limit"
        )


def _rewards(
    sampler: RolloutSampler,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    label: str | None,
) -> NDArray[np.int8]:
    """Verdicts as +1, -1 and 0 (unknown), int8 [G, K]."""
    drawn = sampler.sample(
        prompts, num_samples, sampling, lambda group, k: request_seed(run_seed, _EVALUATION_STEP, group, k), label
    )
    return drawn.samples.rewards(num_samples)


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
            f"({config.evaluation.num_samples} samples each), greedy {result[names.EVAL_GREEDY]:.3f}, "
            f"{result[names.EVAL_UNKNOWN_SHARE]:.1%} of the verdicts unknown"
        )
        require_known(result, config.verifier.max_unknown_share)
    return result
