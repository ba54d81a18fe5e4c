"""A real HTTP server that speaks the OpenAI API as a judge would, or misbehaves exactly as a test asks it to."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from ports import free_port

MODEL = "judge-model"
Respond = Callable[[dict[str, Any], web.Request], Awaitable[web.StreamResponse]]
_BLOCK = "--- BEGIN {0} {1} ---\n(.*?)\n--- END {0} {1} ---"


def prompt_of(payload: dict[str, Any]) -> str:
    """The text of the one message."""
    (message,) = payload["messages"]
    assert set(message) == {"role", "content"} and message["role"] == "user"
    return message["content"]


def nonce_of(payload: dict[str, Any]) -> str:
    return re.search(r"The number of this request is (\d+)\.", prompt_of(payload))[1]


def block_of(payload: dict[str, Any], name: str) -> str:
    """What stands in a block of data: QUESTION, REFERENCE ANSWER or ANSWER."""
    found = re.findall(_BLOCK.format(name, nonce_of(payload)), prompt_of(payload), re.DOTALL)
    assert len(found) == 1, (name, found)
    return found[0]


def verdict_text(payload: dict[str, Any], verdict: str) -> str:
    return json.dumps({"id": nonce_of(payload), "verdict": verdict})


def completion(content: Any, finish_reason: str = "stop") -> web.Response:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return web.json_response({"id": "x", "object": "chat.completion", "model": MODEL, "choices": [choice]})


async def honest(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    """CORRECT when the answer has the reference answer in it as a word."""
    words = re.findall(r"\w+", block_of(payload, "ANSWER"))
    right = block_of(payload, "REFERENCE ANSWER") in words
    return completion(verdict_text(payload, "CORRECT" if right else "INCORRECT"))


def always(verdict: str) -> Respond:
    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return completion(verdict_text(payload, verdict))

    return respond


def saying(content: Any, finish_reason: str = "stop") -> Respond:
    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return completion(content, finish_reason)

    return respond


def status(code: int, headers: dict[str, str] | None = None, text: str = "") -> Respond:
    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers=headers, text=text)

    return respond


def body(data: bytes, **headers: str) -> Respond:
    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, content_type="application/json", headers=headers)

    return respond


async def hang(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def hang_after_headers(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "500", "Content-Type": "application/json"})
    await response.prepare(request)
    await asyncio.sleep(3600)
    return response


async def drip(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    """A byte every few milliseconds, for ever: no read of it ever times out."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.005)


async def flood(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    """A body without end, as fast as it goes."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b"9" * 65536)


async def reset(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    await asyncio.sleep(0)
    return web.Response()


async def reset_in_the_body(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "5000"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    request.transport.abort()
    return response


def slow(seconds: float, then: Respond = honest) -> Respond:
    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await then(payload, request)

    return respond


def in_turn(*responds: Respond) -> Respond:
    """Each once, the last one for ever."""
    left = list(responds)

    async def respond(payload: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(payload, request)

    return respond


class JudgeServer:
    """A server on a loopback port in a thread of its own; ``respond`` may be exchanged while it runs.

    ``payloads`` and ``headers`` are what came in, ``most_at_once`` the largest number of requests in flight.
    ``models`` is what /v1/models answers with, None: 404.
    """

    def __init__(self, respond: Respond = honest, *, models: Any = (MODEL,), port: int = 0) -> None:
        self.respond, self.models, self.port = respond, models, port or free_port()
        self.payloads: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> JudgeServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the former port if there was one."""
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(120)

    def stop(self) -> None:
        """Die: every connection is cut at once."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(started))
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stopping = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        await web.SockSite(runner, listener).start()
        started.set()
        await self._stopping.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.models is None:
            return web.Response(status=404)
        if isinstance(self.models, bytes):
            return web.Response(body=self.models)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        self.payloads.append(payload)
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.respond(payload, request)
        finally:
            self.at_once -= 1
