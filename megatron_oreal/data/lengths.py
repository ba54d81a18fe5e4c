"""How long responses are, for benchmarks and plans that draw none: log-normal, from recorded trajectories, or fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_oreal.data.trajectories import read_trajectories
from megatron_oreal.errors import UserError, nearest

DEFAULT_SIGMA = 0.8
DEFAULT_MEDIAN_SHARE = 3 / 14
"""Median over maximum: 3,000 of the 14,000 new tokens of OREAL's runs.

An assumption, not a measurement: with sigma 0.8 the mean is 1.3 medians and 2.7 % of the responses reach the limit.
Give ``file:`` with a run's own trajectories where there are any.
"""
FORMS = "lognormal:median=3000,sigma=0.8, fixed:512 or file:TRAJECTORIES.jsonl"


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Lengths of responses in tokens, from 1 to ``maximum``.

    ``values``: ascending, each as likely as the others; empty for a log-normal with ``median`` and ``sigma`` (of the
    logarithm). A longer draw is cut to ``maximum``, as generation cuts a response: that length has a share of its own,
    and median and sigma are those of the lengths before the cut.
    """

    maximum: int
    median: float = 0.0
    sigma: float = 0.0
    values: tuple[int, ...] = ()

    @classmethod
    def lognormal(cls, maximum: int, median: float, sigma: float = DEFAULT_SIGMA) -> LengthDistribution:
        """``median`` in tokens; ``sigma`` 0 makes all lengths equal."""
        return cls(int(_positive("maximum", maximum)), median=_positive("median", median), sigma=_not_negative(sigma))

    @classmethod
    def default(cls, maximum: int) -> LengthDistribution:
        """The log-normal of ``DEFAULT_MEDIAN_SHARE`` and ``DEFAULT_SIGMA`` for responses of up to ``maximum``."""
        return cls.lognormal(maximum, max(1.0, round(DEFAULT_MEDIAN_SHARE * maximum)))

    @classmethod
    def fixed(cls, length: int, maximum: int | None = None) -> LengthDistribution:
        """All responses of one length; ``UserError`` when that exceeds ``maximum``."""
        if maximum is not None and length > maximum:
            raise UserError(f"lengths: fixed:{length} exceeds the {maximum} new tokens that a response may have")
        return cls(maximum or length, values=(int(_positive("fixed length", length)),))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], maximum: int | None = None) -> LengthDistribution:
        """The empirical distribution of ``lengths`` (at least one, each 1 or more)."""
        assert len(lengths) and min(lengths) >= 1
        longest = maximum or max(lengths)
        return cls(longest, values=tuple(sorted(min(int(length), longest) for length in lengths)))

    @classmethod
    def from_trajectories(cls, file: str | Path, maximum: int | None = None) -> LengthDistribution:
        """Response lengths of a file that ``telemetry.save_trajectories`` wrote, without empty (aborted) responses.

        ``maximum``: default the longest in the file. Raises ``UserError`` for a file that is missing, malformed or
        without a response.
        """
        lengths = [len(trajectory.response_ids) for _, trajectory in read_trajectories(file)]
        lengths = [length for length in lengths if length]
        if not lengths:
            raise UserError(f"{file}: no response in it; give trajectories of a step that drew some")
        return cls.from_lengths(lengths, maximum)

    def quantile(self, share: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """The length int64 that a ``share`` in [0, 1) of the responses stays below or reaches; any shape."""
        shares = np.asarray(share, dtype=np.float64)
        assert np.all((shares >= 0) & (shares < 1))
        if self.values:
            return np.asarray(self.values, dtype=np.int64)[(shares * len(self.values)).astype(np.int64)]
        normal = NormalDist()
        z = np.array([normal.inv_cdf(max(float(each), 2.0**-60)) for each in shares.ravel()]).reshape(shares.shape)
        with np.errstate(over="ignore"):  # a draw too large for a float is cut as well
            lengths = np.ceil(self.median * np.exp(self.sigma * z) - 0.5)
        return np.clip(lengths, 1, self.maximum).astype(np.int64)

    def draw(self, count: int, seed: int) -> NDArray[np.int64]:
        """``count`` independent lengths, int64; the same for the same seed."""
        return self.quantile(np.random.default_rng(seed).random(count))

    def mean(self) -> float:
        """Mean length after the cut; of a log-normal over 10,000 equal shares (relative error below 0.1 %)."""
        if self.values:
            return float(np.mean(self.values))
        return float(self.quantile((np.arange(10_000) + 0.5) / 10_000).mean())

    def expected_longest(self, count: int) -> float:
        """Expected maximum of ``count`` independent responses, which ends a rollout: its quantile is uniform^(1/n)."""
        shares = (np.arange(1_000) + 0.5) / 1_000
        return float(self.quantile(np.minimum(shares ** (1 / count), 1 - 2.0**-53)).mean())

    def __str__(self) -> str:
        """As a command line gives it; a file's lengths by their number and median."""
        if not self.values:
            return f"lognormal:median={self.median:g},sigma={self.sigma:g}"
        if len(self.values) == 1:
            return f"fixed:{self.values[0]}"
        return f"{len(self.values)} recorded lengths, median {int(self.quantile(0.5))}"


def parse_lengths(text: str | None, maximum: int) -> LengthDistribution:
    """Read ``lognormal:median=3000,sigma=0.8`` (or either alone, or ``lognormal``), ``fixed:512``, ``file:PATH``.

    None is ``LengthDistribution.default``. ``maximum``: the most new tokens a response may have. ``UserError`` else.
    """
    if text is None:
        return LengthDistribution.default(maximum)
    kind, _, rest = text.partition(":")
    readers: dict[str, Callable[[str, int], LengthDistribution]] = {
        "lognormal": _parse_lognormal,
        "fixed": lambda length, most: LengthDistribution.fixed(int(_number(text, length, whole=True)), most),
        "file": LengthDistribution.from_trajectories,
    }
    if kind not in readers:
        raise UserError(f"lengths {text!r}: unknown distribution{nearest(kind, readers)}; write {FORMS}")
    return readers[kind](rest, maximum)


def _parse_lognormal(text: str, maximum: int) -> LengthDistribution:
    default = LengthDistribution.default(maximum)
    given = {"median": default.median, "sigma": default.sigma}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in given:
            raise UserError(f"lengths 'lognormal:{text}': unknown parameter {key!r}{nearest(key, given)}")
        given[key] = _number(f"lognormal:{text}", value)
    return LengthDistribution.lognormal(maximum, **given)


def _number(text: str, value: str, *, whole: bool = False) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"lengths {text!r}: {value!r} is not {kind}; write {FORMS}") from None


def _positive(name: str, value: float) -> float:
    if not 1 <= value < float("inf"):
        raise UserError(f"lengths: {name}={value:g} must be 1 or more")
    return value


def _not_negative(sigma: float) -> float:
    if not 0 <= sigma <= 10:
        raise UserError(f"lengths: sigma={sigma:g} must lie between 0 and 10")
    return sigma
