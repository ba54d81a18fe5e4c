"""What the judge had to do for a step, and what its failures are called; imports no aiohttp."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

DEADLINE, UNREACHABLE, REFUSED, REPLY, VOTES = (
    "judge deadline",
    "judge unreachable",
    "judge refused",
    "judge reply",
    "judge votes",
)
CAUSES = (DEADLINE, UNREACHABLE, REFUSED, REPLY, VOTES)
"""What a reason of the judge's unknown verdicts begins with."""


@dataclass(slots=True)
class JudgeStats:
    """Counts since they were last taken. ``requests``: chat completions sent; ``latencies``: seconds of those answered.

    ``shared``: responses that took the verdict of an equal case in flight. ``withheld``: answers that speak to the
    judge and were not sent. ``unknown``: by cause.
    """

    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    shared: int = 0
    withheld: int = 0
    latencies: list[float] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    @classmethod
    def total(cls, parts: Iterable[JudgeStats]) -> JudgeStats:
        """Sum over ranks, in time linear in them."""
        whole = cls()
        for part in parts:
            for name in ("requests", "retries", "cache_hits", "shared", "withheld"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.latencies += part.latencies
            whole.unknown.update(part.unknown)
        return whole

    def __add__(self, other: JudgeStats) -> JudgeStats:
        """Sum of two ranks."""
        return JudgeStats.total([self, other])


class StatsBox:
    """Counts written by one thread and taken by another."""

    def __init__(self) -> None:
        self._stats, self._lock = JudgeStats(), threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Raise a count."""
        with self._lock:
            setattr(self._stats, name, getattr(self._stats, name) + count)

    def latency(self, seconds: float) -> None:
        """Note an answered request."""
        with self._lock:
            self._stats.latencies.append(seconds)

    def unknown(self, cause: str) -> None:
        """Count an unknown verdict."""
        with self._lock:
            self._stats.unknown[cause] += 1

    def take(self) -> JudgeStats:
        """Return the counts and start again at zero."""
        with self._lock:
            taken, self._stats = self._stats, JudgeStats()
        return taken
