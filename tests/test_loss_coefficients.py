"""The per-token coefficients that every constant of the policy loss is folded into."""

import math

import pytest
import torch
from loss_cases import draw_batch, passes  # noqa: F401

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, make_coefficients, token_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1, 0]}, "rewards are"),
        ({"advantages": [1.0]}, "advantages has shape"),
        ({"num_positive_tokens": 0}, "num_positive_tokens is 0"),
        ({"num_negative_tokens": 0}, "num_negative_tokens is 0"),
        ({"ref_logp": None}, "ref_logp is None"),
        ({"ref_logp": torch.zeros(4)}, "kl_anchor has shape"),
        ({"weights": (torch.ones(5), torch.ones(4))}, r"weights must be \[5\]"),
        ({"scores": torch.ones(4)}, r"scores must be \[5\]"),
        ({"settings": LossSettings(mode="paper")}, "pass_rates is None"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(change, message):
    arguments = {
        "lengths": [2, 3],
        "rewards": [1, -1],
        "advantages": [1.0, -1.0],
        "settings": LossSettings(),
        "num_positive_tokens": 2,
        "num_negative_tokens": 3,
        "num_tokens": 5,
        "ref_logp": torch.zeros(5),
    }
    with pytest.raises(UserError, match=message):
        make_coefficients(**(arguments | change))


def test_coefficients_worked_by_hand():
    weights = (torch.tensor([0.5, 1.0, 0.25, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    arguments = {"num_positive_tokens": 8, "num_negative_tokens": 4, "num_tokens": 12, "weights": weights}
    arguments |= {"ref_logp": torch.zeros(4), "pass_rates": [0.75, 0.75]}
    released = make_coefficients([2, 2], [1, -1], [0.8, -0.6], LossSettings(), **arguments)
    assert released.positive.tolist() == pytest.approx([0.8 * 0.5 / 8, 0.8 / 8, 0, 0])
    assert released.negative.tolist() == pytest.approx([0, 0, 0.5 * 0.6 * 0.3 / 4, 0.5 * 0.6 * 0.4 / 4])
    assert released.kl.tolist() == pytest.approx([0.01 / 12] * 4)
    paper = make_coefficients([2, 2], [1, -1], [0.8, -0.6], LossSettings(mode="paper"), **arguments)
    assert paper.positive.tolist() == pytest.approx([0.5 / 8, 1 / 8, 0, 0])
    assert paper.negative.tolist() == pytest.approx([0, 0, 0.5 * 0.25 * 0.3 / 4, 0.5 * 0.25 * 0.4 / 4])
    assert (released.negative_form, paper.negative_form) == ("ratio", "log_ratio")
    assert math.isclose(
        float(
            make_coefficients(
                [1], [1], [2.0], LossSettings(kl_coef=0.0), num_positive_tokens=1, num_negative_tokens=0, num_tokens=1
            ).positive
        ),
        2.0,
    )


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("rescale", ["threshold", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_give_the_coefficients_of_their_weights(mode, rescale, dtype):
    """With the kernels in one pass, else in two: the same float32 numbers but for the last rounding of a weight."""
    batch = draw_batch(0, sequences=20)
    settings = LossSettings(mode=mode, rescale=rescale)
    scores = batch.scores.to(dtype)
    arguments = {"num_positive_tokens": 70, "num_negative_tokens": 50, "num_tokens": 120, "ref_logp": batch.ref_logp}
    arguments |= {"pass_rates": batch.pass_rates}
    sequences = (batch.lengths, batch.rewards, batch.advantages, settings)
    weights = token_weights(scores, batch.lengths, settings)
    expected = make_coefficients(*sequences, weights=weights, **arguments)
    found = make_coefficients(*sequences, scores=scores, **arguments)
    for name in ("positive", "negative", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-7, atol=1e-9)
    for ours, theirs in zip(found.weights, weights, strict=True):
        assert torch.equal(ours, theirs)
    part = found[2:5]
    assert all(torch.equal(a, b[2:5]) for a, b in zip(part.weights, found.weights, strict=True))
    assert torch.equal(found.is_nonzero(), (found.positive != 0) | (found.negative != 0) | (found.kl != 0))
