"""OREAL between the rollouts and the losses: rewards, advantages, selection, normalisers, schedules and seeds.

Pure functions over NumPy arrays and plain data, so that every rank computes the same answer from the same verdicts
without communication. Headings in quotes are those of ``algorithm.md``. A step has G groups (prompts) of K responses.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.verifier.verdict import Verdict

RewardShaping = Literal["rloo", "grpo"]
Filter = Literal["pair", "groups", "none"]

REWARD = {Verdict.CORRECT: 1, Verdict.WRONG: -1, Verdict.UNKNOWN: 0}
"""R of a verdict ("One step" 2). 0 means "not there": the functions below exclude such members from the pass rate, the
baseline, the pairs and whatever is learned."""
GRPO_EPSILON = 1e-8


# Seeds


class Stream(enum.IntEnum):
    """What random numbers are drawn for: the first word of every seed, so that no two uses share a sequence."""

    PAIR = 1
    REQUEST = 2
    PROMPT_ORDER = 3
    SUPERVISED = 4


_MASK64 = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """Return the output of SplitMix64 at ``state`` (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def mix_seed(*words: int) -> int:
    """Hash a tuple of integers (each taken modulo 2^64) to 64 well-mixed bits.

    A chain of SplitMix64 steps: ``h <- splitmix64(h xor word)`` from h = 0. Exact integer arithmetic, hence the same in
    every process, on every machine, in every version of Python and NumPy. Tuples that differ in the last word alone
    never collide.
    """
    state = 0
    for word in words:
        state = _splitmix64(state ^ (word & _MASK64))
    return state


def request_seed(run_seed: int, step: int, group: int, sample: int) -> int:
    """Return the seed, in [0, 2^63), of one response of a step.

    It depends on what is sampled and not on where or when: whichever rank or engine draws a response, in whatever
    batch, before or after a resume, it draws with the same random numbers (another batch shape may still round a logit
    differently, and rarely that flips a token). 63 bits because engines keep seeds in a signed 64-bit integer.
    """
    return mix_seed(Stream.REQUEST, run_seed, step, group, sample) >> 1


def _uniform_index(n: int, *words: int) -> int:
    """Draw from {0, ..., n − 1}: the high word of hash · n. Its bias, below n / 2^64, cannot be observed."""
    return (mix_seed(*words) * n) >> 64


# Pass rates, advantages


def pass_rates(rewards: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return p = correct / known for each group, float64 [G]; NaN where nothing is known ("One step" 3)."""
    correct = (rewards == 1).sum(axis=1)
    known = (rewards != 0).sum(axis=1)
    rates = np.full(len(rewards), np.nan)
    np.divide(correct, known, out=rates, where=known > 0)
    return rates


def advantages(rewards: NDArray[np.int8], shaping: RewardShaping = "rloo") -> NDArray[np.float64]:
    """Return A, float64 [G, K], over the known members of each group, before any filtering ("One step" 3).

    ``rloo``: A_k = R_k − mean of the others' R. ``grpo``: A_k = (R_k − mean) / (std + 1e-8), std with Bessel's
    correction. A = 0 for unknown members, and for all members of a group with fewer than two known ones, which have no
    baseline.
    """
    reward = rewards.astype(np.float64)
    known = rewards != 0
    count = known.sum(axis=1, keepdims=True)
    total = reward.sum(axis=1, keepdims=True)  # unknown members add 0
    others = np.maximum(count - 1, 1)
    if shaping == "rloo":
        advantage = reward - (total - reward) / others
    else:
        deviation = np.where(known, reward - total / np.maximum(count, 1), 0.0)
        variance = (deviation**2).sum(axis=1, keepdims=True) / others
        advantage = deviation / (np.sqrt(variance) + GRPO_EPSILON)
    return np.where(known & (count >= 2), advantage, 0.0)


# Selection


@dataclass(frozen=True, slots=True)
class Kept:
    """A response that is learned from. ``reward`` is +1 or −1; ``pass_rate`` is its whole group's p."""

    group: int
    sample: int
    reward: int
    advantage: float
    pass_rate: float


def select(
    rewards: NDArray[np.int8],
    *,
    filter: Filter = "pair",
    shaping: RewardShaping = "rloo",
    run_seed: int,
    step: int,
) -> list[Kept]:
    """Choose what is learned from, ordered by (group, sample) ("One step" 3 and 4).

    A group with fewer than two known members is dropped, whatever the filter. ``pair``: of each group with 0 < p < 1
    one correct and one wrong response, uniformly at random. ``groups``: all known members of those groups. ``none``:
    all known members of every group.

    The random draws come from a counter-based generator: the key is (run_seed, step), the counter (group, sign). Every
    rank therefore draws the same pairs, in any data-parallel layout, and one group's draw does not depend on how
    many others there are. An empty list is a valid answer: the step makes no update.
    """
    rates = pass_rates(rewards)
    advantage = advantages(rewards, shaping)
    kept: list[Kept] = []
    for group, row in enumerate(rewards):
        members = np.flatnonzero(row)
        rate = float(rates[group])
        if len(members) < 2 or (filter != "none" and not 0.0 < rate < 1.0):
            continue
        if filter == "pair":
            members = _draw_pair(row, run_seed, step, group)
        kept += [Kept(group, int(k), int(row[k]), float(advantage[group, k]), rate) for k in members]
    return kept


def _draw_pair(row: NDArray[np.int8], run_seed: int, step: int, group: int) -> NDArray[np.int64]:
    """Return the sorted sample indices [2] of one correct and one wrong member; the row has at least one of each."""
    drawn = []
    for reward in (1, -1):
        candidates = np.flatnonzero(row == reward)
        drawn.append(candidates[_uniform_index(len(candidates), Stream.PAIR, run_seed, step, group, reward)])
    return np.sort(np.array(drawn))


# Normalisers


def safe_inverse(count: int) -> float:
    """Return 1 / count, and 0 for an empty set: the term it would normalise has no summands."""
    return 1.0 / count if count else 0.0


@dataclass(frozen=True, slots=True)
class Normalisers:
    """Counts over all kept sequences of the global batch, known before the first forward ("Losses").

    ``positive_tokens``, ``negative_tokens``, ``tokens``: N⁺, N⁻ and N, in response tokens; ``sequences``: S.
    """

    positive_tokens: int
    negative_tokens: int
    tokens: int
    sequences: int

    @property
    def inv_positive(self) -> float:
        """1 / N⁺, or 0 without positives."""
        return safe_inverse(self.positive_tokens)

    @property
    def inv_negative(self) -> float:
        """1 / N⁻, or 0 without negatives."""
        return safe_inverse(self.negative_tokens)

    @property
    def inv_tokens(self) -> float:
        """1 / N, or 0 when nothing is kept."""
        return safe_inverse(self.tokens)

    @property
    def inv_sequences(self) -> float:
        """1 / S, or 0 when nothing is kept."""
        return safe_inverse(self.sequences)


def count_normalisers(rewards: Sequence[int], response_lengths: Sequence[int]) -> Normalisers:
    """Count N⁺, N⁻, N and S from the kept sequences' rewards (+1, −1) and response lengths in tokens."""
    pairs = list(zip(rewards, response_lengths, strict=True))
    positive = sum(length for reward, length in pairs if reward > 0)
    negative = sum(length for reward, length in pairs if reward < 0)
    return Normalisers(positive, negative, positive + negative, len(pairs))


# Learning rate


def learning_rate(
    step: int, *, base: float, minimum: float, warmup_steps: int, total_steps: int, start: int = 0
) -> float:
    """Return the learning rate of 0-based ``step`` ("Optimisation").

    With i = step − start and n = total_steps − start: ``base · (i + 1) / W`` for i < W = ``warmup_steps``, then
    ``minimum + (base − minimum) / 2 · (1 + cos(π (i − W) / (n − W)))``, and ``minimum`` from i = n on. ``start`` is
    where the warm-up begins: 0, or ``actor_freeze_steps`` for the policy under ``warmup_after_freeze: true``; before
    it the rate is 0. W = 0 begins at ``base``; with W >= n the run ends within the warm-up.
    """
    i, n = step - start, total_steps - start
    if i < 0:
        return 0.0
    if i < warmup_steps:
        return base * (i + 1) / warmup_steps
    if i >= n:
        return minimum
    return minimum + (base - minimum) / 2 * (1 + math.cos(math.pi * (i - warmup_steps) / (n - warmup_steps)))


# Statistics


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """What one step sampled and kept. Shares are fractions of all samples; None: undefined in this step."""

    unknown_share: float | None
    truncated_share: float | None
    pass_rate: float | None  # correct / known, over all samples
    groups_all_correct: int
    groups_all_wrong: int
    groups_few_known: int  # fewer than two known members: dropped, and in neither of the two counts above
    kept_groups: int
    kept_sequences: int
    response_length: float | None  # mean, in tokens; likewise the next three
    response_length_max: int | None
    response_length_correct: float | None
    response_length_wrong: float | None


def step_statistics(
    rewards: NDArray[np.int8],
    response_lengths: NDArray[np.integer],
    stopped: NDArray[np.bool_],
    kept: Sequence[Kept],
) -> StepStatistics:
    """Summarise a step. ``rewards``, ``response_lengths`` (tokens), ``stopped`` (ended with the stop word): [G, K]."""
    known = rewards != 0
    rates = pass_rates(rewards)
    enough = known.sum(axis=1) >= 2
    return StepStatistics(
        unknown_share=_mean(~known),
        truncated_share=_mean(~stopped),
        pass_rate=_mean(rewards[known] == 1),
        groups_all_correct=int(np.sum(enough & (rates == 1))),
        groups_all_wrong=int(np.sum(enough & (rates == 0))),
        groups_few_known=int(np.sum(~enough)),
        kept_groups=len({item.group for item in kept}),
        kept_sequences=len(kept),
        response_length=_mean(response_lengths),
        response_length_max=int(response_lengths.max()) if response_lengths.size else None,
        response_length_correct=_mean(response_lengths[rewards == 1]),
        response_length_wrong=_mean(response_lengths[rewards == -1]),
    )


def _mean(values: NDArray[Any]) -> float | None:
    return float(np.mean(values)) if values.size else None
