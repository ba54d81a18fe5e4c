"""The per-token coefficients that every constant of the policy loss is folded into."""

import math

import pytest
import torch

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, make_coefficients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1, 0]}, "rewards are"),
        ({"advantages": [1.0]}, "advantages has shape"),
        ({"num_positive_tokens": 0}, "num_positive_tokens is 0"),
        ({"num_negative_tokens": 0}, "num_negative_tokens is 0"),
        ({"ref_logp": None}, "ref_logp is None"),
        ({"ref_logp": torch.zeros(4)}, "kl_anchor has shape"),
        ({"weights": (torch.ones(5), torch.ones(4))}, "weights"),
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
