"""Every metric a step can log: its name, its unit and what it means. Nothing else spells a metric's name.

Names are ``namespace/snake_case``. Shares are fractions in [0, 1]. "Kept" is what the group filter left
(algorithm.md, "One step" 4); "known" leaves out the verdict *unknown*. Counts and means are over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One documented metric. ``unit`` is what an axis label shows in brackets; empty for a pure number."""

    name: str
    unit: str
    meaning: str


REGISTRY: dict[str, Metric] = {}


def _metric(name: str, unit: str, meaning: str) -> str:
    assert name not in REGISTRY, f"{name} is registered twice"
    REGISTRY[name] = Metric(name, unit, meaning)
    return name


PASS_RATE = _metric("reward/pass_rate", "share", "correct responses among the known ones, before any filtering")
REWARD_MEAN = _metric("reward/mean", "", "mean outcome reward of the known responses: +1 correct, -1 wrong")
GROUPS_KEPT = _metric("groups/kept", "groups", "prompts whose group passed the filter")
GROUPS_ALL_CORRECT = _metric("groups/all_correct", "groups", "prompts whose known responses were all correct")
GROUPS_ALL_WRONG = _metric("groups/all_wrong", "groups", "prompts whose known responses were all wrong")
GROUPS_FEW_KNOWN = _metric("groups/few_known", "groups", "prompts with fewer than two known responses: dropped")
SEQUENCES_KEPT = _metric("groups/kept_sequences", "sequences", "responses that were trained on")
UNKNOWN_SHARE = _metric("verdict/unknown_share", "share", "responses that no verifier could decide")
BY_RULES_SHARE = _metric("verdict/by_rules_share", "share", "responses whose verdict, not unknown, the rules gave")
BY_JUDGE_SHARE = _metric("verdict/by_judge_share", "share", "responses whose verdict, not unknown, the judge gave")

JUDGE_REQUESTS = _metric("judge/requests", "requests", "chat completions sent to the judge, all ranks")
JUDGE_RETRIES = _metric("judge/retries", "requests", "of these, repeated after a failure")
JUDGE_CACHE_HITS = _metric("judge/cache_hits", "responses", "cases whose verdict was in the judge's cache")
JUDGE_SHARED = _metric("judge/shared", "responses", "responses that took the verdict of an equal case in flight")
JUDGE_WITHHELD = _metric("judge/withheld", "responses", "answers not sent to the judge because they speak to it")
JUDGE_LATENCY_MEAN = _metric("judge/latency_mean", "s", "mean time from a request to its whole reply")
JUDGE_LATENCY_P95 = _metric("judge/latency_p95", "s", "95th percentile of the same")
JUDGE_UNKNOWN_DEADLINE = _metric("judge/unknown_deadline", "responses", "unknown: no verdict in time")
JUDGE_UNKNOWN_UNREACHABLE = _metric("judge/unknown_unreachable", "responses", "unknown: no connection, or a broken one")
JUDGE_UNKNOWN_REFUSED = _metric("judge/unknown_refused", "responses", "unknown: an HTTP status other than 200")
JUDGE_UNKNOWN_REPLY = _metric("judge/unknown_reply", "responses", "unknown: a reply that is not exactly one verdict")
JUDGE_UNKNOWN_VOTES = _metric("judge/unknown_votes", "responses", "unknown: no majority of the votes")
JUDGE_UNKNOWN_OTHER = _metric("judge/unknown_other", "responses", "unknown: anything else")

LOSS_POSITIVE = _metric("loss/positive", "", "term of the positive responses, positive_loss_factor included")
LOSS_NEGATIVE = _metric("loss/negative", "", "term of the negative responses, negative_loss_factor included")
LOSS_KL = _metric("loss/kl", "", "KL term, kl_coef included")
LOSS_REWARD_MODEL = _metric("loss/reward_model", "nats/sequence", "binary cross-entropy of the token reward model")
LOSS_TOTAL = _metric("loss/total", "", "the policy's loss: positive + negative + KL")

REWARD_MODEL_ACCURACY = _metric(
    "reward_model/accuracy", "share", "kept responses whose reward the reward model predicts, before its update"
)

GRAD_NORM_POLICY = _metric("grad_norm/policy", "", "global L2 norm of the policy's gradient before clipping")
GRAD_NORM_REWARD_MODEL = _metric("grad_norm/reward_model", "", "the same of the token reward model")
LR_POLICY = _metric("lr/policy", "", "learning rate of the policy's step")
LR_REWARD_MODEL = _metric("lr/reward_model", "", "learning rate of the token reward model's step")

ENTROPY = _metric("policy/entropy", "nats/token", "mean entropy of the policy at the sampling temperature, kept tokens")
KL_TO_REFERENCE = _metric(
    "policy/kl_to_reference", "nats/token", "mean k3 estimate of KL(policy || reference), kept tokens"
)

POSITIVE_WEIGHT_MEAN = _metric("weights/positive_mean", "", "mean token weight of the kept positives' tokens")
POSITIVE_WEIGHT_NONZERO = _metric("weights/positive_nonzero_share", "share", "kept positives' tokens with weight > 0")
NEGATIVE_WEIGHT_MEAN = _metric("weights/negative_mean", "", "mean token weight of the kept negatives' tokens")
NEGATIVE_WEIGHT_NONZERO = _metric("weights/negative_nonzero_share", "share", "kept negatives' tokens with weight > 0")

LENGTH_MEAN = _metric("response/length_mean", "tokens", "mean response length, stop token included")
LENGTH_MAX = _metric("response/length_max", "tokens", "longest response")
LENGTH_CORRECT = _metric("response/length_correct", "tokens", "mean length of the correct responses")
LENGTH_WRONG = _metric("response/length_wrong", "tokens", "mean length of the wrong responses")
TRUNCATED_SHARE = _metric("response/truncated_share", "share", "responses cut by a length limit")

GENERATED_PER_S = _metric(
    "throughput/generated_tokens_per_s", "tokens/s", "response tokens / time of generation, all ranks"
)
TOKENS_PER_S = _metric(
    "throughput/tokens_per_s", "tokens/s", "prompt and response tokens / (time/step - time/evaluate), all ranks"
)
TOKENS_GENERATED = _metric("rollout/generated_tokens", "tokens", "response tokens of the step, all ranks")
TOKENS_ALL = _metric("rollout/tokens", "tokens", "prompt and response tokens of the step, all ranks")

BALANCE = _metric("parallel/balance", "", "work of the most loaded data-parallel rank over the mean")
MICROBATCH_BALANCE = _metric(
    "parallel/microbatch_balance", "", "work of the heaviest micro-batch over the mean of those that hold something"
)
MICROBATCHES = _metric("parallel/microbatches", "micro-batches", "micro-batches of a data-parallel rank")
IDLE_MICROBATCHES = _metric("parallel/idle_microbatches", "micro-batches", "empty ones, over all data-parallel ranks")
PADDING_SHARE = _metric("parallel/padding_share", "share", "padding tokens of the micro-batches over all their tokens")
BUBBLE_SHARE = _metric(
    "parallel/bubble_share", "share", "of a pass that pipeline stages wait for each other, computed from the work"
)

LOGP_DIFF_MEAN = _metric("rollout/logp_diff_mean", "nats", "mean |engine logp - trainer logp| over response tokens")
LOGP_DIFF_P999 = _metric("rollout/logp_diff_p999", "nats", "99.9th percentile of the same")
LOGP_DIFF_MAX = _metric("rollout/logp_diff_max", "nats", "maximum of the same")
KEPT_MASS = _metric("rollout/kept_mass", "share", "mean probability mass that top-p and top-k kept")

MEMORY_RELEASED = _metric(
    "memory/released_bytes", "bytes", "device memory that the sleeping engine gave back, measured on rank 0's device"
)

PUBLISH_RECEIVED = _metric(
    "publish/received_bytes", "bytes", "weights that the rank which receives most gets from other ranks"
)
PUBLISH_DIGEST_SHARE = _metric("publish/digest_share", "share", "of time/publish spent on comparing digests")
PUBLISH_DRIFTED = _metric("publish/drifted_tensors", "tensors", "whose tensor-parallel copies in the trainer differ")

EVAL_PASS_AT_1 = _metric("eval/pass_at_1", "share", "held-out pass@1: mean over problems of their sampled pass rate")
EVAL_PASS_AT_1_LOW = _metric("eval/pass_at_1_low", "share", "lower end of its 95 % interval, clustered by problem")
EVAL_PASS_AT_1_HIGH = _metric("eval/pass_at_1_high", "share", "upper end of its 95 % interval, clustered by problem")
EVAL_GREEDY = _metric("eval/greedy", "share", "held-out problems solved at temperature 0")
EVAL_UNKNOWN_SHARE = _metric("eval/unknown_share", "share", "held-out responses without a verdict; the rates omit them")

TIME = "time/"
TIME_STEP = _metric("time/step", "s", "wall-clock time of the whole step")
TIME_OTHER = _metric("time/other", "s", "time/step minus its phases: what no timer saw")
_metric("time/sleep", "s", "servers stop, drop their caches and give their device memory back")
_metric("time/sleep/release", "s", "of that: pause, flush and release, until the last server has answered")
_metric("time/sleep/memory", "s", "of that: until the device memory was measured to be free")
_metric("time/update/policy/load", "s", "policy and optimizer state from host memory to the device")
_metric("time/update/reference/load", "s", "the reference from host memory to the device")
_metric("time/update/reference/offload", "s", "the reference back to host memory")
_metric("time/update/reward_model/load", "s", "the reward model and its optimizer state to the device")
_metric("time/update/reward_model/offload", "s", "the reward model and its optimizer state back to host memory")
_metric("time/publish", "s", "from the updated policy to engines that may generate with it")
_metric("time/publish/offload", "s", "what publishing does not need, and afterwards the policy, to host memory")
_metric("time/publish/wake_weights", "s", "servers take the memory of their weights")
_metric("time/publish/plan", "s", "plan of the transfer, made once a run")
_metric("time/publish/transfer", "s", "weights from the actors' ranks into the engines' layout")
_metric("time/publish/digest", "s", "digests of trainer and engine weights compared")
_metric("time/publish/load", "s", "engines take the staged weights, until the last one has acknowledged them")
_metric("time/publish/wake_cache", "s", "servers take the memory of their KV caches and CUDA graphs")
_PHASE = _metric("time/<phase>", "s", "wall-clock time in a phase on rank 0; time/<a>/<b> is a part of time/<a>")


def phase_metric(phase: str) -> str:
    """``"generate"`` -> ``"time/generate"``."""
    return TIME + phase


def describe(name: str) -> Metric:
    """Return a metric's documentation; any ``time/...`` is a phase. Raises ``KeyError`` for an undocumented name."""
    if name not in REGISTRY and name.startswith(TIME):
        phase = REGISTRY[_PHASE]
        return Metric(name, phase.unit, phase.meaning)
    return REGISTRY[name]
