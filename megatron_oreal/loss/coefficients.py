"""The policy's loss as a function of one token's log-probability, in closed form with its derivative.

Everything that is constant for autograd (factor, advantage or 1 − p, token weight, 1/normaliser) is folded into three
coefficients a token, so the vocab-parallel op knows nothing of sequences, rewards or modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.segments import Segments
from megatron_oreal.loss.settings import KlType, LossSettings

NegativeForm = Literal["ratio", "log_ratio"]


@dataclass(frozen=True)
class TokenCoefficients:
    """loss_t = −positive·logp + negative·f(logp − old) + kl·k(kl_anchor − logp); all vectors float [N], constants.

    ``negative_form``: ``ratio``, f(x) = e^x (mode ``released``), or ``log_ratio``, f(x) = x (mode ``paper``).
    ``kl_type``: k1, k2 or k3 (algorithm.md, "Losses"). ``old``, ``kl_anchor``: None means logp itself, detached.
    A term whose coefficient is 0 has value and derivative exactly 0, whatever its log-probabilities are.
    """

    positive: Tensor
    negative: Tensor
    kl: Tensor
    old: Tensor | None = None
    kl_anchor: Tensor | None = None
    negative_form: NegativeForm = "ratio"
    kl_type: KlType = "k3"

    def __post_init__(self) -> None:
        for name, vector in self.vectors().items():
            if vector.dim() != 1 or len(vector) != len(self.positive):
                raise UserError(f"{name} has shape {list(vector.shape)}; it must be [{len(self.positive)}]")
        for name, choices in (("negative_form", get_args(NegativeForm)), ("kl_type", get_args(KlType))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def vectors(self) -> dict[str, Tensor]:
        """Return the [N] tensors that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, tokens: slice | Tensor) -> TokenCoefficients:
        """Select tokens, for a micro-batch; the coefficients are already divided by the global normalisers."""
        selected: dict[str, Any] = {name: vector[tokens] for name, vector in self.vectors().items()}
        return replace(self, **selected)


@dataclass(frozen=True)
class TokenTerms:
    """The three parts of loss_t and ``derivative`` = g_t = ∂loss_t/∂logp_t; float64 [N]."""

    positive: Tensor
    negative: Tensor
    kl: Tensor
    derivative: Tensor


def token_terms(logp: Tensor, coefficients: TokenCoefficients) -> TokenTerms:
    """Evaluate every token's loss and derivative in float64 from logp [N]; NaN spreads where a coefficient is not 0."""
    c = coefficients
    logp = logp.double()
    log_ratio = logp - (logp if c.old is None else c.old.double())
    value = log_ratio.exp() if c.negative_form == "ratio" else log_ratio
    slope = value if c.negative_form == "ratio" else torch.ones_like(logp)
    delta = (logp if c.kl_anchor is None else c.kl_anchor.double()) - logp
    if c.kl_type == "k3":
        kl_value, kl_slope = delta.expm1() - delta, -delta.expm1()
    elif c.kl_type == "k2":
        kl_value, kl_slope = delta.square() / 2, -delta
    else:
        kl_value, kl_slope = -delta, torch.ones_like(logp)
    return TokenTerms(
        _product(c.positive, -logp),
        _product(c.negative, value),
        _product(c.kl, kl_value),
        _product(c.negative, slope) + _product(c.kl, kl_slope) - c.positive,
    )


def _product(coefficient: Tensor, value: Tensor) -> Tensor:
    """Multiply, with 0·∞ = 0·NaN = 0."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def make_coefficients(
    lengths: Sequence[int] | Tensor,
    rewards: Sequence[float] | Tensor,
    advantages: Sequence[float] | Tensor,
    settings: LossSettings,
    *,
    num_positive_tokens: int,
    num_negative_tokens: int,
    num_tokens: int,
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
        weights: (ω⁺, ω⁻) of ``token_weights``, [N] each; None: no reward model, weight 1.
        ref_logp: [N], the reference model's; needed unless ``kl_coef`` is 0 or ``kl_anchor`` is ``old``.
        old_logp: [N]; None: one update a rollout, old is logp detached.
        pass_rates: p_i, one a sequence; required in ``paper`` mode when there are negatives.
        device: where the result lives; default: that of the first tensor given, else the CPU.

    Returns:
        Coefficients in float32; their products are formed in float64.

    Raises:
        UserError: for shapes that do not agree, a missing input, or a sequence of a kind whose global count is 0.

    """
    given = [vector for vector in (weights[0] if weights else None, ref_logp, old_logp) if vector is not None]
    device = device or (given[0].device if given else torch.device("cpu"))
    count = int(lengths.sum()) if isinstance(lengths, Tensor) else sum(lengths)
    segments = Segments.of(lengths, count, device)
    sign = _per_sequence("rewards", rewards, segments)
    advantage = _per_sequence("advantages", advantages, segments)
    _check_batch(sign, num_positive_tokens, num_negative_tokens, num_tokens)
    if settings.kl_anchor == "reference" and settings.kl_coef > 0 and ref_logp is None and count:
        raise UserError("ref_logp is None; it is needed for kl_coef > 0 with kl_anchor 'reference'")
    pass_rate = None if pass_rates is None else _per_sequence("pass_rates", pass_rates, segments)
    positive = _positive_strength(sign, advantage, settings) * settings.positive_loss_factor
    negative = _negative_strength(sign, advantage, pass_rate, settings) * settings.negative_loss_factor
    per_sequence = positive / max(num_positive_tokens, 1), negative / max(num_negative_tokens, 1)
    per_token = [value.to(device)[segments.ids] for value in per_sequence]
    if weights is not None:
        if any(weight.shape != (count,) for weight in weights):
            raise UserError(f"weights have shapes {[list(w.shape) for w in weights]}; each must be [{count}]")
        per_token = [value * weight.double() for value, weight in zip(per_token, weights, strict=True)]
    return TokenCoefficients(
        positive=per_token[0].float(),
        negative=per_token[1].float(),
        kl=torch.full_like(per_token[0], settings.kl_coef / max(num_tokens, 1), dtype=torch.float32),
        old=old_logp,
        kl_anchor=ref_logp if settings.kl_anchor == "reference" else old_logp,
        negative_form="ratio" if settings.mode == "released" else "log_ratio",
        kl_type=settings.kl_type,
    )


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


def _per_sequence(name: str, values: Sequence[float] | Tensor, segments: Segments) -> Tensor:
    """One float64 a sequence, on the host: S is small, and the checks below must not wait for a device."""
    vector = torch.as_tensor(values, dtype=torch.float64).cpu()
    if vector.shape != segments.lengths.shape:
        raise UserError(f"{name} has shape {list(vector.shape)}; it must be [{len(segments.lengths)}], one a sequence")
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
