"""Advantages, selection, normalisers, schedule and seeds against algorithm.md, by hand-worked values and properties."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_oreal import algorithm
from megatron_oreal.algorithm import (
    Kept,
    advantages,
    count_normalisers,
    learning_rate,
    mix_seed,
    pass_rates,
    request_seed,
    select,
    step_statistics,
)

MIXED = np.array([[1, -1, -1, 0], [1, 1, 1, 1], [-1, -1, 0, 0], [1, 0, 0, 0], [-1, 1, 1, -1]], dtype=np.int8)

reward_matrices = hnp.arrays(
    np.int8, st.tuples(st.integers(0, 6), st.integers(2, 8)), elements=st.sampled_from([-1, 0, 1])
)


def test_pass_rate_counts_known_members_only():
    assert pass_rates(MIXED).tolist() == [1 / 3, 1.0, 0.0, 1.0, 0.5]


def test_nothing_divides_by_zero_when_groups_have_no_known_members():
    rewards = np.array([[0, 0, 0], [1, 0, 0]], dtype=np.int8)
    with np.errstate(all="raise"):
        assert np.isnan(pass_rates(rewards)).tolist() == [True, False]
        assert not advantages(rewards, "rloo").any()
        assert not advantages(rewards, "grpo").any()
        assert select(rewards, filter="none", run_seed=0, step=0) == []
        assert select(np.zeros((0, 0), dtype=np.int8), run_seed=0, step=0) == []
        step_statistics(rewards, np.ones((2, 3), dtype=int), np.ones((2, 3), dtype=bool), [])


def test_rloo_by_hand():
    got = advantages(MIXED[:1], "rloo")[0]
    # known: 1, -1, -1. Others' means: -1, 0, 0.
    assert got.tolist() == [2.0, -1.0, -1.0, 0.0]


def test_grpo_by_hand():
    got = advantages(MIXED[:1], "grpo")[0]
    mean, std = -1 / 3, math.sqrt(((4 / 3) ** 2 + 2 * (2 / 3) ** 2) / 2)
    expected = [(1 - mean) / (std + 1e-8), (-1 - mean) / (std + 1e-8), (-1 - mean) / (std + 1e-8), 0.0]
    np.testing.assert_allclose(got, expected, rtol=1e-15)


@pytest.mark.parametrize("shaping", ["rloo", "grpo"])
def test_fewer_than_two_known_have_no_advantage_and_leave_under_every_filter(shaping):
    rewards = np.array([[1, 0, 0], [0, 0, 0], [0, -1, 0]], dtype=np.int8)
    assert not advantages(rewards, shaping).any()
    for kind in ("pair", "groups", "none"):
        assert select(rewards, filter=kind, shaping=shaping, run_seed=0, step=0) == []


@pytest.mark.parametrize("shaping", ["rloo", "grpo"])
@settings(deadline=None)
@given(rewards=reward_matrices)
def test_advantages_are_finite_sum_to_zero_and_ignore_unknown_members(shaping, rewards):
    got = advantages(rewards, shaping)
    assert np.isfinite(got).all()
    assert not got[rewards == 0].any()
    np.testing.assert_allclose(got.sum(axis=1), 0.0, atol=1e-9)
    for row, expected in zip(rewards, got, strict=True):
        known = row[row != 0]
        if len(known) >= 2:  # the same as a group that never had the unknown members
            np.testing.assert_allclose(advantages(known[None], shaping)[0], expected[row != 0], atol=1e-12)


def test_rloo_equals_twice_the_rate_of_the_other_outcome_scaled_by_k_over_k_minus_1():
    rewards = np.array([[1, 1, -1, -1, -1, -1, -1, -1]], dtype=np.int8)
    got = advantages(rewards, "rloo")[0]
    k, p = 8, 0.25
    np.testing.assert_allclose(got[:2], 2 * (1 - p) * k / (k - 1))
    np.testing.assert_allclose(got[2:], -2 * p * k / (k - 1))


@settings(deadline=None)
@given(rewards=reward_matrices, seed=st.integers(0, 2**70), step=st.integers(0, 10**6))
def test_pair_keeps_one_correct_and_one_wrong_of_each_mixed_group(rewards, seed, step):
    kept = select(rewards, filter="pair", run_seed=seed, step=step)
    rates, advantage = pass_rates(rewards), advantages(rewards)
    mixed = [g for g in range(len(rewards)) if (rewards[g] == 1).any() and (rewards[g] == -1).any()]
    assert Counter(item.group for item in kept) == dict.fromkeys(mixed, 2)
    for group in mixed:
        assert sorted(item.reward for item in kept if item.group == group) == [-1, 1]
    for item in kept:
        assert item.reward == rewards[item.group, item.sample]
        assert item.advantage == advantage[item.group, item.sample]
        assert item.pass_rate == rates[item.group]
    assert kept == sorted(kept, key=lambda item: (item.group, item.sample))


def test_groups_keeps_the_known_members_of_mixed_groups():
    kept = select(MIXED, filter="groups", run_seed=0, step=0)
    assert [(item.group, item.sample) for item in kept] == [(0, 0), (0, 1), (0, 2), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_none_keeps_every_known_member_pass_rates_zero_and_one_included():
    kept = select(MIXED, filter="none", run_seed=0, step=0)
    assert {item.group for item in kept} == {0, 1, 2, 4}  # group 3 has one known member
    assert [item.sample for item in kept if item.group == 1] == [0, 1, 2, 3]
    assert [item.sample for item in kept if item.group == 2] == [0, 1]
    assert all(item.advantage == 0.0 for item in kept if item.group in (1, 2))


def test_pair_draws_are_uniform_over_members_and_independent_of_each_other():
    rewards = np.array([[1, -1, 1, -1, 1, -1, 0, -1]], dtype=np.int8)  # 3 correct, 4 wrong
    steps = 12_000
    pairs: Counter[tuple[int, ...]] = Counter()
    for step in range(steps):
        kept = select(rewards, filter="pair", run_seed=7, step=step)
        pairs[tuple(item.sample for item in sorted(kept, key=lambda item: -item.reward))] += 1
    assert len(pairs) == 12
    chi_squared = sum((count - steps / 12) ** 2 / (steps / 12) for count in pairs.values())
    assert chi_squared < 31.3  # 99.9 % quantile at 11 degrees of freedom


def test_pair_of_a_group_does_not_depend_on_the_other_groups():
    rng = np.random.default_rng(0)
    rewards = rng.choice(np.array([-1, 1], dtype=np.int8), size=(20, 16))
    whole = select(rewards, filter="pair", run_seed=3, step=5)
    others_changed = rewards.copy()
    others_changed[:10] = 1
    assert [k for k in whole if k.group >= 10] == select(others_changed, filter="pair", run_seed=3, step=5)


def test_pair_differs_between_steps_and_between_run_seeds():
    rewards = np.tile(np.array([1, -1], dtype=np.int8), (32, 8))
    base = select(rewards, run_seed=0, step=0)
    assert base != select(rewards, run_seed=0, step=1)
    assert base != select(rewards, run_seed=1, step=0)


def test_pair_is_the_same_in_every_process_whatever_its_hash_seed():
    program = (
        "import numpy as np, json\n"
        "from megatron_oreal.algorithm import select, request_seed\n"
        "r = np.tile(np.array([1, -1, -1], dtype=np.int8), (16, 4))\n"
        "print(json.dumps([[k.group, k.sample] for k in select(r, run_seed=11, step=3)] + [request_seed(1, 2, 3, 4)]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "12345")
    ]
    assert outputs[0] == outputs[1]
    rewards = np.tile(np.array([1, -1, -1], dtype=np.int8), (16, 4))
    here = [[k.group, k.sample] for k in select(rewards, run_seed=11, step=3)]
    assert json.loads(outputs[0]) == [*here, request_seed(1, 2, 3, 4)]


def test_splitmix64_matches_its_published_sequence():
    gamma = 0x9E3779B97F4A7C15
    states = [(i * gamma) % 2**64 for i in range(3)]
    outputs = [algorithm._splitmix64(state) for state in states]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # seed 0


def test_request_seeds_are_63_bit_and_distinct_over_a_run():
    seeds = [request_seed(0, step, g, k) for step in range(20) for g in range(16) for k in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[(seed >> bit) & 1 for bit in range(63)] for seed in seeds]).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / math.sqrt(len(seeds))


def test_mixed_seeds_depend_on_the_order_and_number_of_words():
    assert len({mix_seed(), mix_seed(0), mix_seed(0, 0), mix_seed(1, 2), mix_seed(2, 1), mix_seed(1, 2, 0)}) == 6


def test_normalisers_count_response_tokens_by_sign():
    got = count_normalisers([1, -1, 1], [10, 4, 6])
    assert (got.positive_tokens, got.negative_tokens, got.tokens, got.sequences) == (16, 4, 20, 3)
    assert (got.inv_positive, got.inv_negative, got.inv_tokens, got.inv_sequences) == (1 / 16, 1 / 4, 1 / 20, 1 / 3)


@pytest.mark.parametrize(
    ("rewards", "lengths", "inverses"),
    [
        ([], [], (0.0, 0.0, 0.0, 0.0)),
        ([1, 1], [3, 5], (1 / 8, 0.0, 1 / 8, 1 / 2)),
        ([-1], [4], (0.0, 1 / 4, 1 / 4, 1.0)),
    ],
    ids=["nothing kept", "only positives", "only negatives"],
)
def test_normalisers_of_an_empty_set_are_zero(rewards, lengths, inverses):
    got = count_normalisers(rewards, lengths)
    assert (got.inv_positive, got.inv_negative, got.inv_tokens, got.inv_sequences) == inverses


SCHEDULE = {"base": 5e-7, "minimum": 1e-7, "warmup_steps": 10, "total_steps": 90}


def test_learning_rate_of_the_published_run():
    rates = [learning_rate(i, **SCHEDULE) for i in range(90)]
    np.testing.assert_allclose(rates[:10], [5e-7 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == 5e-7  # the policy's first update after a freeze of 10 steps is at full rate
    assert rates[50] == pytest.approx(3e-7)  # half of the cosine
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 1e-7 < rates[89] < 1.01e-7
    assert learning_rate(90, **SCHEDULE) == 1e-7
    assert learning_rate(1000, **SCHEDULE) == 1e-7


def test_learning_rate_that_starts_after_the_freeze_is_the_schedule_of_the_remaining_steps():
    moved = [learning_rate(i, **SCHEDULE, start=10) for i in range(91)]
    assert moved[:10] == [0.0] * 10
    remaining = SCHEDULE | {"total_steps": 80}
    assert moved[10:] == [learning_rate(i, **remaining) for i in range(81)]


def test_learning_rate_without_warmup_starts_at_base():
    assert learning_rate(0, base=1.0, minimum=0.1, warmup_steps=0, total_steps=4) == 1.0
    assert learning_rate(2, base=1.0, minimum=0.0, warmup_steps=0, total_steps=4) == pytest.approx(0.5)


@pytest.mark.parametrize("total", [1, 3, 5])
def test_learning_rate_of_a_run_within_its_warmup_is_linear(total):
    rates = [learning_rate(i, base=1.0, minimum=0.1, warmup_steps=5, total_steps=total) for i in range(total)]
    assert rates == [(i + 1) / 5 for i in range(total)]


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 200),
    warmup=st.integers(0, 50),
    total=st.integers(1, 150),
    start=st.integers(0, 160),
)
def test_learning_rate_stays_between_zero_and_base_for_any_setting(step, warmup, total, start):
    rate = learning_rate(step, base=1.0, minimum=0.2, warmup_steps=warmup, total_steps=total, start=start)
    assert 0.0 <= rate <= 1.0


def test_statistics_of_a_step_by_hand():
    lengths = np.arange(1, 21).reshape(5, 4)
    stopped = np.ones((5, 4), dtype=bool)
    stopped[2, :2] = False
    kept = select(MIXED, filter="groups", run_seed=0, step=0)
    got = asdict(step_statistics(MIXED, lengths, stopped, kept))
    expected = {
        "unknown_share": 6 / 20,
        "truncated_share": 2 / 20,
        "pass_rate": 8 / 14,
        "groups_all_correct": 1,
        "groups_all_wrong": 1,
        "groups_few_known": 1,
        "kept_groups": 2,
        "kept_sequences": 7,
        "response_length": 10.5,
        "response_length_max": 20,
        "response_length_correct": (1 + 5 + 6 + 7 + 8 + 13 + 18 + 19) / 8,
        "response_length_wrong": (2 + 3 + 9 + 10 + 17 + 20) / 6,
    }
    assert got == pytest.approx(expected)


def test_statistics_leave_out_what_a_step_does_not_define():
    unknown = np.zeros((1, 2), dtype=np.int8)
    got = step_statistics(unknown, np.ones((1, 2), dtype=int), np.ones((1, 2), dtype=bool), [])
    assert got.unknown_share == 1.0
    assert got.groups_few_known == 1
    assert got.pass_rate is got.response_length_correct is got.response_length_wrong is None
    nothing = np.zeros((0, 0), dtype=np.int8)
    empty = asdict(step_statistics(nothing, nothing, nothing.astype(bool), []))
    assert empty["unknown_share"] is None
    assert all(value is None or value == 0 for value in empty.values())


def test_kept_sequences_are_hashable_plain_values():
    kept = select(MIXED, filter="pair", run_seed=0, step=0)
    assert len(set(kept)) == len(kept)
    assert all(type(v) in (int, float) for k in kept for v in (k.group, k.sample, k.reward, k.advantage, k.pass_rate))
    assert isinstance(kept[0], Kept)
