"""The oracle: algorithm.md, "Token weights" and "Losses", sequence by sequence in float64.

Written to be compared with the text, not to be fast; the production path (``token_weights.py``, ``coefficients.py``,
``policy_loss.py``) shares no formula with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.settings import KlType, LossSettings, Mode


@dataclass(frozen=True)
class OrealLoss:
    """Losses of one global batch, 0-d float64.

    ``total`` = ``positive`` + ``negative`` + ``kl``: these four are differentiable in logp alone, ``reward_model`` in
    the reward model's scores alone.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor
    kl: Tensor
    reward_model: Tensor


def oreal_loss_reference(
    logp: Tensor,
    ref_logp: Tensor,
    rm_scores: Tensor | None,
    lengths: Sequence[int],
    rewards: Sequence[float] | Tensor,
    advantages: Sequence[float] | Tensor,
    *,
    mode: Mode = "released",
    old_logp: Tensor | None = None,
    pass_rates: Sequence[float] | Tensor | None = None,
    **coefficients: Any,
) -> OrealLoss:
    """Compute every loss of a batch of kept sequences exactly as algorithm.md states it.

    Args:
        logp: float64 [N], log-probabilities of the response tokens, the kept sequences one after another.
        ref_logp: float64 [N], the same under the reference model; constant.
        rm_scores: float64 [N], the token reward model's scores s_t of the same tokens; None: no reward model (all
            weights 1, ``reward_model`` 0).
        lengths: response length of each sequence, all >= 1; their sum is N.
        rewards: +1 or -1 a sequence.
        advantages: A_i, one a sequence; unused in ``paper`` mode.
        mode: ``released`` or ``paper``.
        old_logp: float64 [N], constant; None: logp detached, one update a rollout. ``kl_anchor: old`` then has
            value and gradient 0 with k2 and k3; k1 = logp − old keeps its constant gradient ``kl_coef``/N.
        pass_rates: p_i in [0, 1], one a sequence; required in ``paper`` mode when there are negatives.
        **coefficients: the other keys of ``LossSettings``, with their defaults.

    Raises:
        UserError: for an unknown coefficient, a value out of range, or shapes that do not agree.

    """
    settings = LossSettings.of(mode=mode, **coefficients)
    _check_tokens(lengths, logp=logp, ref_logp=ref_logp, rm_scores=rm_scores, old_logp=old_logp)
    signs = _signs(rewards, len(lengths))
    advantage = _per_sequence("advantages", advantages, len(lengths))
    pass_rate = _pass_rates(pass_rates, signs, mode)

    logp = logp.double()
    old = logp.detach() if old_logp is None else old_logp.detach().double()
    anchor = ref_logp.detach().double() if settings.kl_anchor == "reference" else old
    num_positive = sum(n for n, sign in zip(lengths, signs, strict=True) if sign > 0)  # N⁺
    num_negative = sum(n for n, sign in zip(lengths, signs, strict=True) if sign < 0)  # N⁻

    positive = negative = kl = logp[:0].sum()  # 0 for an empty set, and backward() still works
    start = 0
    for i, n in enumerate(lengths):
        y = slice(start, start + n)  # the tokens of sequence i
        start += n
        scores = None if rm_scores is None else rm_scores[y].double()
        if signs[i] > 0:
            term = _positive_sum(logp[y], scores, advantage[i], settings)
            positive = positive + settings.positive_loss_factor / num_positive * term
        else:
            term = _negative_sum(logp[y], old[y], scores, advantage[i], pass_rate[i], settings)
            negative = negative + settings.negative_loss_factor / num_negative * term
        kl = kl + settings.kl_coef / sum(lengths) * _kl_estimate(anchor[y] - logp[y], settings.kl_type).sum()
    reward_model = logp.new_zeros(()) if rm_scores is None else _reward_model(rm_scores.double(), lengths, signs)
    return OrealLoss(positive + negative + kl, positive, negative, kl, reward_model)


def _positive_sum(logp: Tensor, scores: Tensor | None, advantage: float, settings: LossSettings) -> Tensor:
    """Return A Σ_t ω⁺_t (−logp_t) of one positive; no A in ``paper`` mode or with ``pos_mult_adv: false``."""
    weight = torch.ones_like(logp) if scores is None else _positive_weights(scores.detach(), settings)
    total = (weight * -logp).sum()
    return advantage * total if settings.mode == "released" and settings.pos_mult_adv else total


def _negative_sum(
    logp: Tensor, old: Tensor, scores: Tensor | None, advantage: float, pass_rate: float, settings: LossSettings
) -> Tensor:
    """Return −A Σ_t ω⁻_t exp(logp_t − old_t) of one negative; ``paper``: (1 − p) Σ_t ω⁻_t (logp_t − old_t)."""
    weight = torch.ones_like(logp) if scores is None else _negative_weights(scores.detach(), settings)
    if settings.mode == "released":
        return -advantage * (weight * (logp - old).exp()).sum()
    return (1 - pass_rate) * (weight * (logp - old)).sum()


def _kl_estimate(delta: Tensor, kl_type: KlType) -> Tensor:
    """k(δ), δ = anchor − logp."""
    if kl_type == "k3":
        return delta.exp() - delta - 1
    return delta**2 / 2 if kl_type == "k2" else -delta


def _reward_model(scores: Tensor, lengths: Sequence[int], signs: list[float]) -> Tensor:
    """Mean over the sequences of BCE(σ(x), 1[R = +1]), x the mean score of a sequence."""
    total = scores[:0].sum()
    for sign, part in zip(signs, scores.split(list(lengths)), strict=True):
        # −log σ(x) for a positive, −log(1 − σ(x)) = −log σ(−x) for a negative
        total = total - F.logsigmoid(sign * part.mean()) / len(lengths)
    return total


def _qualities(scores: Tensor, mode: Mode) -> Tensor:
    """q_t of one sequence: σ of the running mean c_t in ``released`` mode, σ(s_t) in ``paper`` mode."""
    if mode == "paper":
        return scores.sigmoid()
    mean, means = 0.0, []
    for t, score in enumerate(scores.tolist(), start=1):
        mean += (score - mean) / t  # (s_1 + … + s_t)/t, exact when all scores are equal
        means.append(mean)
    return scores.new_tensor(means).sigmoid()


def _positive_weights(scores: Tensor, settings: LossSettings) -> Tensor:
    """ω⁺ of one sequence."""
    q = _qualities(scores, settings.mode)
    if settings.rescale == "topk":
        return _top_scaled(q, settings.correct_topk_ratio)
    return ((q - settings.correct_threshold) / (1 - settings.correct_threshold)).clamp(0, 1)


def _negative_weights(scores: Tensor, settings: LossSettings) -> Tensor:
    """ω⁻ of one sequence."""
    q = _qualities(scores, settings.mode)
    if settings.rescale == "topk":
        return _top_scaled(1 - q, settings.incorrect_topk_ratio)
    return ((1 - q - settings.incorrect_threshold) / (1 - settings.incorrect_threshold)).clamp(0, 1)


def _top_scaled(values: Tensor, ratio: float) -> Tensor:
    """``rescale: topk``: the top ⌊ratio·n⌋ values min-max scaled to [0, 1], all 1 when they are equal; the rest 0.

    Of equal values the earlier token comes first. It shows only when all chosen values are equal: otherwise a tie at
    the cut is the chosen ones' minimum, which is scaled to 0 like the ones left out.
    """
    weights = torch.zeros_like(values)
    chosen = sorted(range(len(values)), key=lambda t: (-float(values[t]), t))[: math.floor(ratio * len(values))]
    if chosen:
        low, high = values[chosen].min(), values[chosen].max()
        weights[chosen] = 1.0 if high == low else (values[chosen] - low) / (high - low)
    return weights


def _check_tokens(lengths: Sequence[int], **vectors: Tensor | None) -> None:
    if any(n < 1 for n in lengths):
        raise UserError(f"lengths are {list(lengths)}; every response has at least one token")
    for name, vector in vectors.items():
        if vector is not None and (vector.dim() != 1 or len(vector) != sum(lengths)):
            raise UserError(f"{name} has shape {list(vector.shape)}; it must be [{sum(lengths)}], the sum of lengths")


def _per_sequence(name: str, values: Sequence[float] | Tensor, count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise UserError(f"{name} has {len(numbers)} values for {count} sequences; give one a sequence")
    return numbers


def _signs(rewards: Sequence[float] | Tensor, count: int) -> list[float]:
    signs = _per_sequence("rewards", rewards, count)
    if any(sign not in (1.0, -1.0) for sign in signs):
        raise UserError(f"rewards are {signs}; each must be +1 or -1")
    return signs


def _pass_rates(pass_rates: Sequence[float] | Tensor | None, signs: list[float], mode: Mode) -> list[float]:
    if pass_rates is not None:
        return _per_sequence("pass_rates", pass_rates, len(signs))
    if mode == "paper" and -1.0 in signs:
        raise UserError("pass_rates is None; mode 'paper' needs one pass rate a sequence when there are negatives")
    return [0.0] * len(signs)
