"""The policy's loss as a function of one token's log-probability, in closed form with its derivative.

Everything that is constant for autograd (factor, advantage or 1 − p, token weight, 1/normaliser) is folded into three
coefficients a token (``folding.py``), so the vocab-parallel op knows nothing of sequences, rewards or modes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.settings import KlType

NegativeForm = Literal["ratio", "log_ratio"]


@dataclass(frozen=True)
class TokenCoefficients:
    """loss_t = −positive·logp + negative·f(logp − old) + kl·k(kl_anchor − logp); all vectors float [N], constants.

    ``negative_form``: ``ratio``, f(x) = e^x (mode ``released``), or ``log_ratio``, f(x) = x (mode ``paper``).
    ``kl_type``: k1, k2 or k3 (algorithm.md, "Losses"). ``old``, ``kl_anchor``: None means logp itself, detached.
    A term whose coefficient is 0 has value and derivative exactly 0, whatever its log-probabilities are.
    ``weights``: (ω⁺, ω⁻) float32 [N] that are in the coefficients, for reports; None: no reward model.
    """

    positive: Tensor
    negative: Tensor
    kl: Tensor
    old: Tensor | None = None
    kl_anchor: Tensor | None = None
    negative_form: NegativeForm = "ratio"
    kl_type: KlType = "k3"
    weights: tuple[Tensor, Tensor] | None = None

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

    def is_nonzero(self) -> Tensor:
        """Bool [N]: tokens with a coefficient that is not 0 (NaN is not)."""
        return (self.positive != 0) | (self.negative != 0) | (self.kl != 0)

    def __getitem__(self, tokens: slice | Tensor) -> TokenCoefficients:
        """Select tokens, for a micro-batch; the coefficients are already divided by the global normalisers."""
        selected: dict[str, Any] = {name: vector[tokens] for name, vector in self.vectors().items()}
        weights = None if self.weights is None else (self.weights[0][tokens], self.weights[1][tokens])
        return replace(self, **selected, weights=weights)


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
