"""Which request goes to which engine next: pure bookkeeping, without clocks, sockets or threads.

Invariants, each asserted by a test of its name:

* every request is at any time in one place: waiting, in flight on one engine, or finished; it finishes once;
* an engine never has more than ``window`` requests in flight, and gets none while it is out of rotation;
* work conserving: while an engine has room and a request may go to it, ``next`` gives it one;
* among engines with room the one with the fewest outstanding tokens is served first;
* the samples of a prompt stay together: a chunk of them (all, unless there are fewer prompts than engines) goes to one
  engine, whose prefix cache then runs the prompt once, until another engine would stand idle;
* a failed request goes to another engine while there is one, and at most ``max_attempts`` times in all.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Assignment:
    """Send request ``index`` to ``engine``; ``attempt`` counts from 1."""

    index: int
    engine: int
    attempt: int


@dataclass(slots=True)
class _Engine:
    inside: bool = True
    in_flight: set[int] = field(default_factory=set)
    prompt_tokens: int = 0
    chunk: deque[int] = field(default_factory=deque)
    """What is left of the samples that belong together and go here next."""


class Schedule:
    """``prompts[i]`` is a key equal for requests of the same prompt, ``prompt_lengths[i]`` its tokens.

    ``expected_new_tokens`` estimates a response until ``finished`` has reported some; from then on their mean does.
    """

    def __init__(
        self,
        prompts: Sequence[object],
        prompt_lengths: Sequence[int],
        num_engines: int,
        *,
        window: int,
        expected_new_tokens: float,
        max_attempts: int = 3,
    ):
        if num_engines < 1 or window < 1 or max_attempts < 1:
            raise ValueError(f"{num_engines=}, {window=} and {max_attempts=} must be at least 1")
        self.window, self.max_attempts = window, max_attempts
        self._lengths = list(prompt_lengths)
        self._engines = [_Engine() for _ in range(num_engines)]
        self._chunks = _chunks(prompts, num_engines)
        self._retries: list[tuple[float, int]] = []  # (not before, index)
        self._avoid: dict[int, int] = {}
        self._attempts = [0] * len(prompts)
        self._where: dict[int, int] = {}
        self._finished: set[int] = set()
        self._expected, self._observed, self._observed_tokens = expected_new_tokens, 0, 0

    @property
    def num_waiting(self) -> int:
        """Requests that are neither in flight nor finished."""
        return len(self._lengths) - len(self._where) - len(self._finished)

    @property
    def num_in_flight(self) -> int:
        """Requests that some engine has."""
        return len(self._where)

    @property
    def done(self) -> bool:
        """True when every request has finished."""
        return len(self._finished) == len(self._lengths)

    def engine_of(self, index: int) -> int | None:
        """The engine that has the request now."""
        return self._where.get(index)

    def in_flight(self, engine: int) -> frozenset[int]:
        """The requests that an engine has now."""
        return frozenset(self._engines[engine].in_flight)

    def outstanding_tokens(self, engine: int) -> float:
        """Tokens an engine still has to run: prompts and expected responses of what is in flight there."""
        held = self._engines[engine]
        mean = self._observed_tokens / self._observed if self._observed else self._expected
        return held.prompt_tokens + mean * len(held.in_flight)

    def next(self, now: float = 0.0) -> Assignment | None:
        """Give out one request, or None when no engine may have one at time ``now`` (seconds on any clock)."""
        if self.num_waiting == 0:
            return None
        candidates = self._open_engines()
        while candidates:
            engine = min(candidates, key=self.outstanding_tokens)
            index = self._take(engine, now)
            if index is not None:
                held = self._engines[engine]
                held.in_flight.add(index)
                held.prompt_tokens += self._lengths[index]
                self._where[index] = engine
                self._attempts[index] += 1
                return Assignment(index, engine, self._attempts[index])
            candidates.remove(engine)
        return None

    def wait_until(self) -> float | None:
        """When the earliest retry becomes due; None without retries."""
        return self._retries[0][0] if self._retries else None

    def finished(self, index: int, new_tokens: int) -> bool:
        """Take a response's arrival; False, and no other effect, when the request had finished already."""
        if index in self._finished:
            return False
        self._release(index)
        self._finished.add(index)
        self._observed += 1
        self._observed_tokens += new_tokens
        return True

    def failed(self, index: int, not_before: float = 0.0) -> bool:
        """Take a request back from its engine, for another attempt from ``not_before`` on.

        False when all its attempts are used: it then stays where it is, for ``finished``.
        """
        if self._attempts[index] >= self.max_attempts:
            return False
        engine = self._release(index)
        if engine is not None:
            self._avoid[index] = engine
        heapq.heappush(self._retries, (not_before, index))
        return True

    def returned(self, index: int) -> None:
        """Take back a request that never reached its engine, or was lost with it: the attempt does not count."""
        self._attempts[index] -= 1
        engine = self._release(index)
        if engine is not None:
            self._avoid[index] = engine
        heapq.heappush(self._retries, (0.0, index))

    def take_out(self, engine: int) -> list[int]:
        """Give an engine nothing more; returns what it has in flight, each for the caller to take back."""
        held = self._engines[engine]
        held.inside = False
        if held.chunk:
            self._chunks.appendleft(held.chunk)
            held.chunk = deque()
        return sorted(held.in_flight)

    def put_in(self, engine: int) -> None:
        """Let an engine have requests again."""
        self._engines[engine].inside = True

    def is_in(self, engine: int) -> bool:
        """True when the engine may have requests."""
        return self._engines[engine].inside

    def _open_engines(self) -> list[int]:
        return [i for i, held in enumerate(self._engines) if held.inside and len(held.in_flight) < self.window]

    def _take(self, engine: int, now: float) -> int | None:
        """First what failed elsewhere, then this engine's chunk, a new chunk, at last of a chunk that has no room."""
        index = self._take_retry(engine, now)
        if index is not None:
            return index
        held = self._engines[engine]
        if not held.chunk and self._chunks:
            held.chunk = self._chunks.popleft()
        if held.chunk:
            return held.chunk.popleft()
        full = [other.chunk for other in self._engines if other.chunk and len(other.in_flight) >= self.window]
        return max(full, key=len).pop() if full else None

    def _take_retry(self, engine: int, now: float) -> int | None:
        others = any(held.inside for i, held in enumerate(self._engines) if i != engine)
        for position, (due, index) in enumerate(sorted(self._retries)):
            if due > now:
                break
            if not others or self._avoid.get(index) != engine:
                self._retries = sorted(self._retries)
                del self._retries[position]  # what is left is sorted, which is a heap
                return index
        return None

    def _release(self, index: int) -> int | None:
        engine = self._where.pop(index, None)
        if engine is not None:
            self._engines[engine].in_flight.discard(index)
            self._engines[engine].prompt_tokens -= self._lengths[index]
        return engine


def _chunks(prompts: Sequence[object], num_engines: int) -> deque[deque[int]]:
    """Requests of one prompt, at most an engine's even share of all requests in a chunk, in order of appearance."""
    groups: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    share = max(1, math.ceil(len(prompts) / num_engines))
    return deque(
        deque(members[start : start + share]) for members in groups.values() for start in range(0, len(members), share)
    )
