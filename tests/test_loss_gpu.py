"""The CUDA kernels on a GPU: the host build's cases again, and what only a device can show."""

import dataclasses

import pytest
import torch
from kernel_cases import (
    WEIGHT_SETTINGS,
    Case,
    backward_,
    check_case,
    check_confident_tokens,
    check_weight_geometry,
    draw_coefficients,
    expected_gradient,
    expected_terms,
    forward,
    shard,
)
from loss_host import host_kernels

from megatron_oreal.loss import (
    LossSettings,
    TokenCoefficients,
    Vocabulary,
    chunked,
    linear_policy_loss,
    policy_loss,
    token_logprobs,
)
from megatron_oreal.loss.kernels import LABEL_OUTSIDE
from megatron_oreal.loss.library import kernels_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float32]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def kernels():
    found = kernels_for(CUDA)
    assert found is not None, "no kernels for this GPU: megatron-oreal env says why"
    return found


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is full of NaN: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(width=width) for width in (1, 5, 8, 127, 2048, 4104, 9999, 19008)),
        *(Case(width=2051, offset=offset, gap=gap) for offset, gap in ((1, 0), (4, 3), (8, 8), (3, 5))),
        *(Case(rows=18, width=1600 // ranks + 1, ranks=ranks, temperature=0.7) for ranks in (2, 4, 8)),
        Case(rows=18, width=401, ranks=4, vocab_size=300),
        Case(rows=3, width=152064, vocab_size=151665),
        Case(rows=1000, width=3000, temperature=1.3),
        Case(width=3000, ranks=2, scale=0.0),
        Case(width=3000, ranks=2, scale=1e4),
    ],
    ids=str,
)
def test_against_float64(kernels, case, dtype):
    check_case(kernels, dataclasses.replace(case, dtype=dtype), CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_gradient_of_confident_tokens(kernels, dtype):
    check_confident_tokens(kernels, dtype, CUDA)


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("values", WEIGHT_SETTINGS, ids=str)
def test_token_weights(kernels, mode, values):
    check_weight_geometry(kernels, mode, values, CUDA)


def test_the_host_build_is_a_faithful_model(kernels):
    """The tests without a GPU say something about the GPU: they differ by the device's exponential alone."""
    case = Case(rows=50, width=9504, ranks=2, temperature=0.8)
    full, labels = case.logits(), case.labels()
    results = []
    for build, device in ((host_kernels(), "cpu"), (kernels, CUDA)):
        shards = [shard(full, case, rank, device) for rank in range(2)]
        results.append(forward(build, shards, labels, case))
    torch.testing.assert_close(results[0].logp, results[1].logp.cpu(), rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(results[0].entropy, results[1].entropy.cpu(), rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(kernels, value):
    for dtype in DTYPES:
        case = Case(rows=3, width=1500, ranks=2, dtype=dtype)
        full, labels = case.logits(), torch.tensor([4, 4, 4])
        full[1, 2222] = value
        shards = [shard(full, case, rank, CUDA) for rank in range(2)]
        c = TokenCoefficients(torch.ones(3), torch.zeros(3), torch.zeros(3))
        found = forward(kernels, shards, labels, case, c)
        bad = value != -torch.inf
        assert found.logp.isnan().tolist() == [False, bad, False]
        gradient = backward_(kernels, shards, labels, found.state, case)
        assert gradient.isnan().all(1).tolist() == [False, bad, False]
        assert bad or gradient[1, 2222] == 0


def test_a_label_of_no_shard_marks_the_status_without_a_wait(kernels):
    case = Case(rows=3, width=200, ranks=2, vocab_size=300)
    shards = [shard(case.logits(), case, rank, CUDA) for rank in range(2)]
    status = torch.zeros(1, dtype=torch.int32, device=CUDA)
    found = forward(kernels, shards, torch.tensor([0, 300, 299]), case, status=status)
    assert found.logp.isnan().tolist() == [False, True, False]
    assert int(status) == LABEL_OUTSIDE


def test_more_than_two_to_the_31_elements_with_no_second_tensor_of_that_size(kernels):
    rows, width = 32768, 152064
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    for part in logits.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator, device=CUDA) * 3)
    labels = torch.randint(0, width, (rows,), generator=generator, device=CUDA)
    picked = [0, 1, 2**31 // width, 2**31 // width + 1, 2**32 // width, rows - 1]
    full = logits[picked].double().cpu()
    c = draw_coefficients(torch.full((rows,), -12.0), 0)
    c = TokenCoefficients(**{name: vector.to(CUDA) for name, vector in c.vectors().items()})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case = Case(rows=rows, width=width)
    found = forward(kernels, [logits], labels, case, c)
    kernels.gradient_(logits, labels, found.state, vocab_start=0, vocab_size=width, temperature=1.0)
    assert torch.cuda.max_memory_allocated() - before < 200 * rows
    own = full.log_softmax(1).gather(1, labels[picked].cpu()[:, None])[:, 0]
    torch.testing.assert_close(found.logp[picked].cpu().double(), own, rtol=1e-6, atol=1e-5)
    derivative = expected_terms(found.logp.cpu(), TokenCoefficients(**{n: v.cpu() for n, v in c.vectors().items()}))[1]
    wanted = expected_gradient(
        full, labels[picked].cpu(), derivative[picked], dataclasses.replace(case, rows=len(picked))
    )
    gradient = logits[picked].double().cpu()
    assert float((gradient - wanted).norm() / wanted.norm()) < 4e-3


def everything(kernels, logits, labels, scores, cu_seqlens, case, coefficients):
    """All four kernels; the gradient ends in ``logits``."""
    options = {"vocab_start": 0, "vocab_size": case.columns, "temperature": case.temperature}
    statistics = kernels.row_statistics(logits, labels, **options)
    found = kernels.combine(statistics[None], coefficients, temperature=case.temperature)
    kernels.gradient_(logits, labels, found.state, **options)
    plus, minus = kernels.token_weights(scores, cu_seqlens, LossSettings(rescale="topk"))
    return found.logp, found.entropy, found.terms, found.state, plus, minus


@pytest.fixture
def inputs():
    case = Case(rows=600, width=19008)
    source = case.logits().bfloat16().to(CUDA)
    labels = case.labels().to(CUDA)
    coefficients = draw_coefficients(torch.full((600,), -9.0), 0)
    coefficients = TokenCoefficients(**{name: vector.to(CUDA) for name, vector in coefficients.vectors().items()})
    scores = torch.randn(600, generator=torch.Generator().manual_seed(0)).to(CUDA)
    return source, labels, scores, torch.tensor([0, 100, 600], device=CUDA), case, coefficients


def test_same_bits_every_time(kernels, inputs):
    wanted = None
    for _ in range(10):
        logits = inputs[0].clone()
        found = [*everything(kernels, logits, *inputs[1:]), logits]
        wanted = wanted or found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cuda_graph_gives_the_same_bits(kernels, inputs):
    logits = inputs[0].clone()
    wanted = [*everything(kernels, logits, *inputs[1:]), logits]
    torch.use_deterministic_algorithms(False)
    static = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.copy_(inputs[0])
        found = [*everything(kernels, static, *inputs[1:]), static]
    for _ in range(2):
        for tensor in found[:-1]:
            tensor.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_current_stream_is_used_and_the_host_does_not_wait(kernels, inputs):
    logits = inputs[0].clone()
    wanted = [*everything(kernels, logits, *inputs[1:]), logits]
    late = torch.zeros_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second, in which another stream would read zeros
            late.copy_(inputs[0])
            found = [*everything(kernels, late, *inputs[1:]), late]
            assert not stream.query()  # the queue is full and we are here
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_loss_on_a_gpu_is_the_loss_on_a_cpu(kernels):
    case = Case(rows=64, width=1000, dtype=torch.float32, temperature=0.9)
    full, labels, c = case.logits().float(), case.labels(), draw_coefficients(torch.full((64,), -6.0), 1)
    on_gpu = TokenCoefficients(**{name: vector.to(CUDA) for name, vector in c.vectors().items()})
    losses, gradients = [], []
    for device, coefficients in (("cpu", c), (CUDA, on_gpu)):
        leaf = full.to(device, copy=True).requires_grad_()
        loss = policy_loss(leaf * 1, labels.to(device), coefficients, vocab_size=1000, temperature=0.9)
        loss.total.backward()
        losses.append(loss)
        gradients.append(leaf.grad.cpu())
    torch.testing.assert_close(losses[0].total, losses[1].total.cpu(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    logp, _ = token_logprobs(full.to(CUDA), labels.to(CUDA), vocab_size=1000, temperature=0.9)
    torch.testing.assert_close(
        logp.cpu(), full.div(0.9).log_softmax(1).gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("announced", [1.0, None])
@pytest.mark.parametrize("one_gemm", [True, False], ids=["one_gemm_if_torch_can", "converted_blocks"])
def test_the_chunked_head_sums_the_weights_gradient_in_float32_main_grad(kernels, monkeypatch, announced, one_gemm):
    tokens, hidden_size, width, chunk = 300, 64, 1000, 64
    monkeypatch.setattr(chunked, "LEAST_TOKENS", 32)
    if not one_gemm:
        monkeypatch.setattr(chunked, "_gemm_adds_to_float32", lambda device, dtype: False)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=g).bfloat16().to(CUDA).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(width, hidden_size, generator=g) * 0.3).bfloat16().to(CUDA))
    weight.main_grad = torch.full(weight.shape, 0.25, device=CUDA)  # of earlier micro-batches
    labels = torch.randint(0, width - 10, (tokens,), generator=g).to(CUDA)
    drawn = draw_coefficients(torch.full((tokens,), -6.0), 0)
    c = TokenCoefficients(**{name: vector.to(CUDA) for name, vector in drawn.vectors().items()})
    vocabulary = Vocabulary(width - 10, 0.8)
    loss = linear_policy_loss(hidden, weight, labels, c, vocabulary, chunk_tokens=chunk, upstream=announced)
    loss.total.backward()

    slices = chunked.chunk_slices(tokens, chunk)
    assert len(slices) > 2
    wanted = torch.zeros(weight.shape, dtype=torch.float64, device=CUDA)
    total = torch.zeros((), dtype=torch.float64, device=CUDA)
    for rows in slices:  # the same GEMM's bf16 logits, the products of their gradient in float64
        logits = (hidden.detach()[rows] @ weight.detach().t()).requires_grad_()
        part = policy_loss(logits, labels[rows], c[rows], **vars(vocabulary)).total
        part.backward()
        total += part.detach()
        wanted += logits.grad.double().t() @ hidden.detach()[rows].double()
        of_hidden = logits.grad.double() @ weight.detach().double()
        assert (hidden.grad[rows].double() - of_hidden).norm() <= 4e-3 * of_hidden.norm()
    torch.testing.assert_close(loss.total.detach().double(), total, rtol=1e-5, atol=1e-5)
    assert (weight.main_grad.double() - 0.25 - wanted).norm() <= 3e-4 * wanted.norm()
    assert (wanted.bfloat16().double() - wanted).norm() > 1e-3 * wanted.norm()  # one rounding to bf16 would be seen
    assert not weight.grad.any()  # what DistributedDataParallel adds
