"""The part of SGLang's HTTP server that takes weights, as its handlers stand in 0.5.17 and in 0.5.21, without SGLang.

Routes, methods, fields, order and answers follow ``http_server.py``, ``io_struct.py`` and
``scheduler_components/weight_updater.py`` of those releases; what is not among a handler's fields is refused. The
payload is unpickled and given to the custom weight loader as ``weight_updater.py`` does it, on a model of one worker.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from aiohttp import web

from megatron_oreal.rollout.sglang import loader
from megatron_oreal.rollout.sglang.args import WEIGHT_LOADER

UPDATE = {"serialized_named_tensors", "load_format", "flush_cache", "abort_all_requests", "weight_version", "selector"}
FIELDS = {
    "/pause_generation": {"mode"},
    "/continue_generation": {"torch_empty_cache"},
    "/flush_cache": set(),
    "/update_weight_version": {"new_version", "abort_all_requests"},
    "/begin_weight_update": {"selector"},
    "/end_weight_update": set(),
    "/update_weights_from_tensor": UPDATE,
}


class OneWorker(torch.nn.Module):
    """A model with the engine's parameter names, which have dots."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.held = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.held.items())


class UpstreamServer:
    """``has_sessions``: as from 0.5.21 on. ``calls``: paths in order.

    Before a worker copies, it waits for ``may_copy``, and then for ``slow_s``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, has_sessions: bool):
        self.model, self.has_sessions = OneWorker(shapes), has_sessions
        self.calls: list[str] = []
        self.version, self.versions = "none", ["none"]
        self.may_copy, self.slow_s, self.breaks_at = threading.Event(), 0.0, 0
        self.may_copy.set()
        self.updates = 0
        self._paused = self._open = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)

    async def _start(self) -> str:
        app = web.Application()
        paths = [path for path in FIELDS if self.has_sessions or "_weight_update" not in path]
        app.add_routes([web.post(path, self._handle) for path in paths])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append(request.path)
        if unknown := body.keys() - FIELDS[request.path]:
            return self._answer(False, f"unknown fields {unknown}")
        return await getattr(self, request.path[1:])(request, body)

    def _answer(self, success: bool, message: str = "Success") -> web.Response:
        return web.json_response({"success": success, "message": message}, status=200 if success else 400)

    async def pause_generation(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        assert body["mode"] in ("abort", "retract", "in_place")
        self._paused = True
        return self._answer(True)

    async def continue_generation(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        self._paused = False
        return self._answer(True)

    async def flush_cache(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(text="Cache flushed.\n")

    async def update_weight_version(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        self.version = body["new_version"]
        self.versions.append(self.version)
        return self._answer(True)

    async def begin_weight_update(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        if body.get("selector", "all") not in ("target", "draft", "all") or self._open:
            return self._answer(False, "a weight-update session is already open; call end_weight_update() first")
        self._open = True
        return self._answer(True)

    async def end_weight_update(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        was_open, self._open = self._open, False
        return self._answer(was_open, "no weight-update session is open; call begin_weight_update() first")

    async def update_weights_from_tensor(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.has_sessions and not self._open:
            return self._answer(False, "update_weights_from_tensor must run between begin_weight_update() and end")
        self.updates += 1
        if self.updates == self.breaks_at:
            request.transport.close()
            return web.Response()
        assert body["load_format"] == WEIGHT_LOADER
        (payload,) = body["serialized_named_tensors"]  # one a worker, base64 in JSON
        tensors = pickle.loads(base64.b64decode(payload))
        await asyncio.to_thread(self._load, tensors)
        return self._answer(True)

    def _load(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        assert self.may_copy.wait(60)
        time.sleep(self.slow_s)
        loader.load(self.model, tensors)

    def restart(self) -> None:
        """As a new process."""
        self._paused = self._open = False

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(60)
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()
