"""From sequences, advantages and scores to the three coefficients of every token (algorithm.md, "Losses")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.coefficients import TokenCoefficients
from megatron_oreal.loss.library import kernels_for
from megatron_oreal.loss.segments import Segments, copied, host_lengths, packed_starts
from megatron_oreal.loss.settings import LossSettings
from megatron_oreal.loss.token_weights import token_weights


def make_coefficients(
    lengths: Sequence[int] | Tensor,
    rewards: Sequence[float] | Tensor,
    advantages: Sequence[float] | Tensor,
    settings: LossSettings,
    *,
    num_positive_tokens: int,
    num_negative_tokens: int,
    num_tokens: int,
    scores: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    ref_logp: Tensor | None = None,
    old_logp: Tensor | None = None,
    pass_rates: Sequence[float] | Tensor | None = None,
    device: torch.device | None = None,
) -> TokenCoefficients:
    """Fold algorithm.md's policy losses into coefficients for some sequences of the global batch.

    Args:
        lengths: response lengths of these sequences, each >= 1; their sum is N.
        rewards: +1 or -1, one a sequence.
        advantages: A_i, one a sequence; unused in ``paper`` mode.
        settings: mode, factors and KL form.
        num_positive_tokens: N⁺ of the whole global batch, not of these sequences.
        num_negative_tokens: N⁻, likewise.
        num_tokens: N of all kept sequences, likewise.
        scores: s_t [N] of the token reward model; with the compiled kernels weights and coefficients are one pass.
        weights: (ω⁺, ω⁻) of ``token_weights``, [N] each, where they are known already; neither: no reward model,
            weight 1.
        ref_logp: [N], the reference model's; needed unless ``kl_coef`` is 0 or ``kl_anchor`` is ``old``.
        old_logp: [N]; None: one update a rollout, old is logp detached.
        pass_rates: p_i, one a sequence; required in ``paper`` mode when there are negatives.
        device: where the result lives; default: that of the first tensor given, else the CPU.

    Returns:
        Coefficients in float32, their products formed in float64; ``weights`` when there is a reward model.

    Raises:
        UserError: for shapes that do not agree, a missing input, or a sequence of a kind whose global count is 0.

    """
    given = [v for v in (scores, weights[0] if weights else None, ref_logp, old_logp) if v is not None]
    device = device or (given[0].device if given else torch.device("cpu"))
    host = host_lengths(lengths, int(lengths.sum()) if isinstance(lengths, Tensor) else sum(lengths))
    sign, advantage = _per_sequence("rewards", rewards, host), _per_sequence("advantages", advantages, host)
    _check_batch(sign, num_positive_tokens, num_negative_tokens, num_tokens)
    _check_vectors(sum(host), settings, scores, weights, ref_logp)
    pass_rate = None if pass_rates is None else _per_sequence("pass_rates", pass_rates, host)
    positive = _positive_strength(sign, advantage, settings) * settings.positive_loss_factor
    negative = _negative_strength(sign, advantage, pass_rate, settings) * settings.negative_loss_factor
    strengths = torch.stack((positive / max(num_positive_tokens, 1), negative / max(num_negative_tokens, 1)), dim=1)
    kl = settings.kl_coef / max(num_tokens, 1)
    return TokenCoefficients(
        **_fold(host, copied(strengths, device), kl, scores, weights, settings),
        old=old_logp,
        kl_anchor=ref_logp if settings.kl_anchor == "reference" else old_logp,
        negative_form="ratio" if settings.mode == "released" else "log_ratio",
        kl_type=settings.kl_type,
    )


def _check_vectors(
    count: int,
    settings: LossSettings,
    scores: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    ref_logp: Tensor | None,
) -> None:
    if settings.kl_anchor == "reference" and settings.kl_coef > 0 and ref_logp is None and count:
        raise UserError("ref_logp is None; it is needed for kl_coef > 0 with kl_anchor 'reference'")
    for name, vectors in (("scores", (scores,)), ("weights", weights or ())):
        if any(vector is not None and vector.shape != (count,) for vector in vectors):
            raise UserError(f"{name} must be [{count}], one a token")


def _fold(
    lengths: list[int],
    strengths: Tensor,
    kl: float,
    scores: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    settings: LossSettings,
) -> dict[str, Any]:
    """Spread the sequences' strengths [S, 2] over their tokens and multiply the weights in."""
    device, count = strengths.device, sum(lengths)
    kernels = kernels_for(device) if scores is not None and scores.dtype != torch.float64 else None
    if kernels is not None and weights is None:
        starts = packed_starts(lengths, device)
        packed = kernels.token_coefficients(scores, starts, strengths, settings, num_tokens=count, kl=kl)
        return {
            "positive": packed.positive,
            "negative": packed.negative,
            "kl": packed.kl,
            "weights": (packed.positive_weight, packed.negative_weight),
        }
    if weights is None and scores is not None:
        weights = token_weights(scores, lengths, settings)
    per_token = list(strengths[Segments.of(lengths, count, device).ids].unbind(dim=1))
    if weights is not None:
        per_token = [value * weight.double() for value, weight in zip(per_token, weights, strict=True)]
    return {
        "positive": per_token[0].float(),
        "negative": per_token[1].float(),
        "kl": torch.full((count,), kl, dtype=torch.float32, device=device),
        "weights": weights,
    }


def _positive_strength(sign: Tensor, advantage: Tensor, settings: LossSettings) -> Tensor:
    """A_i of the positives, or 1 in ``paper`` mode and with ``pos_mult_adv: false``; 0 of the negatives."""
    strength = advantage if settings.mode == "released" and settings.pos_mult_adv else torch.ones_like(sign)
    return torch.where(sign > 0, strength, 0.0)


def _negative_strength(sign: Tensor, advantage: Tensor, pass_rate: Tensor | None, settings: LossSettings) -> Tensor:
    """−A_i of the negatives, or 1 − p_i in ``paper`` mode; 0 of the positives."""
    if settings.mode == "released":
        return torch.where(sign < 0, -advantage, 0.0)
    if pass_rate is None:
        if bool((sign < 0).any()):
            raise UserError("pass_rates is None; mode 'paper' needs one pass rate a sequence when there are negatives")
        return torch.zeros_like(sign)
    return torch.where(sign < 0, 1 - pass_rate, 0.0)


def _per_sequence(name: str, values: Sequence[float] | Tensor, lengths: list[int]) -> Tensor:
    """One float64 a sequence, on the host: S is small, and the checks below must not wait for a device."""
    vector = torch.as_tensor(values, dtype=torch.float64).cpu()
    if vector.shape != (len(lengths),):
        raise UserError(f"{name} has shape {list(vector.shape)}; it must be [{len(lengths)}], one a sequence")
    return vector


def _check_batch(sign: Tensor, num_positive_tokens: int, num_negative_tokens: int, num_tokens: int) -> None:
    if bool((sign.abs() != 1).any()):
        raise UserError(f"rewards are {sign.tolist()}; each must be +1 or -1")
    if bool((sign > 0).any()) and num_positive_tokens < 1:
        raise UserError("num_positive_tokens is 0 but there is a positive; pass the count of the global batch")
    if bool((sign < 0).any()) and num_negative_tokens < 1:
        raise UserError("num_negative_tokens is 0 but there is a negative; pass the count of the global batch")
    if len(sign) and num_tokens < 1:
        raise UserError("num_tokens is 0 but there are sequences; pass the count of the global batch")
