"""The autograd function of the loss, the same tests for all passes: PyTorch's, the kernels built for the CPU, CUDA."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from loss_host import host_library

from megatron_oreal.loss import TokenCoefficients, fused, policy_loss, token_logprobs

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])


@pytest.fixture(params=["pytorch", "kernels", CUDA])
def device(request, monkeypatch):
    """Where the tensors live; which passes run there is chosen by OREAL_KERNELS."""
    kernels = {"pytorch": "0", "kernels": str(host_library()) if request.param == "kernels" else "", "cuda": "1"}
    monkeypatch.setenv("OREAL_KERNELS", kernels[request.param])
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def draw(n, width, *, scale=3.0, dtype=torch.float32, device="cpu"):
    """(logits, labels, coefficients with every term) from a seed that depends on the shape."""
    g = torch.Generator().manual_seed(1000 * n + width)
    logits = (torch.randn(n, width, generator=g) * scale).to(dtype)
    labels = torch.randint(0, width, (n,), generator=g)
    logp = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    positive, negative, kl = torch.rand(3, n, generator=g)
    old, ref = logp + torch.randn(2, n, generator=g) * 0.2
    moved = [vector.to(device) for vector in (positive, negative, kl, old, ref)]
    return logits.to(device), labels.to(device), TokenCoefficients(*moved)


def plain_formula(logits, labels, c):
    """(total, logp) through float64 log_softmax."""
    logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    delta = c.kl_anchor.double() - logp
    kl = delta.exp() - delta - 1
    return (-c.positive * logp + c.negative * (logp - c.old.double()).exp() + c.kl * kl).sum(), logp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (3, 8), (127, 40), (5, 127), (4, 4099), (2, 151936), (3, 152064)])
@pytest.mark.parametrize("upstream", [1.0, 3.7])
def test_value_and_gradient_are_those_of_float64_for_all_widths(device, dtype, n, width, upstream):
    logits, labels, coefficients = draw(n, width, dtype=dtype, device=device)
    exact = logits.double().requires_grad_()
    total, logp = plain_formula(exact, labels, coefficients)
    (upstream * total).backward()
    logits.requires_grad_()
    loss = policy_loss(logits, labels, coefficients, vocab_size=width)
    (upstream * loss.total).backward()
    torch.testing.assert_close(loss.logp.double(), logp.detach(), rtol=1e-6, atol=8e-6)
    torch.testing.assert_close(loss.total.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    bound = 4e-3 if dtype == torch.bfloat16 else 2e-5
    assert (logits.grad.double() - exact.grad).norm() <= bound * exact.grad.norm() + 1e-6
    assert logits.grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("masked", ["half", "all"])
def test_masked_rows_are_never_read(device, masked):
    n, width = 33, 24
    logits, labels, coefficients = draw(n, width, device=device)
    active = torch.arange(n, device=device) % 2 == 0 if masked == "half" else torch.zeros(n, dtype=bool, device=device)
    poisoned = torch.where(active[:, None], logits, torch.nan).requires_grad_()
    loss = policy_loss(poisoned, labels.where(active, -100), coefficients, vocab_size=width, active=active)
    loss.total.backward()
    alone = logits[active].clone().requires_grad_()
    expected = policy_loss(alone, labels[active], coefficients[active], vocab_size=width)
    expected.total.backward()
    torch.testing.assert_close(loss.total, expected.total, rtol=1e-12, atol=0)
    assert torch.equal(poisoned.grad[active], alone.grad)
    assert not poisoned.grad[~active].any()
    assert torch.equal(loss.logp[active], expected.logp)
    assert not loss.logp[~active].any()
    assert not loss.entropy[~active].any()
    logp, entropy = token_logprobs(
        torch.where(active[:, None], logits, torch.nan), labels.where(active, -100), vocab_size=width, active=active
    )
    assert torch.equal(logp, loss.logp)
    assert torch.equal(entropy, loss.entropy)


def test_rows_without_coefficients_are_read_only_to_monitor_them(device):
    logits, labels, coefficients = draw(6, 12, device=device)
    for name in ("positive", "negative", "kl"):
        getattr(coefficients, name)[:3] = 0.0
    poisoned = torch.where(torch.arange(6, device=device)[:, None] < 3, torch.nan, logits)
    silent = policy_loss(poisoned, labels, coefficients, vocab_size=12)
    watched = policy_loss(logits, labels, coefficients, vocab_size=12, monitor=True)
    assert torch.equal(silent.total, watched.total)
    assert not silent.logp[:3].any()
    assert not silent.entropy[:3].any()
    assert (watched.logp[:3] < 0).all()
    assert (watched.entropy[:3] > 0).all()


class FreshBackward(torch.autograd.Function):
    """fn(x) whose every backward runs fn's forward and backward anew: gradcheck asks for many of one forward."""

    @staticmethod
    def forward(ctx, x, fn):
        ctx.save_for_backward(x)
        ctx.fn = fn
        return fn(x.clone())

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].clone().requires_grad_()
            total = ctx.fn(x)
        with torch.no_grad():
            return torch.autograd.grad(total, x, grad)[0], None


@pytest.mark.parametrize("negative_form", ["ratio", "log_ratio"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradcheck_in_float64(negative_form, kl_type):
    g = torch.Generator().manual_seed(0)
    vectors = [torch.randn(5, generator=g, dtype=torch.float64) for _ in range(5)]
    coefficients = TokenCoefficients(*vectors, negative_form=negative_form, kl_type=kl_type)
    labels = torch.randint(0, 7, (5,), generator=g)
    logits = torch.randn(5, 9, generator=g, dtype=torch.float64).requires_grad_()

    def total(x):
        return policy_loss(x, labels, coefficients, vocab_size=7, temperature=0.7).total

    assert torch.autograd.gradcheck(lambda x: FreshBackward.apply(x, total), (logits,))


def test_minus_infinity_is_a_mask_and_nan_spoils_its_row(device):
    logits, labels, _ = draw(4, 16, device=device)
    labels.fill_(3)
    logits[0, 5:] = -torch.inf
    logits[1, 2] = torch.nan
    logits[2, 2] = torch.inf
    exact = logits.double()[[0, 3]].requires_grad_()
    F.cross_entropy(exact, labels[[0, 3]], reduction="sum").backward()
    logits.requires_grad_()
    one, zero = torch.ones(4, device=device), torch.zeros(4, device=device)
    loss = policy_loss(logits, labels, TokenCoefficients(one, zero, zero), vocab_size=16)
    loss.total.backward()
    assert loss.logp.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(logits.grad[[0, 3]].double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert not logits.grad[0, 5:].any()
    assert logits.grad[1:3].isnan().all()


def test_no_token_is_a_zero_with_an_empty_gradient(device):
    logits = torch.zeros(0, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    none = torch.zeros(0, device=device)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    loss = policy_loss(logits, labels, TokenCoefficients(none, none, none), vocab_size=16)
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert logits.grad.shape == (0, 16)


def test_rows_beyond_two_to_the_31_elements_are_found(device):
    """4.3 GB of logits of which one row is touched: memory that nobody reads or writes is never mapped."""
    rows, width = (1 << 15) + 2, 1 << 16
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    assert (rows - 1) * width > 2**31
    last = torch.randn(width, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    logits[-1] = last
    active = torch.zeros(rows, dtype=torch.bool, device=device)
    active[-1] = True
    labels = torch.full((rows,), width - 1, device=device)
    logp, _ = token_logprobs(logits, labels, vocab_size=width, active=active)
    torch.testing.assert_close(logp[-1].double(), last.double().log_softmax(0)[-1], rtol=1e-6, atol=8e-6)


def test_a_second_backward_and_a_second_derivative_are_refused(device):
    logits, labels, coefficients = draw(3, 8, device=device)
    total = policy_loss(logits.requires_grad_(), labels, coefficients, vocab_size=8).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, logits, create_graph=True)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        total.backward()


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_gpu_without_kernels_is_said_once(monkeypatch):
    monkeypatch.setenv("OREAL_KERNELS", "0")
    fused._say_that_kernels_are_missing.cache_clear()  # an earlier test may have heard it
    logits, labels, coefficients = draw(3, 8, device="cuda")
    with pytest.warns(RuntimeWarning, match="without its CUDA kernels"):
        policy_loss(logits, labels, coefficients, vocab_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_loss(logits, labels, coefficients, vocab_size=8)
