from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oreal.config import DataConfig
from megatron_oreal.data.sampler import PromptOrder, fingerprint, resample_by_pass_rate
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError

BUCKETS = DataConfig(train="x").pass_rate_buckets


def prompts(n, pass_rate=None):
    return [Prompt(f"p{i}", f"question {i}", str(i), pass_rate) for i in range(n)]


def test_default_buckets_repeat_and_drop_as_published():
    rates = [0.0, 0.19, 0.2, 0.59, 0.6, 0.79, 0.8, 1.0, None]
    given_prompts = [Prompt(f"p{i}", "q", "a", rate) for i, rate in enumerate(rates)]
    copies = Counter(p.id for p in resample_by_pass_rate(given_prompts, BUCKETS))
    assert [copies[f"p{i}"] for i in range(len(rates))] == [6, 6, 4, 4, 2, 2, 0, 0, 1]


def test_nothing_left_names_the_buckets():
    with pytest.raises(UserError, match=r"none of the 3 prompts .*\[0\.0, 0\.2\) x6, \[0\.2, 0\.6\) x4"):
        resample_by_pass_rate(prompts(3, 0.9), BUCKETS)


@pytest.mark.parametrize("bucket", [(0.5, 0.5, 1), (0.6, 0.2, 1), (0.0, 0.5, -1)])
def test_a_malformed_bucket_is_refused(bucket):
    with pytest.raises(UserError, match="pass_rate_buckets"):
        resample_by_pass_rate(prompts(1), [bucket])


@settings(deadline=None)
@given(n=st.integers(1, 30), sizes=st.lists(st.integers(0, 70), min_size=1, max_size=8), seed=st.integers(0, 2**64))
def test_every_epoch_is_a_permutation_whatever_the_batch_sizes(n, sizes, seed):
    order = PromptOrder(prompts(n), seed)
    drawn = [p.id for size in sizes for p in order.take(size)]
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == sorted(f"p{i}" for i in range(n))
    assert (order.epoch, order.position) == divmod(len(drawn), n)


@settings(deadline=None)
@given(n=st.integers(1, 20), sizes=st.lists(st.integers(0, 50), min_size=2, max_size=6), cut=st.integers(0, 5))
def test_a_restored_order_continues_exactly(n, sizes, cut):
    cut = min(cut, len(sizes))
    whole = PromptOrder(prompts(n), 5)
    before = [whole.take(size) for size in sizes[:cut]]
    state = json.loads(json.dumps(whole.state_dict()))  # a checkpoint holds it as JSON
    after = [whole.take(size) for size in sizes[cut:]]
    restored = PromptOrder(prompts(n), 5)
    restored.load_state_dict(state)
    assert [restored.take(size) for size in sizes[cut:]] == after
    assert [len(batch) for batch in before] == sizes[:cut]


def test_order_changes_with_the_epoch_and_with_the_seed():
    order = PromptOrder(prompts(50), 0)
    first, second = order.take(50), order.take(50)
    other = PromptOrder(prompts(50), 1).take(50)
    assert first != second
    assert first != other
    assert first != prompts(50)


def test_order_has_no_memory_of_the_place_in_the_file():
    hits = sum(PromptOrder(prompts(10), seed).take(1)[0].id == "p0" for seed in range(2000))
    assert abs(hits - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


def test_repeated_prompts_are_shuffled_apart_and_all_drawn():
    order = PromptOrder(resample_by_pass_rate(prompts(10, 0.1), BUCKETS), 0)
    drawn = [p.id for p in order.take(len(order))]
    assert Counter(drawn) == {f"p{i}": 6 for i in range(10)}
    assert drawn != sorted(drawn)


def test_state_of_other_data_or_another_seed_is_refused():
    state = PromptOrder(prompts(5), 0).state_dict()
    with pytest.raises(UserError, match="5 prompts after resampling, there are 6 now"):
        PromptOrder(prompts(6), 0).load_state_dict(state)
    with pytest.raises(UserError, match="content or order differs"):
        PromptOrder(prompts(5)[::-1], 0).load_state_dict(state)
    with pytest.raises(UserError, match="seed=1: the checkpoint was made with seed=0"):
        PromptOrder(prompts(5), 1).load_state_dict(state)


def test_fingerprint_sees_every_field():
    base = Prompt("a", "b", "c", 0.5)
    others = [Prompt("x", "b", "c", 0.5), Prompt("a", "x", "c", 0.5), Prompt("a", "b", "x", 0.5), Prompt("a", "b", "c")]
    shifted = Prompt("ab", "", "c", 0.5)
    assert len({fingerprint([p]) for p in [base, *others, shifted]}) == 6
