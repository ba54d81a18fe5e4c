"""One SGLang server as a child process: started on free ports, ready or failed within a deadline, never left over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang import guard

_GUARD = Path(guard.__file__)
_GONE_TIMEOUT_S = 30.0
_LOG_LINES = 20
_LOG_TAIL_BYTES = 65536


class ServerProcess:
    """A server of ``server_args`` (see ``args.server_args``), startable again after it ended, on the same ports.

    ``folder`` gets ``NAME.log`` and ``NAME.json`` (the arguments). The ports are held by sockets of this process that
    are bound but do not listen: nobody else is given them, and the server, which binds with SO_REUSEADDR, still may.
    All methods may be called from any thread.
    """

    def __init__(
        self,
        server_args: Mapping[str, Any],
        environment: Mapping[str, str],
        folder: Path,
        *,
        name: str = "server",
        host: str = "127.0.0.1",
        counter_sampler: bool = True,
    ):
        self.name, self.host = name, host
        self.log_path = folder / f"{name}.log"
        self._environment = dict(environment)
        self._held = [_hold_port(host), _hold_port(host)]
        self.port, nccl_port = (held.getsockname()[1] for held in self._held)
        self._args_file = folder / f"{name}.json"
        arguments = dict(server_args) | {"host": host, "port": self.port, "nccl_port": nccl_port}
        folder.mkdir(parents=True, exist_ok=True)
        self._args_file.write_text(
            json.dumps({"counter_sampler": counter_sampler, "server_args": arguments}, indent=1), encoding="utf-8"
        )
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False

    @property
    def was_started(self) -> bool:
        """Whether ``start`` was called before."""
        return self._child is not None

    @property
    def url(self) -> str:
        """``http://host:port``; the same after a restart."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Id of the running server's process group, and of the guard process that leads it; None when it has ended."""
        child = self._child
        return child.pid if child is not None and child.running else None

    def start(self) -> None:
        """Start the process, after making an end of one that may still be there; do not wait for it to be ready."""
        with self._lock:
            if self._closed:
                raise EngineError(f"{self.name} is shut down")
            if self._child is not None:
                self._child.kill()
            self._child = _Child(self._args_file, self._environment, self.log_path)

    def wait_ready(self, deadline_s: float) -> None:
        """Return when the health endpoint has generated a token; at once when this process has done so before.

        Raises ``EngineError`` with the end of the log when the process ends or the deadline passes; it is then killed.
        """
        began = time.monotonic()
        while True:
            child = self._child
            if child is None:
                raise EngineError(f"{self.name} was not started")
            if not child.running:
                raise EngineError(f"{self.name} ended with {child.exit_text} while starting; {self.log_tail()}")
            if child.was_ready:
                return
            left = deadline_s - (time.monotonic() - began)
            if left <= 0:
                self.stop()
                raise EngineError(f"{self.name} was not ready within {deadline_s:.0f} s; {self.log_tail()}")
            child.was_ready = _answers(f"{self.url}/health", min(left, 5.0))
            if child.was_ready:
                return
            time.sleep(min(0.2, left))

    def stop(self) -> None:
        """Kill the server and everything that it started; returns when they are gone. Idempotent."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """Stop the server and give the ports back. Idempotent."""
        with self._lock:
            self._closed = True
        self.stop()
        for held in self._held:
            held.close()

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """Return where the log is, and its last lines."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = log.read(_LOG_TAIL_BYTES).decode(errors="replace")
        except OSError as error:
            return f"its log {self.log_path} cannot be read ({error.strerror})"
        return f"the end of {self.log_path}:\n" + "\n".join(text.splitlines()[-lines:])


class _Child:
    """One run of the server: its guard process, whose id is the process group's, and the pipe that keeps it."""

    def __init__(self, args_file: Path, environment: Mapping[str, str], log_path: Path):
        self.was_ready = False
        watched, self._held = os.pipe()
        scratch = ""
        try:
            scratch = tempfile.mkdtemp(prefix="oreal-sglang-")  # short: Unix sockets in it have at most 108 characters
            command = [sys.executable, str(_GUARD), str(watched), scratch]
            command += [sys.executable, "-m", "megatron_oreal.rollout.sglang.launch", str(args_file)]
            with open(log_path, "ab") as log:
                self._guard = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(watched,),
                    env=dict(environment) | {"TMPDIR": scratch},
                    start_new_session=True,
                )
        except OSError as error:
            os.close(self._held)
            shutil.rmtree(scratch, ignore_errors=True)
            raise EngineError(f"the SGLang server cannot be started: {error}") from None
        finally:
            os.close(watched)
        self.pid, self._scratch = self._guard.pid, scratch
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        """False once the guard has ended; then nothing of its group is left either."""
        with self._lock:
            if self._guard.returncode is not None:
                return False
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return True
            # Not collected yet, so the group's number is still its own. Members are left only if the guard was killed.
            guard.kill_group(self.pid)
            self._guard.wait()
            guard.clean(self._scratch, set())
            os.close(self._held)
            return False

    @property
    def exit_text(self) -> str:
        code = self._guard.returncode
        signalled = code is not None and (code < 0 or code > 128)
        return f"signal {-code if code < 0 else code - 128}" if signalled else f"exit status {code}"

    def kill(self) -> None:
        if not self.running:
            return
        with self._lock:
            if self._guard.returncode is None:
                os.close(self._held)
                self._held = os.open(os.devnull, os.O_RDONLY)  # closed again by ``running``
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGCONT)  # a stopped guard goes on, and sees the pipe's end
        end = time.monotonic() + _GONE_TIMEOUT_S
        while self.running:
            if time.monotonic() > end:
                guard.kill_group(self.pid)
            time.sleep(0.02)


def _hold_port(host: str) -> socket.socket:
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, 0))
    except OSError as error:
        held.close()
        raise UserError(
            f"rollout.server.host={host!r}: this machine cannot listen there ({error.strerror or error}): give an "
            "address of its own (hostname -I)"
        ) from None
    return held


def _answers(url: str, timeout_s: float) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    try:
        with direct.open(url, timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False
