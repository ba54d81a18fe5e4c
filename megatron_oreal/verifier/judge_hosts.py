"""The judge's servers: their addresses, how many requests each has, and which of them can be asked now."""

from __future__ import annotations

import asyncio
import bisect
import email.utils
import os
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from urllib.parse import urlsplit

from megatron_oreal.config import VerifierConfig
from megatron_oreal.errors import UserError

FAILURES_TO_OPEN = 4
"""Failures of requests sent one after another that open a host: at one bad reply in five, 1 request in 600."""
MAX_FIRST_PAUSE_S = 2.0
MAX_PAUSE_S = 30.0
_MOST_HEARD = 256
DECREASE = 0.7
"""What a 429 leaves of the requests a host gets at once."""
MAX_RETRY_AFTER_S = 120.0


def base_url(host: str) -> str:
    """``"10.0.0.1:8000"`` -> ``"http://10.0.0.1:8000/v1"``. ``UserError`` for what is not such an address."""

    def refuse(why: str) -> UserError:
        return UserError(f"verifier.hosts: {host!r} {why}: give host:port or a URL such as http://10.0.0.1:8000/v1")

    text = host.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise refuse(f"is no address ({error})") from None
    if parts.scheme not in ("http", "https"):
        raise refuse(f"has the scheme {parts.scheme!r}")
    if not parts.hostname or any(c.isspace() for c in text):
        raise refuse("names no host")
    if parts.username is not None or parts.query or parts.fragment:
        raise refuse("has a user, a query or a fragment (keys go by verifier.judge.api_key_env)")
    path = parts.path.rstrip("/")
    if path.endswith(("/completions", "/models")):
        raise refuse("is the address of a method")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    at = name if port is None else f"{name}:{port}"
    return f"{parts.scheme}://{at}{path if path.endswith('/v1') else path + '/v1'}"


def judge_contradictions(config: VerifierConfig) -> Iterator[str]:
    """Yield what is wrong with the keys of a ``verifier`` section, a line each."""
    judge = config.judge
    urls: list[str] = []
    for host in config.hosts:
        try:
            urls.append(base_url(host))
        except UserError as error:
            yield str(error)
    for url in sorted({url for url in urls if urls.count(url) > 1}):
        yield f"verifier.hosts: {url} is there twice: remove one (verifier.judge.concurrency_per_host raises its load)"
    if judge.votes % 2 == 0:
        yield f"verifier.judge.votes={judge.votes} can end in a tie: use an odd number"
    if judge.timeout_s > judge.deadline_s:
        yield (
            f"verifier.judge.timeout_s={judge.timeout_s:g} of one request exceeds verifier.judge.deadline_s="
            f"{judge.deadline_s:g} of the whole response: lower it"
        )
    if judge.thinking and judge.max_tokens < 256:
        yield f"verifier.judge.thinking=true with max_tokens={judge.max_tokens} cuts the thinking off: use 1024 or more"
    if judge.max_tokens < 32:
        yield f"verifier.judge.max_tokens={judge.max_tokens} cannot hold a verdict: use 64 or more"
    if config.hosts and judge.api_key_env is not None:
        key = os.environ.get(judge.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            yield (
                f"verifier.judge.api_key_env={judge.api_key_env!r}: no such variable in the environment, or no key in "
                "it: export it, or set null"
            )
    if not config.checker.partition(":")[2].isidentifier() or not config.checker.partition(":")[0]:
        yield f"verifier.checker={config.checker!r} is not of the form module:function, as in my_package.checks:check"


def retry_after_s(header: str | None, now: float | None = None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, within [0, 120]; None without a header that says it.

    RFC 9110, 10.2.3: a number of seconds or an HTTP date.
    """
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_S)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return min(max(date.timestamp() - (time.time() if now is None else now), 0.0), MAX_RETRY_AFTER_S)


def pause_s(base: float, failures: int) -> float:
    """Return a random pause: between half and all of ``base`` doubled with every failure, at most 30 s."""
    return random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, base * 2.0 ** min(failures, 20))


@dataclass(slots=True)
class Host:
    """One server. ``limit``: the requests it may have at most; ``mode``: the first request form it has not refused.

    Requests are numbered as they are sent. The host is *open*, that is left alone, after ``FAILURES_TO_OPEN`` failures
    of requests sent one after another, then *half open*: it gets one request at a time until it answers. What becomes
    of requests that were on their way when it was opened, or when ``allowed`` was lowered, says nothing new and does
    neither again: one outage is one opening, however many requests it meets.
    """

    url: str
    limit: int
    delay_s: float
    closed_until: float = 0.0
    model: str | None = None
    mode: int = 0
    last_error: str = ""
    allowed: float = field(init=False)
    openings: int = 0
    limits: int = 0
    sent: int = 0
    _probes: int = 0
    _opened_at: int = 0
    _lowered_at: int = 0
    _out: set[int] = field(default_factory=set)
    _heard: list[tuple[int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allowed = float(self.limit)

    @property
    def in_flight(self) -> int:
        """Requests on their way."""
        return len(self._out)

    @property
    def is_healthy(self) -> bool:
        """False from an opening to the next success."""
        return self.openings == 0

    def can_take(self, now: float) -> bool:
        """True when a request may be sent; a host that was left alone gets one at a time until it answers."""
        if now < self.closed_until:
            return False
        return self.in_flight < int(self.allowed) if self.is_healthy else self._probes < 1

    def take(self) -> Slot:
        """Count a request that is about to be sent."""
        self._probes += 1
        self.sent += 1
        self._out.add(self.sent)
        return Slot(self, self.sent)

    def give_back(self, number: int) -> None:
        """End a request."""
        self._out.discard(number)
        if number > self._opened_at:
            self._probes -= 1

    def succeeded(self, number: int) -> None:
        """Note a reply: closes an opening that came before the request, and raises ``allowed`` by one a round."""
        self._note(number, True)
        if number > self._lowered_at:
            self.limits = 0
            self.allowed = min(float(self.limit), self.allowed + 1 / self.allowed)
        if number > self._opened_at:
            self.openings = 0
            self.last_error = ""

    def failed(self, number: int, error: str) -> None:
        """Note a failure: after several in the order of sending, or of a probe, the host is left alone."""
        if number <= self._opened_at:
            return
        self._note(number, False)
        self.last_error = error
        if self.is_healthy and self._failures_around(number) < FAILURES_TO_OPEN:
            return
        self._close_for(pause_s(min(2 * self.delay_s, MAX_FIRST_PAUSE_S), self.openings))
        self.openings += 1
        self._opened_at, self._probes = self.sent, 0
        self._heard.clear()

    def limited(self, number: int, error: str, seconds: float | None) -> None:
        """Note a 429: fewer requests at once from now on, and none for as long as the host asks.

        A host that does not say is paused only from the second 429 without a success between, longer every time.
        """
        self.last_error = error
        if seconds is not None:
            self._close_for(seconds + random.uniform(0, 0.1))
        if number <= self._lowered_at:
            return
        self.limits += 1
        self.allowed = max(1.0, DECREASE * min(self.allowed, self.in_flight))
        self._lowered_at = self.sent
        if seconds is None and self.limits > 1:
            self._close_for(pause_s(self.delay_s, self.limits - 2))

    def _note(self, number: int, success: bool) -> None:
        bisect.insort(self._heard, (number, success))
        del self._heard[:-_MOST_HEARD]
        self._out.discard(number)

    def _failures_around(self, number: int) -> int:
        """Failures in a row, by the time of sending, that ``number`` is one of.

        A request that is still out ends the row: failures are often quicker than replies, so among what has been heard
        lately there are too many of them.
        """
        at = bisect.bisect_left(self._heard, (number, False))
        count = 1
        for step in (-1, 1):
            index, last = at + step, number
            while 0 <= index < len(self._heard) and not self._heard[index][1]:
                if any(between in self._out for between in range(last + step, self._heard[index][0], step)):
                    break
                last = self._heard[index][0]
                index, count = index + step, count + 1
        return count

    def _close_for(self, seconds: float) -> None:
        self.closed_until = max(self.closed_until, time.monotonic() + seconds)


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to send one request to a host; ``number`` orders the requests of a host by the time of sending."""

    host: Host
    number: int


@dataclass(slots=True, eq=False)
class _Waiter:
    future: asyncio.Future[Slot]
    avoid: Collection[str]
    late_at: float


class HostPool:
    """Hands out requests to hosts; for one event loop.

    Whoever waits is served in random order, so that processes with the same cases do not ask the same ones at the
    same time and find each other's verdicts in the cache; who has waited for half its time comes first.
    """

    def __init__(self, urls: Sequence[str], limit: int, delay_s: float) -> None:
        self.hosts = [Host(url, limit, delay_s) for url in urls]
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, deadline: float, avoid: Collection[str] = ()) -> Slot | None:
        """Wait for a host that takes a request, rather one not in ``avoid``; None when ``deadline`` comes first.

        ``deadline`` is a ``time.monotonic()``. Every slot that is returned must be released.
        """
        late_at = (time.monotonic() + deadline) / 2
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoid, late_at)
        self._waiters.append(waiter)
        self._dispatch()
        try:
            await asyncio.wait([waiter.future], timeout=max(0.0, deadline - time.monotonic()))
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise
        if waiter.future.done():
            return waiter.future.result()
        self._abandon(waiter)
        return None

    def release(self, slot: Slot) -> None:
        """End a request."""
        slot.host.give_back(slot.number)
        self._dispatch()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def errors(self) -> str:
        """What each host that is in trouble said last."""
        return "; ".join(f"{host.url}: {host.last_error}" for host in self.hosts if host.last_error)

    def _abandon(self, waiter: _Waiter) -> None:
        if waiter.future.done() and not waiter.future.cancelled():
            self.release(waiter.future.result())
        else:
            waiter.future.cancel()

    def _dispatch(self) -> None:
        now = time.monotonic()
        while self._waiters:
            able = [host for host in self.hosts if host.can_take(now)]
            if not able:
                break
            index = 0 if self._waiters[0].late_at <= now else random.randrange(len(self._waiters))
            waiter = self._waiters[index]
            del self._waiters[index]
            if waiter.future.cancelled():
                continue
            host = min(
                able, key=lambda host: (host.url in waiter.avoid, host.in_flight / host.allowed, random.random())
            )
            waiter.future.set_result(host.take())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        opening = [host.closed_until for host in self.hosts if host.closed_until > now]
        if self._waiters and opening:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(opening) - now + 0.001, self._dispatch)
