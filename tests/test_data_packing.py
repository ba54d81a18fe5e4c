from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oreal.config import ParallelConfig
from megatron_oreal.data.packing import PackItem, WorkModel, pack, plan_for, plan_microbatches
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import model_spec_from_config

WORK = WorkModel(matmul_params=1000, attention_width=8)
MAX = 64

untimed = settings(deadline=None)  # a busy machine is no failure
some_plans = given(
    lengths=st.lists(st.integers(2, 60), max_size=40),
    dp_size=st.integers(1, 6),
    multiple=st.integers(1, 4),
    pad=st.sampled_from([1, 2, 4]),
    stages=st.integers(1, 4),
)


def plans(test):
    return untimed(some_plans(test))


def plan(lengths, dp_size, multiple, pad, stages=1):
    return plan_microbatches(
        lengths,
        dp_size=dp_size,
        max_tokens=MAX,
        work=WORK,
        num_microbatches_multiple_of=multiple,
        pad_to_multiple_of=pad,
        pipeline_stages=stages,
    )


@plans
def test_every_index_appears_exactly_once(lengths, dp_size, multiple, pad, stages):
    got = plan(lengths, dp_size, multiple, pad, stages)
    assert sorted(i for rank in got.ranks for batch in rank for i in batch) == list(range(len(lengths)))


@plans
def test_no_microbatch_exceeds_max_tokens_with_its_padding(lengths, dp_size, multiple, pad, stages):
    got = plan(lengths, dp_size, multiple, pad, stages)
    for rank, tokens in zip(got.ranks, got.tokens, strict=True):
        for batch, padded in zip(rank, tokens, strict=True):
            items = [PackItem([1] * (lengths[i] - 1), [1]) for i in batch]
            assert pack(items, pad_to_multiple_of=pad).tokens.numel() == padded <= MAX


@plans
def test_all_ranks_have_the_same_number_of_microbatches_a_multiple(lengths, dp_size, multiple, pad, stages):
    got = plan(lengths, dp_size, multiple, pad, stages)
    assert len(got.ranks) == dp_size
    assert {len(rank) for rank in got.ranks} == {got.num_microbatches}
    assert got.num_microbatches % multiple == 0
    assert got.num_microbatches >= multiple


@plans
def test_ranks_are_balanced_by_work(lengths, dp_size, multiple, pad, stages):
    got = plan(lengths, dp_size, multiple, pad, stages)
    loads = [sum(WORK(lengths[i]) for batch in rank for i in batch) for rank in got.ranks]
    mean = sum(loads) / dp_size
    assert max(loads) <= mean + max((WORK(n) for n in lengths), default=0) * (1 - 1 / dp_size) + 1e-6
    assert got.balance == (pytest.approx(max(loads) / mean) if mean else 1.0)


@plans
def test_the_same_input_gives_the_same_plan(lengths, dp_size, multiple, pad, stages):
    assert plan(lengths, dp_size, multiple, pad, stages) == plan(list(lengths), dp_size, multiple, pad, stages)


@plans
def test_the_shares_are_those_of_the_plan(lengths, dp_size, multiple, pad, stages):
    got = plan(lengths, dp_size, multiple, pad, stages)
    held = [[batch for batch in rank if batch] for rank in got.ranks]
    assert got.idle_microbatches == dp_size * got.num_microbatches - sum(map(len, held))
    assert got.padding_share == pytest.approx(1 - sum(lengths) / sum(map(sum, got.tokens)))
    loads = [[sum(WORK(lengths[i]) for i in batch) for batch in rank] for rank in got.ranks]
    waits, times = zip(*((max(r) * (stages - 1), sum(r) + max(r) * (stages - 1)) for r in loads), strict=True)
    slowest = max(times)
    assert got.bubble_share in [
        pytest.approx(w / t if t else 0.0) for w, t in zip(waits, times, strict=True) if t == slowest
    ]


def test_nothing_to_do_is_one_empty_microbatch_a_rank():
    got = plan([], dp_size=3, multiple=1, pad=1)
    assert got.ranks == [[[]], [[]], [[]]]
    assert (got.balance, got.microbatch_balance) == (1.0, 1.0)
    assert plan([], dp_size=1, multiple=4, pad=1).ranks == [[[], [], [], []]]


def test_fewer_sequences_than_ranks_leave_idle_ranks_an_empty_microbatch():
    got = plan([10, 20], dp_size=4, multiple=1, pad=1)
    assert sorted(got.ranks) == [[[]], [[]], [[0]], [[1]]]
    assert got.balance == pytest.approx(4 * WORK(20) / (WORK(10) + WORK(20)))


def test_extra_microbatches_that_a_pipeline_needs_share_the_work():
    got = plan([15] * 8, dp_size=1, multiple=4, pad=1)  # 4 of 15 fit into 64: two would do
    assert [len(batch) for batch in got.ranks[0]] == [2, 2, 2, 2]
    assert got.microbatch_balance == 1.0


def test_a_tight_fit_that_balancing_would_break_is_kept():
    # By work alone 33 and 31 go to different micro-batches and the rest no longer fits; first-fit-decreasing needs 2.
    lengths = [33, 32, 31, 16, 8, 8]
    got = plan(lengths, dp_size=1, multiple=1, pad=1)
    assert got.num_microbatches == 2
    assert [sum(lengths[i] for i in batch) for batch in got.ranks[0]] == [64, 64]


def test_exchanges_balance_ranks_that_longest_first_leaves_apart():
    # Longest-first gives 8 5 4 and 7 6: 17 and 13. The 8 for the 6 makes 15 of both.
    flat = WorkModel(matmul_params=1, attention_width=0)
    got = plan_microbatches([8, 7, 6, 5, 4], dp_size=2, max_tokens=MAX, work=flat)
    assert got.balance == 1.0


def test_a_pipeline_gets_lighter_micro_batches_when_their_bubble_is_shorter_than_their_passes():
    work = WorkModel(matmul_params=1, attention_width=0)
    lengths = [4096] * 16
    for stages, count in ((1, 4), (4, 16)):
        got = plan_microbatches(lengths, dp_size=1, max_tokens=16384, work=work, pipeline_stages=stages)
        assert got.num_microbatches == count
    assert got.bubble_share == pytest.approx(3 / (3 + 16))
    long = [16384] * 4  # nothing can be lighter than the longest sequence
    assert plan_microbatches(long, dp_size=1, max_tokens=16384, work=work, pipeline_stages=4).num_microbatches == 4


def test_interleaved_stages_and_user_buffers_get_micro_batches_of_one_length():
    lengths = [900, 800, 700, 600, 500, 400]
    sizes = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "max_tokens_per_microbatch": 1030}
    pipeline = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    interleaved = plan_for(ParallelConfig(**sizes, **pipeline), lengths, dp_size=2, work=WORK)
    assert interleaved.num_microbatches % 2 == 0
    for members, tokens in zip(interleaved.ranks, interleaved.tokens, strict=True):
        longest = max(sum(lengths[i] for i in batch) for batch in members)
        assert set(tokens) == {-(-longest // 8) * 8}
    buffered = plan_for(ParallelConfig(**sizes, tp_comm_overlap=True), lengths, dp_size=2, work=WORK)
    assert {tokens for rank in buffered.tokens for tokens in rank} == {1024}


def test_the_largest_step_is_planned_without_a_look_at_every_pair():
    """Six thousand micro-batches of one rank: each sequence against each micro-batch would be 10**8 comparisons."""
    lengths = np.clip(np.random.default_rng(0).lognormal(8.5, 0.6, 16384), 64, 16384).astype(int).tolist()
    begin = time.process_time()
    got = plan_microbatches(lengths, dp_size=1, max_tokens=16384, work=QWEN_7B_WORK)
    assert time.process_time() - begin < 6.0
    assert got.num_microbatches < 1.02 * sum(lengths) / 16384 + 1


def test_long_sequences_are_weighed_quadratically():
    long_context = WorkModel(matmul_params=1, attention_width=1000)
    got = plan_microbatches([40, 20, 20, 20, 20], dp_size=2, max_tokens=100, work=long_context)
    assert got.ranks == [[[0]], [[1, 2, 3, 4]]]


def test_a_sequence_above_the_budget_is_refused_with_the_key_and_its_length():
    with pytest.raises(UserError, match=r"parallel\.max_tokens_per_microbatch=64 .*longest sequence of 65 tokens"):
        plan([3, 65], dp_size=1, multiple=1, pad=1)
    with pytest.raises(UserError, match="pads it to a multiple of 8"):
        plan_microbatches([64], dp_size=1, max_tokens=63, work=WORK, pad_to_multiple_of=8)


def test_step_of_published_size_is_balanced_within_five_percent():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(500, 16384, (128,), generator=generator).tolist()
    got = plan_microbatches(lengths, dp_size=8, max_tokens=16384, work=QWEN_7B_WORK, pad_to_multiple_of=4)
    assert got.balance < 1.05


QWEN_7B = model_spec_from_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
)
QWEN_7B_WORK = WorkModel.from_spec(QWEN_7B)


def test_work_of_a_model_counts_its_matrices_and_causal_pairs():
    lookup_norms_biases = (
        QWEN_7B.vocab_size * QWEN_7B.hidden_size
        + QWEN_7B.hidden_size
        + QWEN_7B.num_layers * (2 * QWEN_7B.hidden_size + QWEN_7B.q_size + 2 * QWEN_7B.kv_size)
    )
    assert QWEN_7B_WORK.matmul_params == QWEN_7B.num_parameters() - lookup_norms_biases
    by_pairs = sum(4 * 28 * 3584 * (query + 1) for query in range(100))
    assert QWEN_7B_WORK(100) == 2 * QWEN_7B_WORK.matmul_params * 100 + by_pairs


# Packing

ITEMS = [PackItem([11, 12, 13], [21, 22]), PackItem([31], [41, 42, 43])]


def test_packed_batch_by_hand():
    got = pack(ITEMS, pad_to_multiple_of=4, pad_token_id=9)
    assert got.tokens.tolist() == [11, 12, 13, 21, 22, 31, 41, 42, 43, 9, 9, 9]
    assert got.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert got.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert got.logit_index.tolist() == [2, 3, 5, 6, 7]
    assert got.labels.tolist() == [21, 22, 41, 42, 43]
    assert got.score_index("released").tolist() == [2, 3, 5, 6, 7]
    assert got.score_index("paper").tolist() == [3, 4, 6, 7, 8]
    assert got.response_lengths == [2, 3]
    assert got.max_seqlen == 5
    assert got.cu_seqlens.dtype == torch.int32
    for tensor in (got.tokens, got.position_ids, got.logit_index, got.labels):
        assert tensor.dtype == torch.int64


items_strategy = st.lists(
    st.builds(
        PackItem,
        st.lists(st.integers(0, 99), min_size=1, max_size=9),
        st.lists(st.integers(100, 199), min_size=1, max_size=9),
    ),
    max_size=6,
)


@untimed
@given(items=items_strategy, multiple=st.integers(1, 8))
def test_logits_are_read_one_token_before_the_label_and_never_across_a_boundary(items, multiple):
    got = pack(items, pad_to_multiple_of=multiple)
    assert got.tokens[got.logit_index + 1].tolist() == got.labels.tolist()
    boundaries = got.cu_seqlens.long()
    sequence = torch.bucketize(torch.arange(got.tokens.numel()), boundaries, right=True)
    assert torch.equal(sequence[got.logit_index], sequence[got.logit_index + 1])
    assert got.labels.tolist() == [token for item in items for token in item.response_ids]


@untimed
@given(items=items_strategy, multiple=st.integers(1, 8))
def test_total_length_is_a_positive_multiple_and_padding_is_one_sequence_of_its_own(items, multiple):
    got = pack(items, pad_to_multiple_of=multiple, pad_token_id=777)
    total = got.tokens.numel()
    assert total % multiple == 0
    assert total > 0
    assert got.cu_seqlens[0] == 0
    assert got.cu_seqlens[-1] == total
    assert (got.cu_seqlens.diff() > 0).all()
    padding = total - sum(len(item.prompt_ids) + len(item.response_ids) for item in items)
    assert padding < multiple or not items
    assert got.cu_seqlens.numel() - 1 == len(items) + (padding > 0)
    assert (got.tokens == 777).nonzero().flatten().tolist() == list(range(total - padding, total))
    starts = torch.repeat_interleave(got.cu_seqlens[:-1], got.cu_seqlens.diff())
    assert torch.equal(got.position_ids, torch.arange(total) - starts)


def test_an_idle_rank_packs_padding_alone():
    got = pack([], pad_to_multiple_of=4, pad_token_id=9)
    assert got.tokens.tolist() == [9, 9, 9, 9]
    assert got.cu_seqlens.tolist() == [0, 4]
    assert got.labels.numel() == got.logit_index.numel() == got.score_index("paper").numel() == 0
    assert got.labels.dtype == got.logit_index.dtype == torch.int64
    assert got.response_lengths == []
