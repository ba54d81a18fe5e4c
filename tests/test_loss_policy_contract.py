"""The policy loss as a guest in an autograd graph: whose storage, how much memory, what it refuses."""

import pytest
import torch
from loss_cases import draw_batch, leaf, passes, plain  # noqa: F401

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, make_coefficients, policy_loss, token_logprobs

pytestmark = pytest.mark.usefixtures("passes")

# --- ownership of the logits' storage --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_forward_leaves_the_logits_and_backward_returns_their_storage(dtype):
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    before = logits.detach().clone()
    loss = policy_loss(logits, torch.arange(5), plain(5, positive=1.0), vocab_size=16)
    assert torch.equal(logits, before)
    loss.total.backward()
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert not torch.equal(logits, before)


def test_behind_a_gemm_its_gradients_are_those_of_plain_autograd():
    """The output layer saves its input and weight, never its output: consuming the output, or a view of it, is safe."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 1, 10, generator=g), torch.randn(32, 10, generator=g)
    labels = torch.randint(0, 32, (6,), generator=g)
    results, pointers = [], []
    for ours in (True, False):
        x, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        out = torch.matmul(x, w.t())  # [s, 1, V], as Megatron's output layer returns it
        logits = out.view(6, 32)
        if ours:
            out.register_hook(lambda grad, out=out: pointers.append((grad.data_ptr(), out.data_ptr())))
            policy_loss(logits, labels, plain(6, positive=0.5), vocab_size=32).total.backward()
        else:
            (-0.5 * logits.log_softmax(-1).gather(1, labels[:, None])).sum().backward()
        results.append((x.grad, w.grad))
    assert pointers[0][0] == pointers[0][1]  # no copy on the way into the GEMM
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_second_backward_says_that_the_logits_are_gone():
    logits = torch.randn(3, 8, requires_grad=True)
    total = policy_loss(logits, torch.zeros(3, dtype=torch.int64), plain(3, positive=1.0), vocab_size=8).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        total.backward()


def test_a_second_derivative_is_refused():
    logits = torch.randn(3, 8, requires_grad=True)
    total = policy_loss(logits, torch.zeros(3, dtype=torch.int64), plain(3, positive=1.0), vocab_size=8).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, logits, create_graph=True)


def test_other_users_of_consumed_or_changed_logits_are_told():
    labels = torch.zeros(3, dtype=torch.int64)
    logits = torch.randn(3, 8, requires_grad=True) * 1.0
    twice = [policy_loss(logits, labels, plain(3, positive=1.0), vocab_size=8).total for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(twice).backward()
    logits = torch.randn(3, 8, requires_grad=True) * 1.0
    total = policy_loss(logits, labels, plain(3, positive=1.0), vocab_size=8).total
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_parts_and_token_values_carry_no_gradient():
    logits = torch.randn(3, 8, requires_grad=True)
    loss = policy_loss(logits, torch.zeros(3, dtype=torch.int64), plain(3, positive=1.0), vocab_size=8)
    assert loss.total.requires_grad
    assert not any(t.requires_grad for t in (loss.positive, loss.negative, loss.kl, loss.logp, loss.entropy))


# --- the rest of the contract ----------------------------------------------------------------------------------------


def test_token_logprobs_gives_the_same_bits_and_leaves_the_logits():
    batch = draw_batch(4, width=64, vocab_size=50, temperature=0.9)
    logits = leaf(batch.logits, torch.bfloat16)
    before = logits.detach().clone()
    logp, entropy = token_logprobs(logits, batch.labels, vocab_size=50, temperature=0.9)
    loss = policy_loss(logits, batch.labels, plain(len(before)), vocab_size=50, temperature=0.9, monitor=True)
    assert torch.equal(logp, loss.logp)
    assert torch.equal(entropy, loss.entropy)
    assert torch.equal(logits, before)
    assert not logp.requires_grad


def test_reference_equal_to_the_policy_has_no_kl_and_no_gradient():
    batch = draw_batch(5)
    logits = leaf(batch.logits, torch.float32)
    logp, _ = token_logprobs(logits, batch.labels, vocab_size=48)
    for kl_type in ("k2", "k3"):
        logits = leaf(batch.logits, torch.float32)
        coefficients = plain(len(logp), kl=1.0, kl_anchor=logp, kl_type=kl_type)
        loss = policy_loss(logits, batch.labels, coefficients, vocab_size=48)
        loss.total.backward()
        assert float(loss.kl) == 0.0
        assert not logits.grad.any()


def test_on_policy_none_and_old_equal_to_logp_give_the_same_bits():
    batch = draw_batch(6)
    gradients = []
    logp, _ = token_logprobs(batch.logits.float(), batch.labels, vocab_size=48)
    for old in (None, logp):
        logits = leaf(batch.logits, torch.bfloat16)
        coefficients = plain(len(logp), negative=0.7, old=old)
        policy_loss(logits, batch.labels, coefficients, vocab_size=48).total.backward()
        gradients.append(logits.grad)
    assert torch.equal(*gradients)


def test_no_tokens_is_a_zero_that_supports_backward():
    logits = torch.zeros(0, 8, dtype=torch.bfloat16, requires_grad=True)
    settings = LossSettings()
    counts = {"num_positive_tokens": 0, "num_negative_tokens": 0, "num_tokens": 0}
    loss = policy_loss(
        logits, torch.zeros(0, dtype=torch.int64), make_coefficients([], [], [], settings, **counts), vocab_size=8
    )
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert logits.grad.shape == (0, 8)


def test_a_label_outside_the_vocabulary_is_an_error():
    for label in (-1, 6, 100):
        labels = torch.tensor([0, label])
        with pytest.raises(UserError, match=rf"label {label} is outside the vocabulary \[0, 6\)"):
            policy_loss(torch.zeros(2, 8), labels, plain(2, positive=1.0), vocab_size=6)
        with pytest.raises(UserError, match="outside the vocabulary"):
            token_logprobs(torch.zeros(2, 8), labels, vocab_size=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(8, 2).t()}, "must be a contiguous"),
        ({"logits": torch.zeros(2, 16)[:, ::2]}, "must be a contiguous"),
        ({"logits": torch.zeros(2, 1, 8)}, "must be a contiguous"),
        ({"logits": torch.zeros(1, 8).expand(2, 8)}, "must be a contiguous"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float16)}, "must be bfloat16"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "must be int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "must be int64"),
        ({"vocab_size": 9}, r"vocab_size is 9; it must be in \[1, 8\]"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be > 0"),
        ({"coefficients": plain(3)}, "coefficients are of 3 tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"logits": torch.zeros(2, 8), "labels": torch.zeros(2, dtype=torch.int64), "coefficients": plain(2)}
    arguments |= {"vocab_size": 8, **change}
    with pytest.raises(UserError, match=message):
        policy_loss(arguments.pop("logits"), arguments.pop("labels"), arguments.pop("coefficients"), **arguments)
