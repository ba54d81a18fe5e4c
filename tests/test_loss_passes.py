"""PyTorch's three passes by themselves: row chunks, shards, rows that are not read, and one rounding."""

import pytest
import torch
from loss_cases import draw_batch, leaf, plain

from megatron_oreal.loss import LossSettings, policy_loss, vocab_parallel


@pytest.mark.parametrize("chunk", [1, 48 * 3, 48 * 5 + 7, 1 << 22])
def test_the_result_does_not_depend_on_the_row_chunks(monkeypatch, chunk):
    batch = draw_batch(3)
    coefficients = batch.coefficients(LossSettings(), with_old=False)
    results = []
    for elements in (48, chunk):
        monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", elements)
        logits = leaf(batch.logits, torch.bfloat16)
        loss = policy_loss(logits, batch.labels, coefficients, vocab_size=48)
        loss.total.backward()
        results.append((loss.logp, loss.entropy, loss.total.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
    assert torch.equal(rows.state[:, 0], logits.amax(1))


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
    def rounded_first(logits, labels, state, *, temperature, grad_out, **_):
        maximum, sum_exp, derivative, _ = (column[:, None] for column in state.unbind(1))
        softmax = ((logits - maximum) / temperature).exp() / sum_exp
        logits.copy_(softmax * (-derivative * grad_out / temperature))
        logits[torch.arange(len(labels)), labels] += (derivative[:, 0] / temperature).to(logits.dtype)

    monkeypatch.setattr(vocab_parallel, "gradient_", rounded_first)
    assert label_entry_error() > 0.5


# --- rows that are not read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["run", "scattered", "none", "all"])
def test_inactive_rows_have_the_statistics_of_a_certain_token_and_keep_their_logits(active):
    n, width = 40, 16
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(n, width, generator=g), torch.randint(0, width, (n,), generator=g)
    mask = {
        "run": (torch.arange(n) >= 7) & (torch.arange(n) < 30),
        "scattered": torch.rand(n, generator=g) < 0.5,
        "none": torch.zeros(n, dtype=torch.bool),
        "all": torch.ones(n, dtype=torch.bool),
    }[active]
    arguments = {"vocab_start": 0, "vocab_size": width, "temperature": 1.0}
    everything = vocab_parallel.row_statistics(logits, labels, **arguments)
    poisoned = logits.masked_fill(~mask[:, None], torch.nan)
    found = vocab_parallel.row_statistics(poisoned, labels.where(mask, -100), **arguments, active=mask)
    assert torch.equal(found[mask], everything[mask])
    assert torch.equal(found[~mask], torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(int((~mask).sum()), 4))


def test_rows_of_zero_derivative_become_zero_and_leave_the_others_alone():
    n, width = 12, 10
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(n, width, generator=g), torch.randint(0, width, (n,), generator=g)
    state = vocab_parallel.combine(
        vocab_parallel.row_statistics(logits, labels, vocab_start=0, vocab_size=width, temperature=1.0)[None],
        plain(n, positive=2.0),
        temperature=1.0,
    ).state
    state[::3, 2] = 0.0
    logits[::3] = torch.nan
    vocab_parallel.gradient_(logits, labels, state, vocab_start=0, vocab_size=8, temperature=1.0)
    assert not logits[::3].any()
    assert not logits[:, 8:].any()
    assert torch.isfinite(logits).all()
    assert logits[1::3, :8].all()
