"""A step's statistics over all ranks: sums by name, and how far the engine's log-probabilities are from the trainer's.

No rank sees another's tokens: mean and maximum are combined from one number a rank, and the percentile is selected by
counting, in three sums over the world of 4,096 integers, whatever the number of tokens or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from megatron_oreal.platform import Platform

if TYPE_CHECKING:
    from megatron_oreal.actor.parallel import ParallelGrid

_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the three digits of 32 bits, the highest first."""


@dataclass(frozen=True, slots=True)
class LogpGap:
    """|trainer - engine| of the log-probabilities of ``count`` tokens, in nats; ``p999``: the 99.9th percentile."""

    count: int
    mean: float
    p999: float
    max: float


@dataclass(frozen=True)
class StepSums:
    """Sums over the global batch by name; ``logp_gap`` None: no engine has drawn it."""

    values: dict[str, float]
    logp_gap: LogpGap | None


@dataclass
class TokenSums:
    """What one rank adds to the step's statistics; summed over the ranks that speak (``ParallelGrid.speaks``).

    Values stay on the device until ``over_world``: adding one must not make the host wait in the middle of a pipeline.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    logps: list[tuple[Tensor, np.ndarray]] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        """Add a 0-d tensor to a sum."""
        self.values[name] = self.values[name] + value.detach() if name in self.values else value.detach()

    def compare(self, logp: Tensor, engine_logp: np.ndarray) -> None:
        """Keep the trainer's and the engine's log-probabilities of the same tokens, both [n]."""
        self.logps.append((logp, engine_logp))

    def over_world(self, grid: ParallelGrid, platform: Platform) -> StepSums:
        """The sums over all data-parallel replicas, the same on every rank (added in rank order)."""
        mine: dict[str, float] = {}
        gaps = np.zeros(0, dtype=np.float32)
        if grid.speaks:
            mine = {name: float(value) for name, value in self.values.items()}
            gaps = np.concatenate([gaps, *(np.abs(logp.float().cpu().numpy() - engine) for logp, engine in self.logps)])
        part = (len(gaps), float(gaps.sum(dtype=np.float64)), float(gaps.max(initial=0.0)))
        total: dict[str, float] = {}
        parts = []
        for values, gap in platform.gather_objects((mine, part), "the statistics of all ranks"):
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value
            parts.append(gap)
        return StepSums(total, _gap(parts, gaps, platform))


def _gap(parts: list[tuple[int, float, float]], gaps: np.ndarray, platform: Platform) -> LogpGap | None:
    count = sum(n for n, _, _ in parts)
    if not count:
        return None
    mean = sum(total for _, total, _ in parts) / count
    if math.isnan(mean):
        return LogpGap(count, math.nan, math.nan, math.nan)
    p999 = quantile_over_ranks(gaps, 0.999, count, lambda counts: platform.sum_array(counts, "the percentile's counts"))
    return LogpGap(count, mean, p999, max(most for _, _, most in parts))


def quantile_over_ranks(
    values: np.ndarray, q: float, count: int, sum_array: Callable[[np.ndarray], np.ndarray]
) -> float:
    """The exact quantile ``q`` of all ranks' ``values`` together, ``count`` >= 1 of them, interpolated linearly.

    ``values``: this rank's, float32 [n], none negative and none NaN; their bits are then ordered as they are. A radix
    selection: every rank counts how many of its values have which next digit, ``sum_array`` adds the counts of all.
    """
    position = q * (count - 1)
    places = [math.floor(position), math.ceil(position)]
    found = [0, 0]
    held = [values.astype(np.float32).view(np.uint32)] * 2
    for shift, width in _DIGITS:
        digits = [(each >> np.uint32(shift)) & np.uint32(2**width - 1) for each in held]
        counts = np.stack([np.bincount(each, minlength=2**width) for each in digits]).astype(np.int64)
        upto = sum_array(counts).cumsum(axis=1)
        for i in range(2):
            digit = int(np.searchsorted(upto[i], places[i], side="right"))
            places[i] -= int(upto[i, digit - 1]) if digit else 0
            found[i] = found[i] << width | digit
            held[i] = held[i][digits[i] == digit]
    low, high = np.array(found, dtype=np.uint32).view(np.float32).astype(np.float64)
    return float(low if low == high else low + (high - low) * (position - math.floor(position)))
