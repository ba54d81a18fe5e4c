"""Which request goes to which engine next: pure bookkeeping, without clocks, sockets or threads.

Invariants, each asserted by a test of its name:

* every request is at any time in one place: waiting, in flight on one engine, or finished; it finishes once;
* an engine never has more than ``window`` requests in flight, and gets none while it is out of rotation;
* work conserving: while an engine has room and a request may go to it, ``next`` gives it one;
* among engines with room the one with the fewest outstanding tokens is served first;
* the samples of a prompt stay together: a chunk of them (all, unless there are fewer prompts than engines) goes to one
  engine, whose prefix cache then runs the prompt once, until another engine would stand idle;
* a failed request goes to another engine while there is one, and at most ``max_attempts`` times in all.

Giving out a request costs the logarithm of the engines, not their number: their loads are kept in heaps (``_ByLoad``).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
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


class _ByLoad:
    """Engines by outstanding tokens, of which the expected part changes with every response that arrives.

    Among engines with equally many requests in flight the one with the fewest prompt tokens is first whatever is
    expected, so there is a heap for each such number, and only their heads are compared. Entries that are not true any
    more are dropped when they come up.
    """

    def __init__(self) -> None:
        self._heaps: dict[int, list[tuple[int, int]]] = {}
        self._held: dict[int, tuple[int, int]] = {}

    def put(self, engine: int, in_flight: int, prompt_tokens: int) -> None:
        """Add an engine, or say what it has now."""
        if self._held.get(engine) != (in_flight, prompt_tokens):
            self._held[engine] = in_flight, prompt_tokens
            heapq.heappush(self._heaps.setdefault(in_flight, []), (prompt_tokens, engine))

    def remove(self, engine: int) -> None:
        """Forget an engine."""
        self._held.pop(engine, None)

    def first(self, load: Callable[[int], float]) -> int | None:
        """The engine with the smallest (``load(engine)``, engine); None without engines."""
        heads = []
        for in_flight, heap in list(self._heaps.items()):
            while heap and self._held.get(heap[0][1]) != (in_flight, heap[0][0]):
                heapq.heappop(heap)
            if heap:
                heads.append((load(heap[0][1]), heap[0][1]))
            else:
                del self._heaps[in_flight]
        return min(heads)[1] if heads else None

    def first_but(self, one: int, load: Callable[[int], float]) -> int | None:
        """``first`` of the engines other than ``one``, which is among them."""
        held = self._held.pop(one)
        found = self.first(load)
        self.put(one, *held)
        return found


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
        self._num_inside = num_engines
        self._open, self._holding = _ByLoad(), _ByLoad()  # engines with room; those of them with a chunk
        self._stranded: list[tuple[int, int]] = []  # heap of (- length of the chunk, engine) of engines without room
        self._chunks = _chunks(prompts, num_engines)
        self._retries: list[tuple[float, int]] = []  # heap of (not before, index)
        self._avoid: dict[int, int] = {}
        self._attempts = [0] * len(prompts)
        self._where: dict[int, int] = {}
        self._finished: set[int] = set()
        self._expected, self._observed, self._observed_tokens = expected_new_tokens, 0, 0
        for engine in range(num_engines):
            self._file(engine)

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
        engine = self._next_engine(now)
        if engine is None:
            return None
        index, held = self._take(engine, now), self._engines[engine]
        held.in_flight.add(index)
        held.prompt_tokens += self._lengths[index]
        self._where[index] = engine
        self._attempts[index] += 1
        self._file(engine)
        return Assignment(index, engine, self._attempts[index])

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
        self._num_inside -= held.inside
        held.inside = False
        if held.chunk:
            self._chunks.appendleft(held.chunk)
            held.chunk = deque()
        self._file(engine)
        return sorted(held.in_flight)

    def put_in(self, engine: int) -> None:
        """Let an engine have requests again."""
        self._num_inside += not self._engines[engine].inside
        self._engines[engine].inside = True
        self._file(engine)

    def is_in(self, engine: int) -> bool:
        """True when the engine may have requests."""
        return self._engines[engine].inside

    def _has_room(self, engine: int) -> bool:
        held = self._engines[engine]
        return held.inside and len(held.in_flight) < self.window

    def _file(self, engine: int) -> None:
        """Put an engine where what it has now belongs; to be called after every change of it."""
        held, room = self._engines[engine], self._has_room(engine)
        for engines, belongs in ((self._open, room), (self._holding, room and held.chunk)):
            if belongs:
                engines.put(engine, len(held.in_flight), held.prompt_tokens)
            else:
                engines.remove(engine)
        if held.chunk and not room:
            heapq.heappush(self._stranded, (-len(held.chunk), engine))

    def _next_engine(self, now: float) -> int | None:
        """Of the engines with room that some waiting request may go to, the one with the fewest outstanding tokens."""
        load = self.outstanding_tokens
        lightest = self._open.first(load)
        if lightest is None or self._chunks or self._longest_stranded() is not None:
            return lightest
        taker = lightest if self._retry_for(lightest, now) is not None else self._open.first_but(lightest, load)
        able = [self._holding.first(load), taker if taker is not None and self._retry_for(taker, now) else None]
        return min((e for e in able if e is not None), key=lambda e: (load(e), e), default=None)

    def _take(self, engine: int, now: float) -> int:
        """First what failed elsewhere, then this engine's chunk, a new chunk, at last of a chunk that has no room."""
        retry = self._retry_for(engine, now, remove=True)
        if retry is not None:
            return retry[1]
        held = self._engines[engine]
        if not held.chunk and self._chunks:
            held.chunk = self._chunks.popleft()
        if held.chunk:
            return held.chunk.popleft()
        full = self._longest_stranded()
        assert full is not None
        index = self._engines[full].chunk.pop()
        self._file(full)
        return index

    def _longest_stranded(self) -> int | None:
        """The engine without room that has the longest chunk."""
        while self._stranded:
            length, engine = self._stranded[0]
            if len(self._engines[engine].chunk) == -length and not self._has_room(engine):
                return engine
            heapq.heappop(self._stranded)
        return None

    def _retry_for(self, engine: int, now: float, *, remove: bool = False) -> tuple[float, int] | None:
        """The earliest retry that is due and may go to an engine, which must be in rotation."""
        passed_over = []
        found = None
        while self._retries and self._retries[0][0] <= now:
            if self._num_inside == 1 or self._avoid.get(self._retries[0][1]) != engine:
                found = heapq.heappop(self._retries) if remove else self._retries[0]
                break
            passed_over.append(heapq.heappop(self._retries))
        for retry in passed_over:
            heapq.heappush(self._retries, retry)
        return found

    def _release(self, index: int) -> int | None:
        engine = self._where.pop(index, None)
        if engine is not None:
            self._engines[engine].in_flight.discard(index)
            self._engines[engine].prompt_tokens -= self._lengths[index]
            self._file(engine)
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
