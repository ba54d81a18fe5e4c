"""How sure a pass rate is: 95 % intervals for single answers and for several samples of the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """Both ends, in [0, 1]."""

    low: float
    high: float


def wilson_interval(successes: float, n: float, z: float = Z_95) -> Interval:
    """Wilson's score interval (JASA 1927) of a proportion, for ``n`` independent answers.

    ``z``: normal quantile, 1.96 for 95 %. Fractional counts are allowed (effective sample sizes). ``n == 0`` gives
    [0, 1]. Raises ``ValueError`` unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n: got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and 1 the ends are exact; the formula misses them by a rounding error.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return Interval(low, high)


def pass_at_1(correct: Sequence[Sequence[bool]] | np.ndarray) -> float:
    """Return the mean over problems of the share of correct samples; NaN without a sample. ``correct`` as below."""
    rates, _ = _problem_rates(correct)
    return float(rates.mean()) if len(rates) else math.nan


def grouped_interval(correct: Sequence[Sequence[bool]] | np.ndarray, z: float = Z_95) -> Interval:
    """Interval of ``pass_at_1`` for several samples of each problem, which are not independent answers.

    ``correct[problem][sample]``: booleans, the samples of a problem may differ in number, and a problem without samples
    is left out. The interval speaks about new problems of the same kind: its unit is the problem, so ten times the
    samples of the same problems do not make it narrower than the problems allow.

    Method: with n problems, mean p and variance v of the problems' pass rates, the effective sample size is
    m = n p(1-p)/v, at most the number of samples; then Wilson's interval for m answers with Student's quantile for
    n - 1 degrees of freedom (Korn and Graubard, Survey Methodology 1998; Dean and Pagano, 2015). p and v for m are
    taken with one solved and one unsolved problem added, so that m exists when all problems are solved (or none),
    where it becomes n (n+1)/(n+2). Fewer than two problems give [0, 1]. No random numbers: same data, same interval.
    """
    rates, samples = _problem_rates(correct)
    n = len(rates)
    if n < 2:
        return Interval(0.0, 1.0)
    padded = np.concatenate([rates, [0.0, 1.0]])
    p = float(padded.mean())
    effective = min(n * p * (1 - p) / float(padded.var(ddof=1)), float(samples))
    return wilson_interval(float(rates.mean()) * effective, effective, _student_quantile(z, n - 1))


def _problem_rates(correct: Sequence[Sequence[bool]] | np.ndarray) -> tuple[np.ndarray, int]:
    """Pass rate of each problem that has samples, float64 [n]; number of samples."""
    known = [np.asarray(samples, dtype=np.float64) for samples in correct if len(samples)]
    return np.array([samples.mean() for samples in known]), sum(samples.size for samples in known)


def _student_quantile(z: float, dof: int) -> float:
    """Student's quantile from the normal one (Abramowitz and Stegun 26.7.5): within 1 % at 95 % from two dof on."""
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / dof**power for power, term in enumerate(terms))
