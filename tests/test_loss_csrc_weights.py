"""The token-weight kernel through the host build: thread geometry, packs and ties, against the oracle's formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import WEIGHT_BLOCK as BLOCK
from kernel_cases import WEIGHT_SETTINGS as SETTINGS
from kernel_cases import check_weight_geometry, check_weights, offsets, oracle_weights
from loss_host import host_kernels

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, make_coefficients, token_weights


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_lengths_around_the_sizes_of_thread_and_block(mode, values):
    check_weight_geometry(host_kernels(), mode, values)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.sampled_from(["released", "paper"]),
    st.floats(0, 1),
    st.booleans(),
)
def test_topk_with_any_ratio_and_ties(lengths, seed, mode, ratio, tied):
    scores = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)) * 2
    values = {"correct_topk_ratio": ratio, "incorrect_topk_ratio": 1 - ratio}
    check_weights(
        host_kernels(), scores.round() if tied else scores, lengths, LossSettings(mode=mode, rescale="topk", **values)
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -2.3, 40.0, -800.0])
def test_topk_of_equal_scores_chooses_the_earliest(value):
    lengths = [5, 1, 3 * BLOCK + 10]
    options = LossSettings(rescale="topk", correct_topk_ratio=0.5, incorrect_topk_ratio=0.25)
    found = check_weights(host_kernels(), torch.full((sum(lengths),), value), lengths, options)
    assert found[0][:6].tolist() == [1, 1, 0, 0, 0, 0]
    for weight, ratio in zip(found, (0.5, 0.25), strict=True):
        chosen = int(ratio * lengths[2])
        assert weight[6:].tolist() == [1.0] * chosen + [0.0] * (lengths[2] - chosen)


def test_a_sequence_has_the_same_bits_in_every_pack():
    generator = torch.Generator().manual_seed(3)
    lengths = [7, 3000, 1, 600]
    scores = torch.randn(sum(lengths), generator=generator)
    scores[:7] += 1e5
    for values in SETTINGS:
        packed = host_kernels().token_weights(scores, offsets(lengths), LossSettings(**values))
        for begin, end in zip(offsets(lengths)[:-1], offsets(lengths)[1:], strict=True):
            part = scores[begin:end]
            single = host_kernels().token_weights(part, offsets([len(part)]), LossSettings(**values))
            for whole, alone in zip(packed, single, strict=True):
                assert torch.equal(whole[begin:end], alone)


@pytest.mark.parametrize("values", SETTINGS[:5], ids=str)
def test_nan_scores_are_not_hidden_and_do_not_spread_to_other_sequences(values):
    scores = torch.randn(20, generator=torch.Generator().manual_seed(0))
    scores[4] = torch.nan
    plus, minus = host_kernels().token_weights(scores, offsets([10, 10]), LossSettings(**values))
    for weight in (plus, minus):
        assert weight[4:10].isnan().all()
        assert weight[10:].isfinite().all()


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("with_scores", [True, False])
def test_coefficients_in_one_pass_are_those_of_make_coefficients(mode, values, with_scores):
    lengths, generator = [5, 900, 2, 2500, 30], torch.Generator().manual_seed(7)
    n, sequences = sum(lengths), len(lengths)
    options = LossSettings(mode=mode, kl_coef=0.02, **values)
    scores = torch.randn(n, generator=generator) * 2 if with_scores else None
    rewards, advantages, pass_rates = [1, -1, 1, -1, 1], [0.3, -0.7, 0.1, -0.2, 0.9], [0.5] * sequences
    counts = {"num_positive_tokens": 900, "num_negative_tokens": 700, "num_tokens": 1600}
    wanted = make_coefficients(
        *(lengths, rewards, advantages, options),
        **counts,
        weights=None if scores is None else token_weights(scores, lengths, options),
        ref_logp=torch.zeros(n),
        pass_rates=pass_rates,
    )
    strengths = torch.zeros(sequences, 2, dtype=torch.float64)
    for i, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
        if reward > 0:
            strengths[i, 0] = (advantage if mode == "released" else 1.0) * options.positive_loss_factor / 900
        else:
            strengths[i, 1] = (-advantage if mode == "released" else 0.5) * options.negative_loss_factor / 700
    found = host_kernels().token_coefficients(
        scores, offsets(lengths), strengths, options, num_tokens=n, kl=options.kl_coef / 1600
    )
    torch.testing.assert_close(found.positive, wanted.positive, rtol=2e-7, atol=1e-12)
    torch.testing.assert_close(found.negative, wanted.negative, rtol=2e-7, atol=1e-12)
    assert torch.equal(found.kl, wanted.kl)
    assert found.active.all()
    if scores is None:
        assert torch.equal(found.positive_weight, torch.ones(n))
    else:
        for weight, right in zip(
            (found.positive_weight, found.negative_weight), oracle_weights(scores, lengths, options), strict=True
        ):
            torch.testing.assert_close(weight.double(), right, rtol=1e-6, atol=1e-7)


def test_active_tokens_are_those_with_a_coefficient():
    scores = torch.tensor([3.0, -3.0, 3.0, -3.0])
    strengths = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    options = LossSettings(mode="paper")
    arguments = (scores, offsets([2, 2]), strengths, options)
    assert host_kernels().token_coefficients(*arguments, num_tokens=4, kl=0.0).active.tolist() == [1, 0, 0, 1]
    assert host_kernels().token_coefficients(*arguments, num_tokens=4, kl=0.1).active.tolist() == [1, 1, 1, 1]


def test_an_empty_pack():
    plus, minus = host_kernels().token_weights(torch.zeros(0), offsets([]), LossSettings(rescale="topk"))
    assert plus.shape == minus.shape == (0,)


def test_wrong_arguments_are_refused():
    host, two = host_kernels(), torch.zeros(2)
    with pytest.raises(UserError, match=r"cu_seqlens is torch\.int32"):
        host.token_weights(two, offsets([2]).int(), LossSettings())
    with pytest.raises(UserError, match=r"scores has shape \[1, 2\]"):
        host.token_weights(two[None], offsets([2]), LossSettings())
    with pytest.raises(UserError, match="strengths has shape"):
        host.token_coefficients(
            two, offsets([2]), torch.zeros(3, 2, dtype=torch.float64), LossSettings(), num_tokens=2, kl=0.0
        )
    with pytest.raises(RuntimeError, match="no kernel accepts"):  # fewer tokens than sequences
        host.token_weights(two, offsets([1, 1, 1]), LossSettings())
