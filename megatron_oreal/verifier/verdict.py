"""The outcome of verifying one response: three-valued, always with a reason."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal


class Verdict(enum.Enum):
    """``UNKNOWN`` never becomes ``WRONG``: nothing is learned from it (algorithm.md, "One step" 2)."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, why it was given (a short phrase such as ``"truncated"``) and the answer that was read.

    ``seconds`` is what checking took, without waiting in a queue; it does not count in comparisons.
    """

    verdict: Verdict
    reason: str
    answer: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def decided_by(self) -> Literal["rules", "judge"]:
        """Who spoke last: reasons of the judge begin with its name."""
        return "judge" if self.reason.startswith("judge") else "rules"

    @property
    def cause(self) -> str:
        """What stands before the first colon of the reason: the part that is the same for all of a kind."""
        return cause_of(self.reason)


def cause_of(reason: str) -> str:
    """Return the ``Judgement.cause`` that a reason names."""
    return reason.partition(": ")[0]
