"""What a server process needs of its machine, and what is said when it is not there. No SGLang is started here."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang import process
from megatron_oreal.rollout.sglang.process import ServerProcess


def make(folder: Path, host: str = "127.0.0.1") -> ServerProcess:
    return ServerProcess({}, dict(os.environ), folder, host=host)


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def test_readiness_is_asked_of_the_server_itself_and_not_of_a_proxy(monkeypatch):
    with socket.socket() as closed, HTTPServer(("127.0.0.1", 0), Healthy) as server:
        closed.bind(("127.0.0.1", 0))  # bound and not listening
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert process._answers(f"http://127.0.0.1:{server.server_port}/health", 60.0)
        server.shutdown()


def test_the_end_of_a_log_is_read_without_the_rest(tmp_path: Path):
    server = make(tmp_path)
    assert "cannot be read (No such file or directory)" in server.log_tail()
    with open(server.log_path, "wb") as log:
        log.truncate(2**26)
        log.seek(0, os.SEEK_END)
        log.write(b"\nfirst\nlast \xff\n")
    tracemalloc.start()
    tail = server.log_tail(2)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert tail == f"the end of {server.log_path}:\nfirst\nlast \N{REPLACEMENT CHARACTER}"
    server.log_path.write_text("alone\n")
    assert server.log_tail() == f"the end of {server.log_path}:\nalone"
    server.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "::1"])
def test_an_address_of_another_machine_is_a_mistake_in_one_line(tmp_path: Path, host: str):
    with pytest.raises(UserError, match=rf"^rollout\.server\.host='{host}': this machine cannot listen th") as caught:
        make(tmp_path, host)
    assert "\n" not in str(caught.value)


def test_a_server_without_a_place_for_its_files_fails_as_an_engine_and_can_be_started_later(tmp_path, monkeypatch):
    server = make(tmp_path)
    before = pipes()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(EngineError, match=r"the SGLang server cannot be started: .*No such file or directory"):
            server.start()
    assert pipes() - before == set(), "the pipe is closed"
    assert server.pid is None and not server.was_started
    server.start()
    assert server.was_started
    assert pipes() - before, "the pipe whose end the guard waits for"
    server.close()
    assert pipes() - before == set()


def pipes() -> set[str]:
    """Of this process, by numbers that none has again."""
    links = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{entry}"))
    return {link for link in links if link.startswith("pipe:")}
