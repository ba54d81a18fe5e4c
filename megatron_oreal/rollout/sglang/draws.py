"""The arithmetic of ``rollout/sampling.py`` for batches whose rows have seeds and filters of their own."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as a signed number: int64 multiplication wraps like uint64's
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def signed_seed(seed: int) -> int:
    """A request's seed modulo 2^64, as the int64 that travels."""
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed


def uniforms_of(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return ``sampling.uniforms(sampling.random_streams(seeds), positions)``: float32 [n] of int64 [n] and [n]."""
    counters = _mix(seeds) + (positions.to(torch.int64) + 1) * _GOLDEN_GAMMA
    return (_shift_right(_mix(counters), 40).double() * 2.0**-24).float()


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX[0]
    z = (z ^ _shift_right(z, 27)) * _MIX[1]
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift without the sign, which int64's own shift would copy."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(logp: Tensor, draws: Tensor, top_ks: Tensor | None, top_ps: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one token of each row; return (tokens int64 [n], kept mass float32 [n]).

    ``logp`` float32 [n, vocabulary]; ``draws`` float32 [n] in [0, 1); ``top_ks`` int [n], switched off where it is the
    vocabulary's size or more; ``top_ps`` float [n], off where 1. Both None: no row has a filter.
    """
    probs = logp.exp()
    if top_ks is not None and top_ps is not None:
        probs = _filtered(probs, top_ks, top_ps)
    cdf = probs.cumsum(dim=-1)
    kept = cdf[:, -1].contiguous()
    tokens = torch.searchsorted(cdf, (draws * kept)[:, None], right=True).clamp_(max=probs.shape[-1] - 1)[:, 0]
    return tokens, kept


def _filtered(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Set what top-k, then top-p, excludes to zero; the share of top-p is of what top-k kept."""
    values, ids = probs.sort(dim=-1, descending=True, stable=True)
    vocabulary = probs.shape[-1]
    ranks = torch.arange(vocabulary, device=probs.device)
    has_k = top_ks < vocabulary
    values = values.masked_fill((ranks >= top_ks[:, None]) & has_k[:, None], 0.0)
    before = values.cumsum(dim=-1)
    target = torch.where(has_k, before[:, -1] * top_ps, top_ps)
    excluded = (before[:, :-1] >= target[:, None]) & (top_ps < 1)[:, None]
    values[:, 1:] = values[:, 1:].masked_fill(excluded, 0.0)
    return torch.zeros_like(probs).scatter_(1, ids, values)
