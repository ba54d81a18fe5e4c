"""Drawing tokens: temperature, top-k, top-p, and random numbers that depend on the request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.rollout.engine import EngineError, SamplingParams

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_TOP_P_HEAD = 1024


@dataclass(frozen=True, slots=True)
class Sampled:
    """Of n rows: ``tokens`` int64 [n]; ``logp`` and ``kept_mass`` float32 [n] as ``Completion`` defines them.

    ``kept_mass`` is None when no filter was on.
    """

    tokens: Tensor
    logp: Tensor
    kept_mass: Tensor | None


def check_sampling(params: SamplingParams) -> None:
    """Raise ``EngineError`` for values outside their domain."""
    valid = {
        "temperature": 0.0 <= params.temperature < float("inf"),
        "top_p": 0.0 < params.top_p <= 1.0,
        "top_k": params.top_k >= 0,
        "max_new_tokens": params.max_new_tokens >= 1,
        "max_length": params.max_length >= 2,
    }
    for name, fine in valid.items():
        if not fine:
            raise EngineError(f"sampling parameter {name}={getattr(params, name)} is out of range")


def random_streams(seeds: Sequence[int]) -> np.ndarray:
    """Return one random stream (uint64 [n]) per request seed; seeds are taken modulo 2^64."""
    return _mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))


def uniforms(streams: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the uniform number of each (stream, position), float32 [n], a multiple of 2^-24 in [0, 1).

    A counter, not a generator with state (SplitMix64: Steele, Lea, Flood, OOPSLA 2014): the draw of a token does not
    depend on what else is in the batch, on the slot, the order, the engine or the device.
    """
    counters = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA)
    return ((_mix(streams + counters) >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits: Tensor, draws: Tensor, params: SamplingParams) -> Sampled:
    """Draw one token for each row of ``logits`` (float32 [n, vocabulary]) with its number of ``draws`` (float32 [n]).

    Inverse CDF in vocabulary order: rounding noise in the logits moves the borders between tokens by as little, whereas
    in sorted order it could swap two nearly equal tokens.
    """
    greedy = params.temperature == 0
    scaled = logits if greedy or params.temperature == 1 else logits / params.temperature
    logp = torch.log_softmax(scaled, dim=-1)
    if greedy:
        tokens = logits.argmax(dim=-1, keepdim=True)
        return Sampled(tokens[:, 0], logp.gather(1, tokens)[:, 0], None)
    probs = logp.exp()
    filtered = params.top_k > 0 or params.top_p < 1
    if filtered:
        probs = _filter(probs, params.top_k, params.top_p)
    cdf = probs.cumsum(dim=-1)
    kept_mass = cdf[:, -1].contiguous()
    tokens = torch.searchsorted(cdf, (draws * kept_mass)[:, None], right=True).clamp_(max=logits.shape[-1] - 1)
    return Sampled(tokens[:, 0], logp.gather(1, tokens)[:, 0], kept_mass if filtered else None)


def _filter(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return ``probs`` with what top-k, then top-p, excludes set to zero; not renormalised.

    Top-p keeps the smallest set of most probable tokens whose share of what top-k kept reaches ``top_p``.
    """
    if 0 < top_k < probs.shape[-1]:
        values, ids = probs.topk(top_k, dim=-1)
    else:
        values, ids = _most_probable(probs, top_p)
    if top_p < 1:
        cdf = values.cumsum(dim=-1)
        target = cdf[:, -1:] * top_p if top_k > 0 else top_p
        values[:, 1:].masked_fill_(cdf[:, :-1] >= target, 0.0)
    return torch.zeros_like(probs).scatter_(1, ids, values)


def _most_probable(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Return at least so many of the most probable tokens, in falling order, that every row of them reaches ``mass``.

    A CPU sorts a large vocabulary slower than it runs a small model; the head nearly always suffices. On a GPU the look
    at the result would stall the stream for longer than the sort takes.
    """
    if probs.device.type == "cpu" and probs.shape[-1] > 4 * _TOP_P_HEAD:
        values, ids = probs.topk(_TOP_P_HEAD, dim=-1)
        if bool((values.sum(dim=-1) > mass).all()):
            return values, ids
    values, ids = probs.sort(dim=-1, descending=True, stable=True)
    return values, ids
