"""The sampler against NumPy in float64, and its random numbers against the published generator."""

import numpy as np
import pytest
import torch

from megatron_oreal.rollout import sampling
from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.rollout.sampling import random_streams, sample, uniforms


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_new_tokens=1, max_length=2, stop_token_id=None)


def reference_distribution(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Unnormalised float64 [vocabulary]: softmax with excluded tokens at zero, one row and one loop at a time."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    ranked = sorted(range(len(probs)), key=lambda i: -probs[i])[: top_k or len(probs)]
    share, kept = 0.0, []
    for token in ranked:
        kept.append(token)
        share += probs[token] / probs[ranked].sum()
        if share >= top_p:
            break
    filtered = np.zeros_like(probs)
    filtered[kept] = probs[kept]
    return filtered


def test_uniforms_are_splitmix64():
    # First outputs of SplitMix64 from state 0, as published with its reference implementation.
    outputs = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    got = uniforms(np.zeros(3, dtype=np.uint64), np.arange(3))
    np.testing.assert_array_equal(got, (outputs >> np.uint64(40)).astype(np.float64) / 2**24)


def test_uniforms_of_neighbouring_seeds_and_positions_are_uniform_and_uncorrelated():
    seeds, positions = 256, 256
    streams = np.repeat(random_streams(range(seeds)), positions)
    grid = uniforms(streams, np.tile(np.arange(positions), seeds)).reshape(seeds, positions).astype(np.float64)
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    expected = grid.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * np.sqrt(2 * 63)
    centred = grid - 0.5
    for neighbour in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[1:, 1:] * centred[:-1, :-1],
    ):
        assert abs(neighbour.mean() * 12) < 4 / np.sqrt(neighbour.size)


def test_any_integer_is_a_seed():
    streams = random_streams([0, 2**64, -1, 2**64 - 1, 1])
    assert streams[0] == streams[1]
    assert streams[2] == streams[3]
    assert len(set(streams.tolist())) == 3


@pytest.mark.parametrize("vocabulary", [40, 6000])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 0.9, 0), (1.3, 1.0, 7), (1.0, 0.5, 12), (1.0, 1e-6, 0), (1.0, 1.0, 1), (2.0, 0.99, 10_000)],
)
def test_each_draw_inverts_the_cdf_of_the_filtered_distribution(vocabulary, temperature, top_p, top_k):
    logits = np.random.default_rng(vocabulary).normal(scale=3.0, size=vocabulary).astype(np.float32)
    draws = ((np.arange(512) + 0.5) / 512).astype(np.float32)
    got = sample(
        torch.from_numpy(logits).expand(512, -1).contiguous(),
        torch.from_numpy(draws),
        params(temperature, top_p, top_k),
    )
    filtered = reference_distribution(logits, temperature, top_p, top_k)
    cdf = np.cumsum(filtered) / filtered.sum()
    tokens = got.tokens.numpy()
    assert (filtered[tokens] > 0).all()
    # The draw lies between the borders of its token, which float32 sums place within 1e-5.
    assert (draws <= cdf[tokens] + 1e-5).all()
    assert (draws >= cdf[tokens] - (filtered / filtered.sum())[tokens] - 1e-5).all()
    full = reference_distribution(logits, temperature, 1.0, 0)
    np.testing.assert_allclose(got.logp.numpy(), np.log(full[tokens]), atol=1e-5)
    if top_p == 1 and top_k == 0:
        assert got.kept_mass is None
    else:
        np.testing.assert_allclose(got.kept_mass.numpy(), filtered.sum(), atol=1e-5)


def test_a_flat_large_vocabulary_falls_back_from_the_head_to_the_full_sort():
    vocabulary = 6000
    assert vocabulary > 4 * sampling._TOP_P_HEAD
    logits = torch.linspace(0, 0.1, vocabulary).expand(1024, -1).contiguous()
    draws = (torch.arange(1024) + 0.5) / 1024
    got = sample(logits, draws, params(top_p=0.8))
    filtered = reference_distribution(logits[0].numpy(), 1.0, 0.8, 0)
    assert np.count_nonzero(filtered) > sampling._TOP_P_HEAD
    border = np.flatnonzero(filtered)[0]
    assert border <= got.tokens.min() <= border + np.count_nonzero(filtered) // 1024 + 1
    np.testing.assert_allclose(got.kept_mass.numpy(), filtered.sum(), atol=1e-4)


def test_the_extreme_draws_stay_inside_the_support():
    logits = torch.full((2, 50), -torch.inf)
    logits[:, 10:20] = torch.randn(10, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, torch.tensor([0.0, 1 - 2.0**-24]), params()).tokens
    assert tokens.tolist() == [10, 19]


def test_greedy_takes_the_first_of_equal_tokens_and_ignores_filters():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    got = sample(logits, torch.tensor([0.99]), params(temperature=0.0, top_p=0.1, top_k=1))
    assert got.tokens.tolist() == [1]
    assert got.kept_mass is None
    assert got.logp.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item())
