"""The policy loss on one rank equals the oracle, with PyTorch's passes and with the kernels built for the CPU."""

import itertools

import pytest
import torch
from loss_cases import draw_batch, leaf, passes, plain  # noqa: F401

from megatron_oreal.loss import (
    LossSettings,
    TokenCoefficients,
    policy_loss,
)

pytestmark = pytest.mark.usefixtures("passes")

SETTINGS = {
    "released": LossSettings(),
    "paper": LossSettings(mode="paper"),
    "released_k2_topk": LossSettings(kl_type="k2", rescale="topk", kl_coef=0.4),
    "paper_k1_thresholds": LossSettings(mode="paper", kl_type="k1", correct_threshold=0.3, incorrect_threshold=0.7),
    "released_no_advantage_old_anchor": LossSettings(pos_mult_adv=False, kl_anchor="old", kl_coef=0.2),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_value_and_gradient_equal_the_oracle_through_log_softmax(name, with_old, temperature):
    batch = draw_batch(0, temperature=temperature)
    expected, gradient, logp = batch.expected(SETTINGS[name], with_old=with_old, vocab_size=48)
    coefficients = batch.coefficients(SETTINGS[name], with_old=with_old)
    for dtype, tolerance in ((torch.float64, 2e-7), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        logits = leaf(batch.logits, dtype)
        loss = policy_loss(logits, batch.labels, coefficients, vocab_size=48, temperature=temperature)
        value_tolerance = min(tolerance, 3e-6)  # bf16 logits cost precision in the stored gradient alone
        for part in ("total", "positive", "negative", "kl"):
            torch.testing.assert_close(
                getattr(loss, part).detach(), getattr(expected, part).detach(), rtol=value_tolerance, atol=1e-7
            )
        torch.testing.assert_close(loss.logp.double(), logp, rtol=value_tolerance, atol=3e-6)
        loss.total.backward()
        assert logits.grad.dtype == dtype
        assert (logits.grad.double() - gradient).norm() <= tolerance * gradient.norm()


def test_entropy_is_that_of_the_whole_distribution():
    batch = draw_batch(1, temperature=0.7)
    logp = (batch.logits / 0.7).log_softmax(-1)
    found = policy_loss(
        batch.logits.float(), batch.labels, plain(len(logp)), vocab_size=48, temperature=0.7, monitor=True
    ).entropy
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), -(logp.exp() * logp).sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_packing_into_microbatches_gives_the_same_sums_and_gradient(seed):
    batch = draw_batch(seed, sequences=9)
    settings = LossSettings(mode=("released", "paper")[seed % 2])
    expected, gradient, _ = batch.expected(settings, with_old=True, vocab_size=48)
    generator = torch.Generator().manual_seed(seed)
    cuts = [0, *sorted(torch.randint(0, 10, (3,), generator=generator).tolist()), 9]  # empty micro-batches included
    sums = dict.fromkeys(("total", "positive", "negative", "kl"), 0.0)
    gradients = []
    for begin, end in itertools.pairwise(cuts):
        tokens = slice(sum(batch.lengths[:begin]), sum(batch.lengths[:end]))
        logits = leaf(batch.logits[tokens], torch.float64)
        coefficients = batch.coefficients(settings, with_old=True, sequences=slice(begin, end))
        loss = policy_loss(logits, batch.labels[tokens], coefficients, vocab_size=48)
        loss.total.backward()
        gradients.append(logits.grad)
        for part in sums:
            sums[part] += float(getattr(loss, part).detach())
    for part, value in sums.items():
        assert value == pytest.approx(float(getattr(expected, part).detach()), rel=1e-6), part
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("negative_form", ["ratio", "log_ratio"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradient_equals_autograd_of_log_softmax_in_float64(negative_form, kl_type):
    g = torch.Generator().manual_seed(0)
    n, width, temperature = 6, 11, 0.8
    vectors = [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(5)]
    coefficients = TokenCoefficients(*vectors, negative_form=negative_form, kl_type=kl_type)
    positive, negative, kl, old, ref = vectors
    labels = torch.randint(0, width, (n,), generator=g)
    logits = torch.randn(n, width, generator=g, dtype=torch.float64).requires_grad_()
    logp = (logits / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    delta = ref - logp
    k = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - delta - 1}[kl_type]
    f = (logp - old).exp() if negative_form == "ratio" else logp - old
    total = (-positive * logp + negative * f + kl * k).sum()
    (expected,) = torch.autograd.grad(3.7 * total, logits)
    loss = policy_loss(logits, labels, coefficients, vocab_size=width, temperature=temperature)
    torch.testing.assert_close(loss.total.detach(), total.detach(), rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(3.7 * loss.total, logits)  # the upstream gradient is not 1
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding_columns_take_no_part(dtype):
    batch = draw_batch(2, width=64, vocab_size=50)
    batch.logits[:, 50:] = 100.0  # would dominate
    settings = LossSettings()
    _, gradient, logp = batch.expected(settings, with_old=False, vocab_size=50)
    logits = leaf(batch.logits, dtype)
    loss = policy_loss(logits, batch.labels, batch.coefficients(settings, with_old=False), vocab_size=50)
    loss.total.backward()
    torch.testing.assert_close(loss.logp.double(), logp, rtol=1e-6, atol=3e-6)
    assert not logits.grad[:, 50:].any()
    assert (logits.grad.double() - gradient).norm() <= 1e-2 * gradient.norm()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("extreme", ["wide", "offset", "constant", "peaked", "masked"])
def test_extreme_logits_keep_float32_accuracy(extreme, temperature):
    g = torch.Generator().manual_seed(0)
    n, width = 24, 512
    logits = {
        "wide": (torch.rand(n, width, generator=g) * 2 - 1) * 1e4,
        "offset": torch.randn(n, width, generator=g) + 1e4,
        "constant": torch.full((n, width), -1e4),
        "peaked": torch.zeros(n, width).scatter_(1, torch.arange(n)[:, None], 40.0),
        "masked": torch.randn(n, width, generator=g).masked_fill(torch.rand(n, width, generator=g) < 0.5, -torch.inf),
    }[extreme]
    labels = logits.argmax(-1)
    labels[::3] = torch.randint(0, width, labels[::3].shape, generator=g)
    if extreme == "masked":
        logits.scatter_(1, labels[:, None], 0.5)
    reference = (logits.double() / temperature).log_softmax(-1)
    probability = reference.exp()
    logp = reference.gather(1, labels[:, None])[:, 0]
    entropy = -torch.where(probability > 0, probability * reference, 0).sum(-1)
    expected = (probability - torch.nn.functional.one_hot(labels, width)) / temperature
    leaf_logits = leaf(logits, torch.float32)
    loss = policy_loss(leaf_logits, labels, plain(n, positive=1.0), vocab_size=width, temperature=temperature)
    loss.total.backward()
    bound = 3e-6 + 1e-7 * logp.abs()
    assert ((loss.logp.double() - logp).abs() <= bound).all()
    assert ((loss.entropy.double() - entropy).abs() <= 6e-6).all()
    assert torch.isfinite(leaf_logits.grad).all()
    assert (leaf_logits.grad.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-9


def test_a_nan_or_infinite_logit_spoils_its_row_and_no_other():
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, 5] = torch.nan, torch.inf
    leaf_logits = leaf(logits, torch.bfloat16)
    loss = policy_loss(leaf_logits, torch.zeros(4, dtype=torch.int64), plain(4, positive=1.0), vocab_size=8)
    loss.total.backward()
    assert loss.total.isnan()
    assert loss.logp.isnan().tolist() == loss.entropy.isnan().tolist() == [False, True, True, False]
    assert leaf_logits.grad.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert not leaf_logits.grad[[0, 3]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_coefficients_give_exactly_zero_gradient_even_where_nothing_is_finite(dtype):
    n, width = 4, 8
    nan = torch.full((n,), torch.nan)
    coefficients = plain(n, old=nan.clone(), kl_anchor=torch.full((n,), -torch.inf))
    coefficients.positive[0] = 1.0
    logits = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    logits[1, 0] = torch.nan
    leaf_logits = leaf(logits, dtype)
    loss = policy_loss(leaf_logits, torch.full((n,), 2), coefficients, vocab_size=width)
    assert loss.total.detach() == -loss.logp[0].double()
    assert loss.negative == loss.kl == 0
    loss.total.backward()
    assert leaf_logits.grad[0].all()
    assert not leaf_logits.grad[1:].any()
