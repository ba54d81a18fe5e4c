"""One SGLang server's HTTP interface: what is sent, what comes back, and which failures mean what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import numpy as np

from megatron_oreal.rollout.engine import Completion, EngineError, Request, SamplingParams
from megatron_oreal.rollout.sglang.draws import signed_seed


def _json() -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """A writer and a reader: orjson's, which SGLang brings along, else the standard library's."""
    try:
        import orjson
    except ImportError:
        return lambda value: json.dumps(value).encode(), json.loads
    return orjson.dumps, orjson.loads


_dumps_bytes, loads = _json()


class UnreachableError(EngineError):
    """The server did not answer, or answered with a failure of its own: another one, or it later, may.

    ``gone``: there is no connection, rather than no answer in time.
    """

    def __init__(self, message: str, *, gone: bool = False):
        super().__init__(message)
        self.gone = gone


class RefusedError(EngineError):
    """The server answers that the request itself is wrong: no other one will take it."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A completion and the label of the weights that the server says it had when it answered."""

    completion: Completion
    weight_version: str


class ServerClient:
    """Calls to the server at ``url`` through a session that all clients share. For one event loop."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url, self._session = url, session

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        """POST JSON; return the reply's JSON, None for another. Raises ``UnreachableError``, ``RefusedError``."""
        return await self._call("POST", path, timeout_s, data=_dumps_bytes(body))

    async def get(self, path: str, timeout_s: float) -> Any:
        """GET a reply's JSON."""
        return await self._call("GET", path, timeout_s)

    async def generate(self, body: Mapping[str, Any], sampling: SamplingParams, timeout_s: float) -> Generated:
        """Draw one response; ``body`` from ``generate_body``."""
        reply = await self.post("/generate", body, timeout_s)
        try:
            return parse_generated(reply, sampling)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnreachableError(
                f"{self.url}/generate sent an unexpected reply ({error!r}): {str(reply)[:200]}"
            ) from None

    async def has(self, path: str, timeout_s: float) -> bool:
        """Whether the server has an endpoint; asked with a method that does nothing there."""
        try:
            async with self._session.request(
                "OPTIONS", self.url + path, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as reply:
                return reply.status != 404
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{self.url}{path}: {_reason(error)}") from None

    async def _call(self, method: str, path: str, timeout_s: float, data: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if data is not None else None
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout
            ) as reply:
                content = await reply.read()
                status = reply.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            gone = not isinstance(error, asyncio.TimeoutError)
            raise UnreachableError(f"{self.url}{path}: {_reason(error)} (timeout {timeout_s:g} s)", gone=gone) from None
        if status == 200:
            try:
                return loads(content) if content.strip().startswith((b"{", b"[")) else None
            except ValueError:
                raise UnreachableError(f"{self.url}{path} sent a reply that is not JSON: {content[:200]!r}") from None
        kind = RefusedError if 400 <= status < 500 and status not in (408, 429) else UnreachableError
        raise kind(f"{self.url}{path} answered {status}: {content[:500].decode(errors='replace')}")


class Health:
    """Looks at a server: one that is busy may miss one look, one that hangs misses two in a row."""

    def __init__(self, client: ServerClient):
        self._client, self._missed = client, 0

    async def complaint(self, timeout_s: float) -> str:
        """Return why the server counts as failed, or nothing."""
        try:
            await self._client.get("/health", timeout_s)
        except EngineError as error:
            self._missed += 1
            failed = self._missed > 1 or (isinstance(error, UnreachableError) and error.gone)
            return str(error) if failed else ""
        self._missed = 0
        return ""


def _reason(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error) or type(error).__name__


def has_filter(sampling: SamplingParams) -> bool:
    """Whether top-p or top-k leaves anything out."""
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


def generate_body(
    request: Request, sampling: SamplingParams, *, rid: str, vocab_size: int, kept_mass: bool
) -> dict[str, Any]:
    """Return the JSON of ``/generate`` for one sample.

    ``kept_mass`` asks our sampler for it; SGLang wants a finite top-k with that.
    """
    prompt = request.prompt_ids.tolist()
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
        "top_k": sampling.top_k if sampling.top_k > 0 else (vocab_size if kept_mass else -1),
        "max_new_tokens": request.limit(sampling),
        "sampling_seed": signed_seed(request.seed),
        "skip_special_tokens": False,
    }
    if sampling.temperature == 0:
        params["top_k"] = -1
    if sampling.stop_token_id is None:
        params["ignore_eos"] = True
    else:
        params["stop_token_ids"] = [sampling.stop_token_id]
    body = {"rid": rid, "input_ids": prompt, "sampling_params": params, "return_logprob": True}
    if kept_mass:
        body["return_sampling_mask"] = True
    return body


_REASONS: dict[str, Literal["stop", "length", "abort"]] = {"stop": "stop", "length": "length", "abort": "abort"}


def parse_generated(reply: Any, sampling: SamplingParams) -> Generated:
    """Read the reply of ``/generate``; raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is not one.

    Without a report of it, the kept mass under a filter is NaN, and 1 without a filter. SGLang calls a response that
    ends with the stop token at its last possible place cut; here it has stopped.
    """
    meta = reply["meta_info"]
    reason = _REASONS[meta["finish_reason"]["type"]]
    token_ids = np.asarray(reply["output_ids"], dtype=np.int32)
    pairs = meta.get("output_token_logprobs") or []
    logp = np.array([pair[0] for pair in pairs], dtype=np.float32)
    if reason != "abort" and [pair[1] for pair in pairs] != token_ids.tolist():
        raise ValueError(f"{len(pairs)} log-probabilities do not fit {len(token_ids)} tokens")
    if reason == "length" and len(token_ids) and token_ids[-1] == sampling.stop_token_id:
        reason = "stop"
    masses = meta.get("output_token_sampling_logprobs")
    kept = 1.0 if not has_filter(sampling) else float(np.mean(masses)) if masses else float("nan")
    return Generated(Completion(token_ids, logp, reason, kept), str(meta["weight_version"]))
