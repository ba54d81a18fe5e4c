"""The reward model's loss over packed sequences."""

import math

import pytest
import torch

from megatron_oreal.errors import UserError
from megatron_oreal.loss import oreal_loss_reference, reward_model_loss

LENGTHS = [3, 1, 6, 2]
REWARDS = [1, -1, -1, 1]


def draw():
    return torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def test_value_and_gradient_equal_the_oracles():
    scores, twin = draw().requires_grad_(), draw().requires_grad_()
    loss = reward_model_loss(scores, LENGTHS, REWARDS, 4)
    zeros = torch.zeros(12, dtype=torch.float64)
    expected = oreal_loss_reference(zeros, zeros, twin, LENGTHS, REWARDS, [0.0] * 4).reward_model
    loss.total.backward()
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores.grad, twin.grad, rtol=1e-12, atol=1e-15)


def test_gradcheck():
    assert torch.autograd.gradcheck(
        lambda s: reward_model_loss(s, LENGTHS, REWARDS, 7).total, (draw().requires_grad_(),)
    )


def test_microbatches_add_up_to_the_global_batch():
    scores, twin = draw().requires_grad_(), draw().requires_grad_()
    whole = reward_model_loss(scores, LENGTHS, REWARDS, 4)
    parts = [
        reward_model_loss(twin[:4], LENGTHS[:2], REWARDS[:2], 4),
        reward_model_loss(twin[4:4], [], [], 4),
        reward_model_loss(twin[4:], LENGTHS[2:], REWARDS[2:], 4),
    ]
    sum(part.total for part in parts).backward()
    whole.total.backward()
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    torch.testing.assert_close(twin.grad, scores.grad)
    assert sum(int(part.num_correct) for part in parts) == int(whole.num_correct)


def test_statistics_count_the_sequences_predicted_right():
    scores = torch.tensor([3.0, -1.0, 2.0, 2.0, -5.0, 0.0])
    loss = reward_model_loss(scores, [2, 1, 2, 1], [1, -1, -1, 1], 4)
    assert int(loss.num_correct) == 2  # means 1 (right), 2 (wrong), -1.5 (right), 0 (predicts negative: wrong)
    expected = [1 / (1 + math.exp(-x)) for x in (1, 2, -1.5, 0)]
    assert loss.probabilities.tolist() == pytest.approx(expected)


def test_saturated_scores_keep_a_finite_loss_and_a_gradient():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = reward_model_loss(scores, [1, 1], [1, 1], 2)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(5e3)
    assert scores.grad.tolist() == [-0.5, 0.0]


def test_mistakes_are_refused():
    scores = torch.zeros(3)
    for arguments, message in (
        (([2, 2], [1, 1], 2), "lengths sum to"),
        (([2, 1], [1, 0], 2), "rewards"),
        (([2, 1], [1], 2), "rewards"),
        (([2, 1], [1, -1], 1), "num_sequences_global"),
    ):
        with pytest.raises(UserError, match=message):
            reward_model_loss(scores, *arguments)
