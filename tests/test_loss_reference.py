"""The float64 oracle against algorithm.md's formulas, evaluated here with plain Python floats."""

import math
import random

import pytest
import torch

from megatron_oreal.config import AlgorithmConfig
from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, oreal_loss_reference

LENGTHS = [3, 1, 4, 2, 5]
REWARDS = [1, -1, 1, -1, -1]
ADVANTAGES = [0.8, -0.3, 1.2, -1.1, -0.05]
PASS_RATES = [0.25, 0.25, 0.5, 0.5, 0.75]
N = sum(LENGTHS)


def draw(seed=0):
    """logp, ref, scores, old as lists of floats."""
    generator = random.Random(seed)
    logp = [-generator.expovariate(1.0) for _ in range(N)]
    ref = [x + generator.gauss(0, 0.3) for x in logp]
    scores = [generator.gauss(0, 2) for _ in range(N)]
    old = [x + generator.gauss(0, 0.2) for x in logp]
    return logp, ref, scores, old


def tensors(*vectors):
    return [torch.tensor(v, dtype=torch.float64) for v in vectors]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def expected_weights(scores, mode, rescale="threshold", tau=(0.5, 0.5), ratio=(0.5, 0.5)):
    """(ω⁺, ω⁻) of one sequence, written from algorithm.md with floats."""
    n = len(scores)
    q = [sigmoid(sum(scores[: t + 1]) / (t + 1)) if mode == "released" else sigmoid(scores[t]) for t in range(n)]
    both = []
    for values, threshold, share in ((q, tau[0], ratio[0]), ([1 - x for x in q], tau[1], ratio[1])):
        if rescale == "threshold":
            both.append([min(max((x - threshold) / (1 - threshold), 0.0), 1.0) for x in values])
            continue
        kept = sorted(values, reverse=True)[: math.floor(share * n)]
        span = max(kept) - min(kept) if kept else 0.0
        both.append([0.0 if x not in kept else 1.0 if span == 0 else (x - min(kept)) / span for x in values])
    return both


def expected_loss(
    logp, ref, scores, old, *, mode, factors=(1.0, 0.5), pos_mult_adv=True, kl_coef=0.01, kl_type="k3", **w
):
    count = {sign: sum(n for n, r in zip(LENGTHS, REWARDS, strict=True) if r == sign) for sign in (1, -1)}
    positive = negative = kl = bce = 0.0
    start = 0
    for n, reward, advantage, p in zip(LENGTHS, REWARDS, ADVANTAGES, PASS_RATES, strict=True):
        span = range(start, start + n)
        weights = ([1.0] * n, [1.0] * n) if scores is None else expected_weights([scores[t] for t in span], mode, **w)
        for k, t in enumerate(span):
            if reward == 1:
                a = advantage if mode == "released" and pos_mult_adv else 1.0
                positive += factors[0] / count[1] * a * weights[0][k] * -logp[t]
            elif mode == "released":
                negative += -factors[1] / count[-1] * advantage * weights[1][k] * math.exp(logp[t] - old[t])
            else:
                negative += factors[1] / count[-1] * (1 - p) * weights[1][k] * (logp[t] - old[t])
            d = ref[t] - logp[t]
            kl += kl_coef / N * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl_type]
        if scores is not None:
            quality = sigmoid(sum(scores[t] for t in span) / n)
            bce += -math.log(quality if reward == 1 else 1 - quality) / len(LENGTHS)
        start += n
    return {
        "total": positive + negative + kl,
        "positive": positive,
        "negative": negative,
        "kl": kl,
        "reward_model": bce,
    }


CASES = {
    "defaults": {},
    "k1": {"kl_type": "k1"},
    "k2": {"kl_type": "k2", "kl_coef": 0.3},
    "thresholds": {"correct_threshold": 0.3, "incorrect_threshold": 0.7},
    "topk": {"rescale": "topk"},
    "topk_ratios": {"rescale": "topk", "correct_topk_ratio": 0.75, "incorrect_topk_ratio": 0.25},
    "no_advantage": {"pos_mult_adv": False},
    "factors": {"positive_loss_factor": 1.7, "negative_loss_factor": 0.2, "kl_coef": 0.0},
}


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_old", [False, True])
def test_every_loss_equals_the_formula_in_plain_floats(mode, case, with_old):
    logp, ref, scores, old = draw()
    settings = CASES[case]
    expected = expected_loss(
        logp,
        ref,
        scores,
        old if with_old else logp,
        mode=mode,
        factors=(settings.get("positive_loss_factor", 1.0), settings.get("negative_loss_factor", 0.5)),
        **{k: v for k, v in settings.items() if k in ("pos_mult_adv", "kl_coef", "kl_type", "rescale")},
        tau=(settings.get("correct_threshold", 0.5), settings.get("incorrect_threshold", 0.5)),
        ratio=(settings.get("correct_topk_ratio", 0.5), settings.get("incorrect_topk_ratio", 0.5)),
    )
    x, r, s, o = tensors(logp, ref, scores, old)
    kwargs = {"old_logp": o} if with_old else {}
    loss = oreal_loss_reference(
        x, r, s, LENGTHS, REWARDS, ADVANTAGES, mode=mode, pass_rates=PASS_RATES, **kwargs, **settings
    )
    for name, value in expected.items():
        tensor = getattr(loss, name)
        assert tensor.dtype == torch.float64
        assert tensor.shape == ()
        assert float(tensor) == pytest.approx(value, rel=1e-12, abs=1e-15), name


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_without_a_reward_model_all_weights_are_one(mode):
    logp, ref, _, old = draw(1)
    expected = expected_loss(logp, ref, None, old, mode=mode)
    x, r, o = tensors(logp, ref, old)
    loss = oreal_loss_reference(x, r, None, LENGTHS, REWARDS, ADVANTAGES, mode=mode, old_logp=o, pass_rates=PASS_RATES)
    for name, value in expected.items():
        assert float(getattr(loss, name)) == pytest.approx(value, rel=1e-12), name


def test_one_sequence_worked_by_hand():
    # scores (0, 2): running means (0, 1), q = (0.5, σ(1)), ω⁺ = (0, 2σ(1) − 1); −logp = (1, 2), A = 3, N⁺ = 2, no KL
    x, r, s = tensors([-1.0, -2.0], [-1.0, -2.0], [0.0, 2.0])
    loss = oreal_loss_reference(x, r, s, [2], [1], [3.0], kl_coef=0.0)
    assert float(loss.total) == pytest.approx(3 / 2 * (2 / (1 + math.exp(-1)) - 1) * 2)
    assert float(loss.reward_model) == pytest.approx(math.log(1 + math.exp(-1)))
    # paper: q from each score alone, ω⁺ = (0, 2σ(2) − 1), no advantage
    loss = oreal_loss_reference(x, r, s, [2], [1], [3.0], mode="paper", kl_coef=0.0)
    assert float(loss.total) == pytest.approx((2 / (1 + math.exp(-2)) - 1) * 2 / 2)


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_anchor", ["reference", "old"])
def test_gradients_in_logp_and_scores_are_those_of_finite_differences(mode, kl_type, kl_anchor):
    x, r, s, o = tensors(*draw(2))
    x.requires_grad_()
    s.requires_grad_()
    settings = {"mode": mode, "kl_type": kl_type, "kl_anchor": kl_anchor, "pass_rates": PASS_RATES, "old_logp": o}

    def policy(logp):
        loss = oreal_loss_reference(logp, r, s.detach(), LENGTHS, REWARDS, ADVANTAGES, **settings)
        return loss.total, loss.positive, loss.negative, loss.kl

    def reward_model(scores):
        return oreal_loss_reference(x.detach(), r, scores, LENGTHS, REWARDS, ADVANTAGES, **settings).reward_model

    assert torch.autograd.gradcheck(policy, (x,))
    assert torch.autograd.gradcheck(reward_model, (s,))


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("rescale", ["threshold", "topk"])
def test_policy_losses_never_reach_the_scores_and_the_reward_loss_never_logp(mode, rescale):
    leaves = [t.requires_grad_() for t in tensors(*draw(2))]
    x, r, s, o = leaves
    settings = {"mode": mode, "rescale": rescale, "pass_rates": PASS_RATES}
    loss = oreal_loss_reference(x, r, s, LENGTHS, REWARDS, ADVANTAGES, old_logp=o, **settings)
    for name in ("total", "positive", "negative", "kl"):
        found = torch.autograd.grad(getattr(loss, name), leaves, retain_graph=True, allow_unused=True)
        assert [g is not None for g in found] == [True, False, False, False], name
        assert found[0].abs().sum() > 0
    found = torch.autograd.grad(loss.reward_model, leaves, allow_unused=True)
    assert [g is not None for g in found] == [False, False, True, False]


def test_old_none_is_logp_detached_with_a_live_gradient():
    x, r, s, _ = tensors(*draw(4))
    x.requires_grad_()
    for mode in ("released", "paper"):
        settings = {"mode": mode, "pass_rates": PASS_RATES}
        given = oreal_loss_reference(x, r, s, LENGTHS, REWARDS, ADVANTAGES, old_logp=x.detach(), **settings)
        loss = oreal_loss_reference(x, r, s, LENGTHS, REWARDS, ADVANTAGES, **settings)
        assert torch.equal(loss.total, given.total)
        assert torch.equal(*(torch.autograd.grad(item.negative, x, retain_graph=True)[0] for item in (loss, given)))
        assert torch.autograd.grad(loss.total, x)[0].abs().min() > 0
        if mode == "paper":
            assert float(loss.negative.detach()) == 0.0


@pytest.mark.parametrize("kl_type", ["k2", "k3"])
def test_the_anchor_old_is_identically_zero_with_one_update_a_rollout(kl_type):
    x, r, s, _ = tensors(*draw(5))
    x.requires_grad_()
    loss = oreal_loss_reference(x, r, s, LENGTHS, REWARDS, ADVANTAGES, kl_anchor="old", kl_type=kl_type, kl_coef=5.0)
    assert float(loss.kl.detach()) == 0.0
    assert not torch.autograd.grad(loss.kl, x)[0].any()


def test_k1_on_the_anchor_old_has_value_zero_and_its_constant_gradient():
    x, r, s, _ = tensors(*draw(5))
    x.requires_grad_()
    loss = oreal_loss_reference(x, r, s, LENGTHS, REWARDS, ADVANTAGES, kl_anchor="old", kl_type="k1", kl_coef=3.0)
    assert float(loss.kl.detach()) == 0.0
    assert torch.autograd.grad(loss.kl, x)[0].tolist() == pytest.approx([3.0 / N] * N)


def test_the_anchor_old_measures_the_distance_from_old_when_it_is_given():
    x, r, s, o = tensors(*draw(5))
    common = (s, LENGTHS, REWARDS, ADVANTAGES)
    anchored = oreal_loss_reference(x, r, *common, old_logp=o, kl_anchor="old")
    assert torch.equal(anchored.kl, oreal_loss_reference(x, o, *common).kl)
    assert not torch.equal(anchored.kl, oreal_loss_reference(x, r, *common).kl)


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("signs", [[1, 1], [-1, -1], []], ids=["no_negatives", "no_positives", "nothing_kept"])
def test_empty_sets_give_zeros_that_still_support_backward(mode, signs):
    lengths, n = [2, 1][: len(signs)], 3 if signs else 0
    x, r, s = (t[:n].requires_grad_() for t in tensors(*draw(6)[:3]))
    settings = {"mode": mode, "pass_rates": [0.5] * len(signs)}
    loss = oreal_loss_reference(x, r, s, lengths, signs, [0.5] * len(signs), **settings)
    empty = {"positive": 1 not in signs, "negative": -1 not in signs, "kl": not signs, "reward_model": not signs}
    for name in [name for name, is_empty in empty.items() if is_empty]:
        leaf = s if name == "reward_model" else x
        assert float(getattr(loss, name).detach()) == 0.0
        assert not torch.autograd.grad(getattr(loss, name), leaf, retain_graph=True)[0].any()
    loss.total.backward()
    loss.reward_model.backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(s.grad).all()


def test_zero_weights_leave_the_kl_alone():
    x, r, _ = tensors(*draw(7)[:3])
    loss = oreal_loss_reference(x, r, torch.zeros(N, dtype=torch.float64), LENGTHS, REWARDS, ADVANTAGES)
    assert float(loss.positive) == float(loss.negative) == 0.0  # q = 0.5: a new reward model weighs nothing
    assert float(loss.total) == float(loss.kl) > 0
    assert float(loss.reward_model) == pytest.approx(math.log(2))


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, -0.7, 3.3])
def test_topk_of_equal_scores_gives_ones_to_the_earliest_tokens(constant):
    n = 7
    x, r, s = tensors([-1.0 * 2**t for t in range(n)], [0.0] * n, [constant] * n)
    loss = oreal_loss_reference(x, r, s, [n], [1], [1.0], rescale="topk", correct_topk_ratio=0.5, kl_coef=0.0)
    assert float(loss.positive) == pytest.approx((1 + 2 + 4) / n)


def test_topk_of_a_single_token_rounds_down_to_nothing():
    x, r, s = tensors([-1.0], [0.0], [4.0])
    loss = oreal_loss_reference(x, r, s, [1], [1], [1.0], rescale="topk", correct_topk_ratio=0.9, kl_coef=0.0)
    assert float(loss.positive) == 0.0
    loss = oreal_loss_reference(x, r, s, [1], [1], [1.0], rescale="topk", correct_topk_ratio=1.0, kl_coef=0.0)
    assert float(loss.positive) == 1.0


def test_the_reward_loss_is_finite_for_saturated_scores():
    x, r, s = tensors([-1.0], [-1.0], [-800.0])
    assert float(oreal_loss_reference(x, r, s, [1], [1], [1.0]).reward_model) == pytest.approx(800.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coeff": 0.1}, "unknown loss coefficient 'kl_coeff' (did you mean 'kl_coef'?)"),
        ({"kl_type": "k4"}, "kl_type is 'k4'; it must be one of k1, k2, k3"),
        ({"mode": "released2"}, "mode is 'released2'"),
        ({"correct_threshold": 1.0}, "correct_threshold is 1.0; it must be in [0, 1)"),
        ({"incorrect_topk_ratio": 1.5}, "incorrect_topk_ratio is 1.5; it must be in [0, 1]"),
        ({"lengths": [3, 2]}, "logp has shape [15]; it must be [5]"),
        ({"lengths": [15, 0, 0, 0, 0]}, "every response has at least one token"),
        ({"ref_logp": torch.zeros(14)}, "ref_logp has shape [14]"),
        ({"rm_scores": torch.zeros(15, 1)}, "rm_scores has shape [15, 1]"),
        ({"old_logp": torch.zeros(2)}, "old_logp has shape [2]"),
        ({"rewards": [1, 0, 1, -1, -1]}, "each must be +1 or -1"),
        ({"rewards": [1, -1]}, "rewards has 2 values for 5 sequences"),
        ({"advantages": [1.0]}, "advantages has 1 values for 5 sequences"),
        ({"mode": "paper"}, "pass_rates is None"),
        ({"mode": "paper", "pass_rates": [0.5]}, "pass_rates has 1 values"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(change, message):
    x, r, s, _ = tensors(*draw())
    arguments = {"logp": x, "ref_logp": r, "rm_scores": s, "lengths": LENGTHS, "rewards": REWARDS}
    with pytest.raises(UserError) as caught:
        oreal_loss_reference(**(arguments | {"advantages": ADVANTAGES} | change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_agree_with_the_config_tree():
    config = AlgorithmConfig()
    assert LossSettings.from_config(config) == LossSettings()
    changed = AlgorithmConfig(mode="paper", correct_threshold=0.2, kl_type="k2")
    assert LossSettings.from_config(changed) == LossSettings(mode="paper", correct_threshold=0.2, kl_type="k2")
