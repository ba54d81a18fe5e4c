"""The judge's servers: their addresses, how many requests each has, and which of them can be asked now."""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from urllib.parse import urlsplit

from megatron_oreal.config import VerifierConfig
from megatron_oreal.errors import UserError

FAILURES_TO_OPEN = 3
"""Failures in a row after which a host is left alone for a while."""
MAX_PAUSE_S = 30.0
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
    """One server. ``mode``: the index of the first request form that it has not refused."""

    url: str
    limit: int
    delay_s: float
    in_flight: int = 0
    failures: int = 0
    rate_limits: int = 0
    closed_until: float = 0.0
    model: str | None = None
    mode: int = 0
    last_error: str = ""

    @property
    def is_healthy(self) -> bool:
        """False from the third failure in a row to the next success."""
        return self.failures < FAILURES_TO_OPEN

    def can_take(self, now: float) -> bool:
        """True when a request may be sent; a host that has failed gets one at a time until it answers."""
        return now >= self.closed_until and self.in_flight < (self.limit if self.is_healthy else 1)

    def succeeded(self) -> None:
        """Forget former failures."""
        self.failures = self.rate_limits = 0
        self.last_error = ""

    def failed(self, error: str) -> None:
        """Count a failure; from the third in a row on the host is left alone, longer every time."""
        self.failures += 1
        self.last_error = error
        if not self.is_healthy:
            pause = pause_s(2 * self.delay_s, self.failures - FAILURES_TO_OPEN)
            self.closed_until = max(self.closed_until, time.monotonic() + pause)

    def limited(self, error: str, seconds: float | None) -> None:
        """Leave the host alone for as long as it asks, or longer every time when it does not say."""
        self.rate_limits += 1
        self.last_error = error
        pause = pause_s(self.delay_s, self.rate_limits) if seconds is None else seconds + random.uniform(0, 0.1)
        self.closed_until = max(self.closed_until, time.monotonic() + pause)


@dataclass(slots=True, eq=False)
class _Waiter:
    future: asyncio.Future[Host]
    avoid: Collection[str]


class HostPool:
    """Hands out requests to hosts, first come, first served; for one event loop."""

    def __init__(self, urls: Sequence[str], limit: int, delay_s: float) -> None:
        self.hosts = [Host(url, limit, delay_s) for url in urls]
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, deadline: float, avoid: Collection[str] = ()) -> Host | None:
        """Wait for a host that takes a request, rather one not in ``avoid``; None when ``deadline`` comes first.

        ``deadline`` is a ``time.monotonic()``. Every host that is returned must be released.
        """
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoid)
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

    def release(self, host: Host) -> None:
        """End a request."""
        host.in_flight -= 1
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
            waiter = self._waiters[0]
            if waiter.future.cancelled():
                self._waiters.popleft()
                continue
            able = [host for host in self.hosts if host.can_take(now)]
            if not able:
                break
            host = min(able, key=lambda host: (host.url in waiter.avoid, host.in_flight / host.limit, random.random()))
            self._waiters.popleft()
            host.in_flight += 1
            waiter.future.set_result(host)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        opening = [host.closed_until for host in self.hosts if host.closed_until > now]
        if self._waiters and opening:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(opening) - now + 0.001, self._dispatch)
