"""A real SGLang server for tests: started once, and given to one engine after the other."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oreal.layout import SafetensorsSource, load_from_hf, load_model_spec
from megatron_oreal.rollout.sglang import args as arguments
from megatron_oreal.rollout.sglang.dispatcher import Dispatcher, DispatchSettings
from megatron_oreal.rollout.sglang.engine import SglangEngine
from megatron_oreal.rollout.sglang.process import ServerProcess
from megatron_oreal.rollout.sglang.settings import ServerSettings

SETUP = Path(__file__).with_name("setup_sglang.sh")
needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason=f"needs sglang: bash {SETUP} PYTHON puts it into PYTHON's venv"
)
MAX_LENGTH = 400
"""Within the 512 positions of the contract's models."""


def make_engine(
    model_dir: Path, folder: Path, *, slots: int = 64, server: ServerProcess | None = None, tp: int = 1, **options: Any
) -> SglangEngine:
    """An fp32 engine on the CPU; a server of its own unless one is given. ``slots``: requests it has at a time."""
    settings = options.pop("settings", None) or fast_settings(window=slots)
    return SglangEngine(
        load_model_spec(model_dir),
        model_path=model_dir,
        folder=folder,
        dtype=torch.float32,
        tp=tp,
        max_running_requests=64,
        max_length=MAX_LENGTH,
        settings=settings,
        server=server,
        **options,
    )


def stage_hf_weights(engine: SglangEngine, model_dir: Path, version: int) -> None:
    """Bring a checkpoint to the engine as a trainer brings its weights: group by group, through the two buckets."""
    (shard,) = engine.layout.shards
    weights = {name: torch.zeros(shape) for name, shape in shard.params}
    with SafetensorsSource(model_dir) as source:
        load_from_hf(source, shard, weights)
    handover = engine.stage(version)
    assert len(handover.groups) > 3
    for number, group in enumerate(handover.groups):
        buffers = handover.open(number)
        for name in group:
            buffers[name].copy_(weights[name])
        handover.hand_over(number)
    engine.load_weights(version)
    engine.release_staging()


def fast_settings(window: int = 64, *, max_restarts: int = 3, control_timeout_s: float = 60.0, **changes: Any) -> Any:
    """Deadlines that a test can wait for, and buckets that a small model fills several times."""
    dispatch = {
        "health_interval_s": 1.0,
        "health_timeout_s": 60.0,
        "recover_timeout_s": 400.0,
        "step_deadline_s": 500.0,
    }
    return ServerSettings(
        window=window,
        start_timeout_s=400.0,
        control_timeout_s=control_timeout_s,
        max_restarts=max_restarts,
        bucket_bytes=changes.pop("bucket_bytes", 16384),
        keep_weights=changes.pop("keep_weights", True),
        dispatch=DispatchSettings(**(dispatch | changes)),
    )


class SharedServer:
    """At most one server at a time, of the model that was asked for last; at most one engine on it."""

    def __init__(self, server_args: dict[str, Any] | None = None, tp: int = 1):
        self.dispatcher = Dispatcher(fast_settings().dispatch)
        self._user, self._tp = server_args or {}, tp
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-tests-")
        self._servers: dict[str, ServerProcess] = {}
        self._engine: SglangEngine | None = None

    def engine(self, model_dir: Path, **options: Any) -> SglangEngine:
        """A new engine; the one before is shut down, its server stays when it is of the same architecture."""
        if self._engine is not None:
            self._engine.shutdown()
        server = self._server(model_dir)
        folder = Path(self._folder.name)
        options |= {"dispatcher": self.dispatcher, "server_args": self._user, "tp": self._tp}
        self._engine = make_engine(model_dir, folder, server=server, **options)
        return self._engine

    def _server(self, model_dir: Path) -> ServerProcess:
        architecture = model_dir.name.rsplit("-", 1)[0]
        if architecture not in self._servers:
            for other in self._servers.values():
                other.stop()
            folder, device = Path(self._folder.name), torch.device("cpu")
            final = arguments.server_args(
                self._user,
                model_dir=arguments.write_model_dir(model_dir, folder / f"{architecture}.model", MAX_LENGTH),
                device=device,
                dtype=torch.float32,
                tp=self._tp,
                max_running_requests=64,
                max_length=MAX_LENGTH,
            )
            environment = arguments.server_environment(device, [], self._tp)
            self._servers[architecture] = ServerProcess(final, environment, folder, name=architecture)
        server = self._servers[architecture]
        if server.pid is None:
            server.start()
            server.wait_ready(400.0)
        return server

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        for server in self._servers.values():
            server.close()
        self.dispatcher.close()
        self._folder.cleanup()


def processes() -> dict[int, str]:
    """Every other process of the machine: its command line, what of shared memory it maps, and what it has open."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                mapped = [word for word in (entry / "maps").read_text().split() if word.startswith("/dev/shm/")]
                found[int(entry.name)] = " ".join([line, *mapped, *open_files(entry.name)])
    return found


def open_files(pid: int | str) -> list[str]:
    """Targets of a process's descriptors; sockets and pipes have numbers that none has again."""
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def holders(port: int) -> list[str]:
    """``processes`` that have a TCP socket of this port, as listeners or at their end of a connection."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    return [text for text in processes().values() if not sockets.isdisjoint(text.split())]


def left_over(before: Sequence[str]) -> list[str]:
    """Shared-memory files and scratch directories of SGLang that were not there ``before``, and that nobody uses.

    Other tests may run servers at the same time; theirs belong to living processes, but for a moment after they were
    made and before they are removed.
    """
    found = set(_files()) - set(before)
    for _ in range(20):
        if not found:
            break
        time.sleep(0.5)
        living = processes().values()
        found = {path for path in found & set(_files()) if not any(path in text for text in living)}
    return sorted(found)


def _files() -> list[str]:
    return [str(path) for path in [*Path("/dev/shm").glob("sgl*"), *Path(tempfile.gettempdir()).glob("oreal-sglang-*")]]
