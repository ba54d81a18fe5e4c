"""The arithmetic between an update's sums and the metrics that are logged."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_oreal.actor.actor import UpdateResult
from megatron_oreal.actor.sums import LogpGap, StepSums
from megatron_oreal.algorithm import Normalisers, select
from megatron_oreal.data.packing import MicrobatchPlan
from megatron_oreal.data.types import Trajectory
from megatron_oreal.rollout.draw import Samples
from megatron_oreal.step_metrics import rollout_metrics, throughput_metrics, update_metrics, verdict_metrics
from megatron_oreal.telemetry import names
from megatron_oreal.verifier.judge_stats import DEADLINE, REPLY, JudgeStats
from megatron_oreal.verifier.verdict import Judgement, Verdict

SUMS = {
    "positive": 0.5,
    "negative": -0.25,
    "kl": 0.125,
    "entropy": 20.0,
    "k3": 5.0,
    "reward_model": 0.75,
    "reward_model_correct": 3.0,
    "positive_weight": 6.0,
    "positive_weight_nonzero": 9.0,
    "negative_weight": 4.0,
    "negative_weight_nonzero": 7.0,
}
PLAN = MicrobatchPlan([[[0], [1]], [[2, 3], []]], [[8, 8], [8, 4]], 1.5, 1.25, 0.125, 0.4)
COUNTS = Normalisers(positive_tokens=12, negative_tokens=28, tokens=40, sequences=4)


def result(
    *, policy: float | None = 2.0, reward_model: float | None = 3.0, counts: Normalisers = COUNTS, diffs: bool = True
) -> UpdateResult:
    sums = StepSums(dict(SUMS), LogpGap(1000, 0.2575, 0.75, 1.0) if diffs else None)
    rates = (0.0 if policy is None else 1e-4, 0.0 if reward_model is None else 2e-4)
    return UpdateResult(sums, counts, PLAN, policy, rates[0], reward_model, rates[1])


def test_losses_are_sums_already_and_the_rest_is_divided_by_the_counts_of_its_own_tokens() -> None:
    assert update_metrics(result()) == pytest.approx(
        {
            names.LOSS_POSITIVE: 0.5,
            names.LOSS_NEGATIVE: -0.25,
            names.LOSS_KL: 0.125,
            names.LOSS_TOTAL: 0.375,
            names.LOSS_REWARD_MODEL: 0.75,
            names.ENTROPY: 20 / 40,
            names.KL_TO_REFERENCE: 5 / 40,
            names.REWARD_MODEL_ACCURACY: 3 / 4,
            names.POSITIVE_WEIGHT_MEAN: 6 / 12,
            names.POSITIVE_WEIGHT_NONZERO: 9 / 12,
            names.NEGATIVE_WEIGHT_MEAN: 4 / 28,
            names.NEGATIVE_WEIGHT_NONZERO: 7 / 28,
            names.LR_POLICY: 1e-4,
            names.LR_REWARD_MODEL: 2e-4,
            names.GRAD_NORM_POLICY: 2.0,
            names.GRAD_NORM_REWARD_MODEL: 3.0,
            names.BALANCE: 1.5,
            names.MICROBATCH_BALANCE: 1.25,
            names.MICROBATCHES: 2.0,
            names.IDLE_MICROBATCHES: 1.0,
            names.PADDING_SHARE: 0.125,
            names.BUBBLE_SHARE: 0.4,
            names.LOGP_DIFF_MEAN: 0.2575,
            names.LOGP_DIFF_P999: 0.75,
            names.LOGP_DIFF_MAX: 1.0,
        }
    )


def test_a_frozen_policy_has_no_gradient_norm_and_rate_zero() -> None:
    metrics = update_metrics(result(policy=None))
    assert names.GRAD_NORM_POLICY not in metrics
    assert metrics[names.LR_POLICY] == 0.0
    assert metrics[names.GRAD_NORM_REWARD_MODEL] == 3.0


def test_without_a_reward_model_nothing_is_logged_of_it() -> None:
    metrics = update_metrics(result(reward_model=None))
    assert not [name for name in metrics if "reward_model" in name or name.startswith("weights/")]
    assert metrics[names.LOSS_TOTAL] == 0.375


def test_only_negatives_divide_nothing_by_zero() -> None:
    metrics = update_metrics(result(counts=Normalisers(0, 40, 40, 4)))
    assert metrics[names.POSITIVE_WEIGHT_MEAN] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_differences_are_not_logged_when_no_engine_drew_the_sequences() -> None:
    assert not [name for name in update_metrics(result(diffs=False)) if name.startswith("rollout/logp_diff")]


def test_every_metric_of_an_update_is_documented() -> None:
    assert all(names.describe(name).meaning for name in update_metrics(result()))


def trajectory(group: int, sample: int, length: int, *, stopped: bool = True, kept_mass: float = 1.0) -> Trajectory:
    tokens = np.zeros(length, np.int32)
    return Trajectory(
        group, sample, np.zeros(5, np.int32), tokens, np.zeros(length, np.float32), stopped, kept_mass=kept_mass
    )


def test_rollout_metrics_leave_unknown_verdicts_out_of_rates_and_not_out_of_counts() -> None:
    rewards = np.array([[1, -1, 0], [-1, -1, -1]], dtype=np.int8)
    trajectories = [
        trajectory(0, 0, 4, kept_mass=0.5),
        trajectory(0, 1, 6),
        trajectory(0, 2, 20),
        trajectory(1, 0, 7),
        trajectory(1, 1, 7),
        trajectory(1, 2, 10, stopped=False),
    ]
    kept = select(rewards, filter="pair", run_seed=0, step=0)
    metrics, statistics = rollout_metrics(Samples.of(trajectories), rewards, kept)
    assert metrics == pytest.approx(
        {
            names.PASS_RATE: 1 / 5,
            names.REWARD_MEAN: -3 / 5,
            names.GROUPS_KEPT: 1,
            names.GROUPS_ALL_CORRECT: 0,
            names.GROUPS_ALL_WRONG: 1,
            names.GROUPS_FEW_KNOWN: 0,
            names.SEQUENCES_KEPT: 2,
            names.UNKNOWN_SHARE: 1 / 6,
            names.LENGTH_MEAN: 54 / 6,
            names.LENGTH_MAX: 20,
            names.LENGTH_CORRECT: 4,
            names.LENGTH_WRONG: 30 / 4,
            names.TRUNCATED_SHARE: 1 / 6,
            names.TOKENS_GENERATED: 54,
            names.TOKENS_ALL: 54 + 6 * 5,
            names.KEPT_MASS: 5.5 / 6,
        }
    )
    assert statistics.groups_all_wrong == 1


def test_what_is_undefined_in_a_step_is_not_logged() -> None:
    rewards = np.zeros((1, 2), dtype=np.int8)
    metrics, _ = rollout_metrics(Samples.of([trajectory(0, 0, 3), trajectory(0, 1, 3)]), rewards, [])
    undefined = {names.PASS_RATE, names.REWARD_MEAN, names.LENGTH_CORRECT, names.LENGTH_WRONG}
    assert not undefined & metrics.keys()
    assert metrics[names.UNKNOWN_SHARE] == 1.0


def test_throughput_counts_response_tokens_over_generation_and_all_tokens_over_the_step_without_evaluation() -> None:
    metrics = {
        names.TOKENS_GENERATED: 600.0,
        names.TOKENS_ALL: 800.0,
        names.phase_metric("generate"): 2.0,
        names.phase_metric("evaluate"): 6.0,
        names.TIME_STEP: 10.0,
    }
    assert throughput_metrics(metrics) == {names.GENERATED_PER_S: 300.0, names.TOKENS_PER_S: 200.0}


@pytest.mark.parametrize("step_time", [0.0, 1.0])
def test_throughput_without_a_measured_time_is_not_logged(step_time: float) -> None:
    metrics = {names.TOKENS_GENERATED: 600.0, names.TOKENS_ALL: 800.0, names.TIME_STEP: step_time}
    expected = {names.TOKENS_PER_S: 800.0} if step_time else {}
    assert throughput_metrics(metrics) == expected


def test_who_decided_and_what_the_judge_had_to_do_are_counted_over_all_ranks() -> None:
    reasons = [
        "equal",
        "not equal",
        "judge: wrong",
        f"{DEADLINE}: late",
        f"{DEADLINE}: later",
        "deadline of 10 s exceeded",
    ]
    verdicts = [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, *[Verdict.UNKNOWN] * 3]
    drawn = [trajectory(0, n, 3) for n in range(6)]
    for one, verdict, reason in zip(drawn, verdicts, reasons, strict=True):
        one.judgement = Judgement(verdict, reason)
    assert verdict_metrics(Samples.of(drawn), None) == {names.BY_RULES_SHARE: 2 / 6, names.BY_JUDGE_SHARE: 1 / 6}
    ranks = [JudgeStats(3, 1, 2, 0, 1, [1.0, 2.0]), JudgeStats(5, 0, 1, 4, 2, [3.0])]
    ranks[0].unknown.update([DEADLINE, "judge failed"])
    ranks[1].unknown.update([DEADLINE, REPLY])
    metrics = verdict_metrics(Samples.of(drawn), ranks[0] + ranks[1])
    judge = {name: value for name, value in metrics.items() if name.startswith("judge/") and value}
    assert judge == {
        names.JUDGE_REQUESTS: 8,
        names.JUDGE_RETRIES: 1,
        names.JUDGE_CACHE_HITS: 3,
        names.JUDGE_SHARED: 4,
        names.JUDGE_WITHHELD: 3,
        names.JUDGE_LATENCY_MEAN: 2.0,
        names.JUDGE_LATENCY_P95: pytest.approx(2.9),
        names.JUDGE_UNKNOWN_DEADLINE: 2,
        names.JUDGE_UNKNOWN_REPLY: 1,
        names.JUDGE_UNKNOWN_OTHER: 1,
    }
