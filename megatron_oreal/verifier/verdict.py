"""The outcome of verifying one response: three-valued, always with a reason."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    """``UNKNOWN`` never becomes ``WRONG``: nothing is learned from it (algorithm.md, "One step" 2)."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, why it was given (a short phrase such as ``"truncated"``) and the answer that was read."""

    verdict: Verdict
    reason: str
    answer: str | None = None
