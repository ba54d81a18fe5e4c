"""Accuracy on held-out problems when some verdicts are unknown."""

import math

import numpy as np
import pytest

from megatron_oreal.config_load import parse_verifier
from megatron_oreal.data.types import Prompt, Trajectory
from megatron_oreal.errors import UserError
from megatron_oreal.evaluate import evaluate, require_known
from megatron_oreal.rollout.draw import Draw, Samples
from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.telemetry import names
from megatron_oreal.verifier.verdict import Judgement, Verdict

C, W, U = Verdict.CORRECT, Verdict.WRONG, Verdict.UNKNOWN


class Drawn:
    """A sampler whose responses have the given verdicts, sampled and greedy ones."""

    def __init__(self, sampled, greedy):
        self.verdicts = {False: sampled, True: greedy}

    def sample(self, prompts, num_samples, sampling, seed_of, label):
        rows = self.verdicts[sampling.temperature == 0.0]
        assert [len(row) for row in rows] == [num_samples] * len(prompts)
        own = [trajectory(group, k, verdict) for group, row in enumerate(rows) for k, verdict in enumerate(row)]
        return Draw(Samples.of(own), own, None)


def trajectory(group, sample, verdict):
    judgement = None if verdict is None else Judgement(verdict, "a reason")
    return Trajectory(group, sample, np.zeros(1), np.zeros(2), np.zeros(2), True, judgement)


def result(sampled, greedy):
    prompts = [Prompt.__new__(Prompt) for _ in sampled]
    params = SamplingParams(1.0, 0.9, 0, max_new_tokens=4, max_length=8, stop_token_id=0)
    return evaluate(Drawn(sampled, greedy), prompts, len(sampled[0]), params, 0, quiet=True)


def test_an_unknown_verdict_leaves_the_pass_rate_and_is_counted():
    found = result([[C, U, W, C], [U, U, U, C], [U, U, U, U]], [[C], [U], [W]])
    assert found[names.EVAL_PASS_AT_1] == pytest.approx((2 / 3 + 1) / 2)
    assert found[names.EVAL_GREEDY] == 0.5
    assert found[names.EVAL_UNKNOWN_SHARE] == pytest.approx(9 / 15)
    assert found[names.EVAL_PASS_AT_1_LOW] < found[names.EVAL_PASS_AT_1] <= found[names.EVAL_PASS_AT_1_HIGH]


def test_without_unknown_verdicts_every_response_counts():
    found = result([[C, W], [C, C]], [[C], [W]])
    assert (found[names.EVAL_PASS_AT_1], found[names.EVAL_GREEDY], found[names.EVAL_UNKNOWN_SHARE]) == (0.75, 0.5, 0.0)


def test_nothing_known_is_no_accuracy_and_not_zero():
    found = result([[U], [None]], [[U], [U]])
    assert math.isnan(found[names.EVAL_PASS_AT_1]) and math.isnan(found[names.EVAL_GREEDY])
    assert found[names.EVAL_UNKNOWN_SHARE] == 1.0


def test_more_unknown_than_the_default_limit_is_one_line_with_the_mend():
    limit = parse_verifier({}).max_unknown_share
    assert limit == 0.2
    require_known({names.EVAL_UNKNOWN_SHARE: 0.2}, limit)
    with pytest.raises(
        UserError, match=r"^verifier\.max_unknown_share=0\.2: 33% of the evaluation's verdicts are unknown"
    ):
        require_known({names.EVAL_UNKNOWN_SHARE: 1 / 3}, limit)
