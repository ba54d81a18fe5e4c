"""From what a step drew and learned to the metrics it logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.algorithm import Kept, StepStatistics, step_statistics
from megatron_oreal.data.packing import MicrobatchPlan
from megatron_oreal.rollout.draw import Samples
from megatron_oreal.telemetry import names
from megatron_oreal.verifier.judge_stats import DEADLINE, REFUSED, REPLY, UNREACHABLE, VOTES, JudgeStats
from megatron_oreal.verifier.verdict import cause_of

if TYPE_CHECKING:
    from megatron_oreal.actor.actor import UpdateResult
    from megatron_oreal.actor.publish import PublishReport

_UNKNOWN_CAUSES = {
    DEADLINE: names.JUDGE_UNKNOWN_DEADLINE,
    UNREACHABLE: names.JUDGE_UNKNOWN_UNREACHABLE,
    REFUSED: names.JUDGE_UNKNOWN_REFUSED,
    REPLY: names.JUDGE_UNKNOWN_REPLY,
    VOTES: names.JUDGE_UNKNOWN_VOTES,
}


def rollout_metrics(
    samples: Samples, rewards: NDArray[np.int8], kept: Sequence[Kept]
) -> tuple[dict[str, float], StepStatistics]:
    """Metrics of the responses; ``rewards`` int8 [G, K]."""
    lengths = samples.rows["response_tokens"].reshape(rewards.shape)
    stopped = samples.rows["stopped"].reshape(rewards.shape)
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
        names.TOKENS_ALL: int(lengths.sum()) + int(samples.rows["prompt_tokens"].sum()),
        names.KEPT_MASS: _known_mean(samples.rows["kept_mass"]),
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}, statistics


def _known_mean(values: NDArray[np.float64]) -> float | None:
    """None when an engine did not know one of them."""
    return None if np.isnan(values).any() else float(np.mean(values))


def verdict_metrics(samples: Samples, judge: JudgeStats | None) -> dict[str, float]:
    """Who decided the step's responses, and what the judge had to do for it; ``judge``: sums over all ranks."""
    known = samples.rows["reward"] != 0
    by_judge = int((known & samples.rows["by_judge"]).sum())
    metrics = {
        names.BY_RULES_SHARE: (int(known.sum()) - by_judge) / max(len(samples), 1),
        names.BY_JUDGE_SHARE: by_judge / max(len(samples), 1),
    }
    if judge is None:
        return metrics
    metrics |= {
        names.JUDGE_REQUESTS: float(judge.requests),
        names.JUDGE_RETRIES: float(judge.retries),
        names.JUDGE_CACHE_HITS: float(judge.cache_hits),
        names.JUDGE_SHARED: float(judge.shared),
        names.JUDGE_WITHHELD: float(judge.withheld),
        **{metric: float(judge.unknown[cause]) for cause, metric in _UNKNOWN_CAUSES.items()},
        names.JUDGE_UNKNOWN_OTHER: float(sum(n for cause, n in judge.unknown.items() if cause not in _UNKNOWN_CAUSES)),
    }
    if judge.latencies:
        metrics[names.JUDGE_LATENCY_MEAN] = float(np.mean(judge.latencies))
        metrics[names.JUDGE_LATENCY_P95] = float(np.quantile(judge.latencies, 0.95))
    return metrics


def unknown_causes(samples: Samples) -> tuple[list[tuple[str, int]], str]:
    """Causes of unknown verdicts with their counts, the commonest first, and the commonest reason of the first."""
    causes: Counter[str] = Counter()
    for reason, count in samples.unknown.items():
        causes[cause_of(reason)] += count
    commonest = causes.most_common()
    of_first = Counter({r: n for r, n in samples.unknown.items() if commonest and cause_of(r) == commonest[0][0]})
    return commonest, of_first.most_common(1)[0][0] if of_first else ""


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
        **_packing_metrics(result.plan),
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
    if (gap := result.sums.logp_gap) is not None:
        metrics |= {names.LOGP_DIFF_MEAN: gap.mean, names.LOGP_DIFF_P999: gap.p999, names.LOGP_DIFF_MAX: gap.max}
    return metrics


def _packing_metrics(plan: MicrobatchPlan) -> dict[str, float]:
    return {
        names.BALANCE: plan.balance,
        names.MICROBATCH_BALANCE: plan.microbatch_balance,
        names.MICROBATCHES: float(plan.num_microbatches),
        names.IDLE_MICROBATCHES: float(plan.idle_microbatches),
        names.PADDING_SHARE: plan.padding_share,
        names.BUBBLE_SHARE: plan.bubble_share,
    }


def publish_metrics(report: PublishReport) -> dict[str, float]:
    """What a publish moved, and what its verification found."""
    metrics: dict[str, float] = {names.PUBLISH_RECEIVED: report.received_max}
    if report.digest is not None:
        metrics[names.PUBLISH_DRIFTED] = len(report.digest.drifted)
    return metrics


def verification_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The part of a publish that its verification took, from the step's times; nothing when it verified nothing."""
    publish, digest = (metrics.get(names.phase_metric(phase), 0.0) for phase in ("publish", "publish/digest"))
    return {names.PUBLISH_DIGEST_SHARE: digest / publish} if digest else {}


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
