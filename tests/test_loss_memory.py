"""Peak memory of the loss: bytes of live tensors, measured operation by operation (``live_bytes.py``)."""

import pytest
import torch
from live_bytes import LiveBytes
from loss_cases import plain

from megatron_oreal.loss import policy_loss, token_logprobs, vocab_parallel

ROWS, WIDTH = 512, 2048
VECTORS = 40 * ROWS * 8
"""Bytes that the [N] vectors of one pass may take: forty of them in float64."""


@pytest.fixture
def chunk_bytes(monkeypatch):
    """A row chunk of 1/64 of the logits' elements, in float32."""
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", ROWS * WIDTH // 64)
    return ROWS * WIDTH // 64 * 4


def case(dtype):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, WIDTH, generator=g).to(dtype).requires_grad_()
    return logits, torch.randint(0, WIDTH, (ROWS,), generator=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_backward_need_three_row_chunks_beside_the_logits(chunk_bytes, dtype, masked):
    logits, labels = case(dtype)
    active = torch.arange(ROWS) % 3 != 0 if masked else None  # not contiguous: rows are gathered
    with LiveBytes() as watched:
        total = policy_loss(logits, labels, plain(ROWS, positive=1.0, kl=0.1), vocab_size=WIDTH, active=active).total
        forward_count = watched.count
        total.backward()
    assert watched.count > forward_count + 10  # the backward was watched too
    assert 2 * chunk_bytes <= watched.peak <= 3 * chunk_bytes + VECTORS
    assert watched.peak < 0.15 * ROWS * WIDTH * logits.element_size()
    assert logits.grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_logprob_pass_needs_three_row_chunks(chunk_bytes, dtype):
    logits, labels = case(dtype)
    with LiveBytes() as watched:
        token_logprobs(logits.detach(), labels, vocab_size=WIDTH)
    assert 2 * chunk_bytes <= watched.peak <= 3 * chunk_bytes + VECTORS


def test_the_counter_sees_what_the_usual_way_takes():
    logits, labels = case(torch.bfloat16)
    with LiveBytes() as watched:
        (-logits.float().log_softmax(-1).gather(1, labels[:, None])).sum().backward()
    assert 12 * logits.numel() <= watched.peak <= 20 * logits.numel()  # float32 logits, log-softmax, gradient, ...
    assert watched.live <= logits.numel() * 2 + 1024  # only the gradient is left


def test_the_default_chunks_are_small_against_production_logits():
    logits_bytes = 32768 * 19008 * 2  # N = 32768, 152064 columns over TP 8, bf16
    assert 3 * max(vocab_parallel.CHUNK_ELEMENTS.values()) * 4 < 0.05 * logits_bytes
