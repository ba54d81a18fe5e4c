"""The policy loss on one rank: equal to the oracle, in place, bounded in memory, loud about misuse."""

import itertools
import math

import pytest
import torch
from loss_cases import draw_batch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oreal.errors import UserError
from megatron_oreal.loss import (
    LossSettings,
    TokenCoefficients,
    make_coefficients,
    policy_loss,
    token_logprobs,
    vocab_parallel,
)

SETTINGS = {
    "released": LossSettings(),
    "paper": LossSettings(mode="paper"),
    "released_k2_topk": LossSettings(kl_type="k2", rescale="topk", kl_coef=0.4),
    "paper_k1_thresholds": LossSettings(mode="paper", kl_type="k1", correct_threshold=0.3, incorrect_threshold=0.7),
    "released_no_advantage_old_anchor": LossSettings(pos_mult_adv=False, kl_anchor="old", kl_coef=0.2),
}


def plain(n, positive=0.0, negative=0.0, kl=0.0, **fields):
    """The same coefficients for n tokens."""
    values = {"positive": positive, "negative": negative, "kl": kl}
    return TokenCoefficients(**{k: torch.full((n,), v) for k, v in values.items()}, **fields)


def leaf(tensor, dtype):
    return tensor.to(dtype, copy=True).requires_grad_()


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
    found = policy_loss(batch.logits.float(), batch.labels, plain(len(logp)), vocab_size=48, temperature=0.7).entropy
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


@pytest.mark.parametrize("chunk", [1, 48 * 3, 48 * 5 + 7, 1 << 22])
def test_the_result_does_not_depend_on_the_row_chunks(monkeypatch, chunk):
    batch = draw_batch(3)
    coefficients = batch.coefficients(LossSettings(), with_old=False)
    results = []
    for elements in (48, chunk):
        monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", elements)
        logits = leaf(batch.logits, torch.bfloat16)
        loss = policy_loss(logits, batch.labels, coefficients, vocab_size=48)
        loss.total.backward()
        results.append((loss.logp, loss.entropy, loss.total.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_statistics_of_shards_combine_to_those_of_the_row_even_where_a_shard_is_masked_entirely(shards):
    g = torch.Generator().manual_seed(0)
    n, width = 16, 48
    logits = torch.randn(n, width, generator=g) * 4
    logits[:8, : width // 8] = -torch.inf  # the whole first shard of 8
    logits[8:, width // 2 :] = -torch.inf
    labels = torch.randint(width // 8, width // 2, (n,), generator=g)
    reference = (logits.double() / 0.7).log_softmax(-1)
    gathered = torch.stack(
        [
            vocab_parallel.row_statistics(
                shard.contiguous(), labels, vocab_start=rank * width // shards, vocab_size=width, temperature=0.7
            )
            for rank, shard in enumerate(logits.chunk(shards, dim=1))
        ]
    )
    rows = vocab_parallel.combine(gathered, None, temperature=0.7)
    entropy = -torch.where(reference > -torch.inf, reference.exp() * reference, 0).sum(-1)
    torch.testing.assert_close(rows.logp.double(), reference.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(rows.entropy.double(), entropy, rtol=1e-6, atol=2e-6)
    assert torch.equal(rows.maximum, logits.amax(1))


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


# --- bf16: the label's entry -----------------------------------------------------------------------------------------


def label_entry_error():
    """Largest relative error of ∂loss/∂x_y in bf16 against float64, for p_y from 0.5 to 0.9999."""
    width = 64
    probabilities = torch.tensor([0.5, 0.9, 0.99, 0.999, 0.9999], dtype=torch.float64)
    logits = torch.zeros(len(probabilities), width, dtype=torch.float64)
    logits[:, 7] = (probabilities / (1 - probabilities) * (width - 1)).log()
    stored = logits.bfloat16()
    leaf_logits = stored.clone().requires_grad_()
    labels = torch.full((len(probabilities),), 7)
    policy_loss(leaf_logits, labels, plain(len(labels), positive=1.0), vocab_size=width).total.backward()
    expected = stored.double().softmax(-1)[:, 7] - 1
    return float(((leaf_logits.grad[:, 7].double() - expected) / expected).abs().max())


BF16_ROUNDING = 2.0**-8  # half an ulp of 8 significant bits; float32 noise of 1 − p at p = 0.9999 comes on top


def test_the_label_gradient_in_bf16_is_rounded_once():
    assert label_entry_error() <= BF16_ROUNDING + 1e-3


def test_rounding_before_subtracting_one_would_fail_that_bound(monkeypatch):
    def rounded_first(logits, labels, maximum, sum_exp, logp, derivative, *, temperature, **_):
        softmax = ((logits - maximum[:, None]) / temperature).exp() / sum_exp[:, None]
        logits.copy_(softmax * (-derivative / temperature)[:, None])
        logits[torch.arange(len(labels)), labels] += (derivative / temperature).to(logits.dtype)

    monkeypatch.setattr(vocab_parallel, "gradient_", rounded_first)
    assert label_entry_error() > 0.5


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


# --- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that any operation makes, forward or backward; the number of operations."""

    def __init__(self):
        super().__init__()
        self.largest, self.count = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
        self.count += 1
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_the_size_of_the_logits_is_ever_allocated(monkeypatch, dtype):
    """Forward, backward and the log-prob pass stay within one float32 row chunk: here 1/32 of the logits' elements."""
    n, width = 512, 1024
    chunk_bytes = n * width // 32 * 4
    monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", n * width // 32)
    logits = torch.randn(n, width).to(dtype).requires_grad_()
    labels = torch.randint(0, width, (n,))
    with Allocations() as passes:
        token_logprobs(logits.detach(), labels, vocab_size=width)
        total = policy_loss(logits, labels, plain(n, positive=1.0, kl=0.1), vocab_size=width).total
        forward_count = passes.count
        total.backward()
    assert 0 < passes.largest <= chunk_bytes
    assert passes.count > forward_count  # the backward was watched too
    with Allocations() as naive:
        (logits.float().log_softmax(-1).gather(1, labels[:, None])).sum().backward()
    assert naive.largest >= n * width * 4  # what the recorder sees of the usual way


def test_the_default_chunk_is_small_against_production_logits():
    logits_bytes = 32768 * 19008 * 2  # N = 32768, 152064 columns over TP 8, bf16
    chunk_bytes = vocab_parallel.CHUNK_ELEMENTS * 4
    assert chunk_bytes < 0.02 * logits_bytes


# --- the rest of the contract ----------------------------------------------------------------------------------------


def test_token_logprobs_gives_the_same_bits_and_leaves_the_logits():
    batch = draw_batch(4, width=64, vocab_size=50, temperature=0.9)
    logits = leaf(batch.logits, torch.bfloat16)
    before = logits.detach().clone()
    logp, entropy = token_logprobs(logits, batch.labels, vocab_size=50, temperature=0.9)
    loss = policy_loss(logits, batch.labels, plain(len(before)), vocab_size=50, temperature=0.9)
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
            policy_loss(torch.zeros(2, 8), labels, plain(2), vocab_size=6)
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
