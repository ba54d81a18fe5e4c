"""From what a step drew and learned to the metrics it logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.actor.actor import UpdateResult
from megatron_oreal.algorithm import Kept, StepStatistics, step_statistics
from megatron_oreal.data.types import Trajectory
from megatron_oreal.telemetry import names


def rollout_metrics(
    trajectories: Sequence[Trajectory], rewards: NDArray[np.int8], kept: Sequence[Kept]
) -> tuple[dict[str, float], StepStatistics]:
    """Metrics of the responses; ``trajectories`` ordered by (group, sample), ``rewards`` int8 [G, K]."""
    lengths = np.array([len(t.response_ids) for t in trajectories]).reshape(rewards.shape)
    stopped = np.array([t.stopped for t in trajectories]).reshape(rewards.shape)
    statistics = step_statistics(rewards, lengths, stopped, kept)
    known = rewards[rewards != 0]
    metrics: dict[str, float | None] = {
        names.PASS_RATE: statistics.pass_rate,
        names.REWARD_MEAN: float(known.mean()) if known.size else None,
        names.GROUPS_KEPT: statistics.kept_groups,
        names.GROUPS_ALL_CORRECT: statistics.groups_all_correct,
        names.GROUPS_ALL_WRONG: statistics.groups_all_wrong,
        names.GROUPS_FEW_KNOWN: statistics.groups_few_known,
        names.SEQUENCES_KEPT: statistics.kept_sequences,
        names.UNKNOWN_SHARE: statistics.unknown_share,
        names.LENGTH_MEAN: statistics.response_length,
        names.LENGTH_MAX: statistics.response_length_max,
        names.LENGTH_CORRECT: statistics.response_length_correct,
        names.LENGTH_WRONG: statistics.response_length_wrong,
        names.TRUNCATED_SHARE: statistics.truncated_share,
        names.TOKENS_GENERATED: int(lengths.sum()),
        names.TOKENS_ALL: sum(t.num_tokens for t in trajectories),
        names.KEPT_MASS: float(np.mean([t.kept_mass for t in trajectories])),
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}, statistics


def update_metrics(result: UpdateResult) -> dict[str, float]:
    """Metrics of an update, from sums over all ranks and the counts of the global batch."""
    sums, counts = result.sums.values, result.counts
    metrics = {
        names.LOSS_POSITIVE: sums["positive"],
        names.LOSS_NEGATIVE: sums["negative"],
        names.LOSS_KL: sums["kl"],
        names.LOSS_TOTAL: sums["positive"] + sums["negative"] + sums["kl"],
        names.ENTROPY: sums["entropy"] * counts.inv_tokens,
        names.KL_TO_REFERENCE: sums["k3"] * counts.inv_tokens,
        names.LR_POLICY: result.policy_lr,
        names.BALANCE: result.balance,
    }
    if result.policy_grad_norm is not None:
        metrics[names.GRAD_NORM_POLICY] = result.policy_grad_norm
    if result.reward_model_grad_norm is not None:
        metrics |= {
            names.LOSS_REWARD_MODEL: sums["reward_model"],
            names.REWARD_MODEL_ACCURACY: sums["reward_model_correct"] * counts.inv_sequences,
            names.GRAD_NORM_REWARD_MODEL: result.reward_model_grad_norm,
            names.LR_REWARD_MODEL: result.reward_model_lr,
            names.POSITIVE_WEIGHT_MEAN: sums["positive_weight"] * counts.inv_positive,
            names.POSITIVE_WEIGHT_NONZERO: sums["positive_weight_nonzero"] * counts.inv_positive,
            names.NEGATIVE_WEIGHT_MEAN: sums["negative_weight"] * counts.inv_negative,
            names.NEGATIVE_WEIGHT_NONZERO: sums["negative_weight_nonzero"] * counts.inv_negative,
        }
    if result.sums.logp_diffs:
        diffs = np.concatenate(result.sums.logp_diffs)
        metrics |= {
            names.LOGP_DIFF_MEAN: float(diffs.mean()),
            names.LOGP_DIFF_P999: float(np.quantile(diffs, 0.999)),
            names.LOGP_DIFF_MAX: float(diffs.max()),
        }
    return metrics


def throughput_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens a second of generation and of the whole step, from the step's token counts and times."""
    generate = metrics.get(names.phase_metric("generate"), 0.0)
    step = metrics[names.TIME_STEP] - metrics.get(names.phase_metric("evaluate"), 0.0)
    throughput = {}
    if generate > 0:
        throughput[names.GENERATED_PER_S] = metrics[names.TOKENS_GENERATED] / generate
    if step > 0:
        throughput[names.TOKENS_PER_S] = metrics[names.TOKENS_ALL] / step
    return throughput
