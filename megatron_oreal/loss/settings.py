"""The coefficients of the losses: names, defaults and ranges (algorithm.md, "Token weights" and "Losses")."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from megatron_oreal.errors import UserError, nearest

Mode = Literal["released", "paper"]
KlType = Literal["k1", "k2", "k3"]
KlAnchor = Literal["reference", "old"]
Rescale = Literal["threshold", "topk"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the loss room needs from the ``algorithm`` section of the config; immutable and checked.

    Raises ``UserError`` for a value outside its range: the factors and ``kl_coef`` are >= 0, the thresholds lie in
    [0, 1), the ratios in [0, 1].
    """

    mode: Mode = "released"
    positive_loss_factor: float = 1.0
    negative_loss_factor: float = 0.5
    pos_mult_adv: bool = True
    kl_coef: float = 0.01
    kl_type: KlType = "k3"
    kl_anchor: KlAnchor = "reference"
    rescale: Rescale = "threshold"
    correct_threshold: float = 0.5
    incorrect_threshold: float = 0.5
    correct_topk_ratio: float = 0.5
    incorrect_topk_ratio: float = 0.5

    def __post_init__(self) -> None:
        for key, choices in (("mode", Mode), ("kl_type", KlType), ("kl_anchor", KlAnchor), ("rescale", Rescale)):
            self._require(key, getattr(self, key) in get_args(choices), f"one of {', '.join(get_args(choices))}")
        for key in ("positive_loss_factor", "negative_loss_factor", "kl_coef"):
            self._require(key, getattr(self, key) >= 0, ">= 0")
        for key in ("correct_threshold", "incorrect_threshold"):
            self._require(key, 0 <= getattr(self, key) < 1, "in [0, 1)")
        for key in ("correct_topk_ratio", "incorrect_topk_ratio"):
            self._require(key, 0 <= getattr(self, key) <= 1, "in [0, 1]")

    def _require(self, key: str, holds: bool, condition: str) -> None:
        if not holds:
            raise UserError(f"{key} is {getattr(self, key)!r}; it must be {condition}")

    @classmethod
    def of(cls, **values: Any) -> LossSettings:
        """Build from keywords; raises ``UserError`` with the nearest valid name for an unknown one."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"unknown loss coefficient '{key}'{nearest(key, names)}")
        return cls(**values)

    @classmethod
    def from_config(cls, algorithm: object) -> LossSettings:
        """Take the keys of the same names from the config's ``algorithm`` section."""
        return cls(**{field.name: getattr(algorithm, field.name) for field in fields(cls)})
