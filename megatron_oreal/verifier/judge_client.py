"""One verdict from OpenAI-compatible servers: requests, retries on other hosts, and what every failure is called.

Servers differ in how they constrain output; ``_MODES`` holds the request forms in the order in which they are tried on
a host. A form that is refused (HTTP 400 or 422, and 500 in a first probe) while a later one is accepted is not tried on
that host again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from megatron_oreal import __version__
from megatron_oreal.config import VerifierConfig
from megatron_oreal.verifier.judge_hosts import Host, HostPool, base_url, pause_s, retry_after_s
from megatron_oreal.verifier.judge_prompt import (
    REPLY_REGEX,
    Case,
    draw_nonce,
    make_prompt,
    parse_reply,
    reply_schema,
)
from megatron_oreal.verifier.judge_stats import DEADLINE, REFUSED, REPLY, UNREACHABLE, StatsBox
from megatron_oreal.verifier.verdict import Verdict

Known = Callable[[], Verdict | None]
MAX_BODY_BYTES = 1 << 18

# response_format: OpenAI, SGLang, vLLM, lmdeploy, ollama >= 0.5. regex: SGLang; guided_regex: vLLM < 0.12;
# structured_outputs: vLLM >= 0.12; servers that do not know a field ignore it or answer 400.
_JSON_SCHEMA: dict[str, Any] = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "strict": True, "schema": reply_schema()},
    }
}
_REGEX: dict[str, Any] = {
    "regex": REPLY_REGEX,
    "guided_regex": REPLY_REGEX,
    "structured_outputs": {"regex": REPLY_REGEX},
}
_LMDEPLOY_REGEX: dict[str, Any] = {"response_format": {"type": "regex_schema", "regex_schema": REPLY_REGEX}}
# chat_template_kwargs: vLLM and SGLang; enable_thinking: lmdeploy.
_NO_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False}


class JudgeError(Exception):
    """Why there is no verdict: one of ``CAUSES`` and the particulars.

    ``by_host``: the host is to blame. ``sent``: False when there was no connection to send the request over.
    """

    def __init__(self, cause: str, detail: str, *, by_host: bool = True, sent: bool = True) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail, self.by_host, self.sent = cause, detail, by_host, sent


class _LimitedError(Exception):
    def __init__(self, detail: str, seconds: float | None) -> None:
        super().__init__(detail)
        self.seconds = seconds


def request_modes(config: VerifierConfig) -> list[dict[str, Any]]:
    """Return the extra fields of each request form, in the order of trial; the last has none that OpenAI lacks."""
    extras = {} if config.judge.thinking else _NO_THINKING
    wanted = config.judge.constrained
    forms: list[dict[str, Any]] = []
    if wanted in ("auto", "json_schema"):
        forms += [_JSON_SCHEMA | extras]
        forms += [_JSON_SCHEMA] if extras else []
    if wanted in ("auto", "regex"):
        forms += [_REGEX | extras, _LMDEPLOY_REGEX | extras]
    if wanted in ("auto", "none"):
        forms += [extras] if extras else []
        forms += [{}]
    return forms


class JudgeClient:
    """Asks for verdicts; made, used and closed inside one event loop."""

    def __init__(self, config: VerifierConfig, stats: StatsBox) -> None:
        judge = config.judge
        self._judge, self._stats = judge, stats
        self._modes = request_modes(config)
        total = config.num_processes * config.concurrency_per_proc[0]
        limit = judge.concurrency_per_host or max(1, -(-total // len(config.hosts)))
        self.pool = HostPool([base_url(host) for host in config.hosts], limit, judge.retry_delay_s)
        headers = {"User-Agent": f"megatron-oreal/{__version__}", "Accept-Encoding": "identity"}
        if judge.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(judge.api_key_env, '').strip()}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    @property
    def models(self) -> list[str]:
        """Names of the models that are known by now."""
        if self._judge.model is not None:
            return [self._judge.model]
        return sorted({host.model for host in self.pool.hosts if host.model is not None})

    async def close(self) -> None:
        """Close all connections."""
        self.pool.close()
        await self._session.close()

    async def ask(self, case: Case, deadline: float, known: Known = lambda: None) -> tuple[Verdict, str | None]:
        """Return a verdict and its model. Raises ``JudgeError``; ``deadline`` is a ``time.monotonic()``.

        ``known`` is asked before every request, since another process may have found the verdict while this one
        waited; the model is None for what it knows. A request that found no connection is no attempt: it is made again
        until ``deadline``, so that a server may be started anew.
        """
        avoid: set[str] = set()
        attempts = failures = 0
        unsent: JudgeError | None = None
        while True:
            slot = await self.pool.acquire(deadline, avoid)
            if slot is None:
                raise unsent or self.out_of_time()
            host, number = slot.host, slot.number
            try:
                found = known()
                if found is not None:
                    return found, None
                verdict = await self._exchange(host, case, deadline)
                host.succeeded(number)
                return verdict, host.model or ""
            except _LimitedError as error:
                host.limited(number, str(error), error.seconds)
                continue
            except JudgeError as error:
                if error.by_host:
                    host.failed(number, error.detail)
                else:
                    host.succeeded(number)
                avoid.add(host.url)
                attempts += error.sent
                failed = JudgeError(error.cause, f"{host.url}: {error.detail}", by_host=error.by_host)
                if attempts > self._judge.max_retries or time.monotonic() >= deadline:
                    # What was left of the time for a last try says less than why there was no connection before.
                    raise (unsent if unsent is not None and error.cause == DEADLINE else failed) from None
                unsent = None if error.sent else failed
            finally:
                self.pool.release(slot)
            self._stats.add("retries")
            pause = pause_s(self._judge.retry_delay_s, failures)
            failures += 1
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                raise failed

    def out_of_time(self) -> JudgeError:
        """The error of a case past its deadline, with what the hosts said last."""
        last = self.pool.errors() or "all hosts are busy"
        return JudgeError(DEADLINE, f"no verdict within {self._judge.deadline_s:g} s ({last})", by_host=False)

    async def probe(self, host: Host, case: Case) -> str | None:
        """Return what keeps a host from giving a verdict on ``case``, None when it does; sets its model and form."""
        deadline = time.monotonic() + self._judge.timeout_s
        try:
            verdict = await self._exchange(host, case, deadline, fall_back=(400, 422, 500, 501))
        except _LimitedError:
            return None
        except JudgeError as error:
            host.last_error = error.detail
            return error.detail
        if verdict is not Verdict.CORRECT:
            return "says that 4 is not 4"
        return None

    async def _exchange(
        self, host: Host, case: Case, deadline: float, fall_back: tuple[int, ...] = (400, 422)
    ) -> Verdict:
        """Send the case in the first form that the host does not refuse with one of ``fall_back``; read the reply."""
        if self._judge.model is not None:
            host.model = self._judge.model
        elif host.model is None:
            host.model = await self._discover(host, deadline)
        detail = ""
        for mode in range(host.mode, len(self._modes)):
            nonce = draw_nonce(case)
            payload = {
                "model": host.model,
                "messages": [{"role": "user", "content": make_prompt(case, nonce)}],
                "temperature": self._judge.temperature,
                "max_tokens": self._judge.max_tokens,
                "stream": False,
                **self._modes[mode],
            }
            began = time.monotonic()
            self._stats.add("requests")
            status, body = await self._send("POST", f"{host.url}/chat/completions", deadline, payload)
            if status == 200:
                self._stats.latency(time.monotonic() - began)
                host.mode = mode
                return _read_reply(body, nonce)
            detail = f"HTTP {status}{_error_text(body)}"
            if status not in fall_back:
                break
        if status == 404 and self._judge.model is None:
            host.model = None  # a server that was started again with another model
        if status in (401, 403):
            detail += " (verifier.judge.api_key_env names the variable with the key)"
        raise JudgeError(REFUSED, detail, by_host=status not in (400, 413, 422))

    async def _discover(self, host: Host, deadline: float) -> str:
        status, body = await self._send("GET", f"{host.url}/models", deadline)
        if status == 200:
            data = _json(body)
            models = data.get("data") if isinstance(data, dict) else None
            first = models[0] if isinstance(models, list) and models else None
            name = first.get("id") if isinstance(first, dict) else None
            if isinstance(name, str) and name:
                return name
        what = "lists no model" if status == 200 else f"HTTP {status}{_error_text(body)}"
        raise JudgeError(REFUSED, f"/v1/models: {what} (verifier.judge.model names one without it)")

    async def _send(
        self, method: str, url: str, deadline: float, payload: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body. ``_LimitedError`` for 429 and a 503 with a time, ``JudgeError`` for no answer."""
        seconds = max(0.001, min(self._judge.timeout_s, deadline - time.monotonic()))
        connect = min(seconds, self._judge.connect_timeout_s)
        timeout = aiohttp.ClientTimeout(total=seconds, connect=connect, sock_connect=connect)
        try:
            async with self._session.request(
                method, url, json=payload, timeout=timeout, allow_redirects=False
            ) as response:
                wait = retry_after_s(response.headers.get("Retry-After"))
                if response.status == 429 or (response.status == 503 and wait is not None):
                    raise _LimitedError(f"HTTP {response.status}", wait)
                if 300 <= response.status < 400:
                    target = response.headers.get("Location", "")[:200]
                    raise JudgeError(
                        REFUSED, f"HTTP {response.status}, redirects to {target!r}: name that in verifier.hosts"
                    )
                return response.status, await _read_body(response)
        except (aiohttp.ConnectionTimeoutError, aiohttp.SocketTimeoutError):
            raise JudgeError(UNREACHABLE, f"no connection within {connect:.3g} s", sent=False) from None
        except TimeoutError:
            raise JudgeError(DEADLINE, f"no whole reply within {seconds:.3g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            # A certificate that is refused does not mend itself.
            sent = not isinstance(error, aiohttp.ClientConnectorError) or isinstance(error, aiohttp.ClientSSLError)
            raise JudgeError(UNREACHABLE, words or type(error).__name__, sent=sent) from None


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            response.close()
            raise JudgeError(REPLY, f"more than {MAX_BODY_BYTES >> 10} KiB")
    return b"".join(parts)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _error_text(body: bytes) -> str:
    data = _json(body)
    found = data.get("error", data) if isinstance(data, dict) else None
    message = found.get("message") if isinstance(found, dict) else found
    return f" ({' '.join(message.split())[:200]})" if isinstance(message, str) and message else ""


def _read_reply(body: bytes, nonce: str) -> Verdict:
    """Return the verdict in a chat completion. Raises ``JudgeError`` for anything but exactly one."""
    data = _json(body)
    if not isinstance(data, dict):
        raise JudgeError(REPLY, "not a JSON object")
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise JudgeError(REPLY, f"no single choice{_error_text(body)}")
    message = choices[0].get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str) and (verdict := parse_reply(content, nonce)) is not None:
        return verdict
    if choices[0].get("finish_reason") == "length":
        raise JudgeError(REPLY, "cut off (verifier.judge.max_tokens, verifier.judge.thinking)", by_host=False)
    if not isinstance(content, str) or not content.strip():
        raise JudgeError(REPLY, "empty", by_host=False)
    raise JudgeError(REPLY, f"not one of the two verdicts but {content.strip()[:80]!r}", by_host=False)
