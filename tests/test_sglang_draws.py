"""The sampler that runs inside SGLang's workers against the embedded engine's, which it must repeat token for token."""

import numpy as np
import pytest
import torch

from megatron_oreal.rollout.engine import SamplingParams
from megatron_oreal.rollout.sampling import random_streams, sample, uniforms
from megatron_oreal.rollout.sglang.draws import draw, signed_seed, uniforms_of


def test_random_numbers_are_those_of_the_embedded_engine_for_any_seed_and_position():
    seeds = [
        0,
        1,
        -1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64 + 5,
        *np.random.default_rng(0).integers(0, 2**62, 200).tolist(),
    ]
    positions = np.arange(len(seeds)) * 977
    got = uniforms_of(torch.tensor([signed_seed(seed) for seed in seeds]), torch.from_numpy(positions))
    np.testing.assert_array_equal(got.numpy(), uniforms(random_streams(seeds), positions))


@pytest.mark.parametrize("vocabulary", [37, 6000])
def test_rows_with_filters_of_their_own_draw_as_if_each_were_alone(vocabulary):
    generator = torch.Generator().manual_seed(0)
    filters = [(1.0, 0), (0.9, 0), (1.0, 5), (0.6, 12), (1.0, 1), (0.3, 1), (1e-6, 0), (0.999, vocabulary)] * 16
    logits = 3 * torch.randn(len(filters), vocabulary, generator=generator)
    draws = torch.rand(len(filters), generator=generator)
    top_ps = torch.tensor([top_p for top_p, _ in filters])
    top_ks = torch.tensor([top_k or 1 << 30 for _, top_k in filters], dtype=torch.int32)
    tokens, kept = draw(torch.log_softmax(logits, -1), draws, top_ks, top_ps)
    for row, (top_p, top_k) in enumerate(filters):
        params = SamplingParams(1.0, top_p, top_k, max_new_tokens=1, max_length=2, stop_token_id=None)
        alone = sample(logits[row : row + 1], draws[row : row + 1], params)
        assert tokens[row] == alone.tokens[0]
        if alone.kept_mass is not None and top_k < vocabulary:
            assert kept[row] == pytest.approx(alone.kept_mass.item(), abs=1e-6)


def test_without_filters_the_whole_mass_is_kept():
    logp = torch.log_softmax(torch.randn(4, 50, generator=torch.Generator().manual_seed(1)), -1)
    tokens, kept = draw(logp, torch.tensor([0.0, 0.3, 0.7, 1 - 2.0**-24]), None, None)
    assert tokens[0] == 0
    assert tokens[3] == 49
    np.testing.assert_allclose(kept.numpy(), 1.0, atol=1e-6)
