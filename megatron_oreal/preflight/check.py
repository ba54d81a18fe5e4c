"""``megatron-oreal check``: is everything there that a run needs, on every node, before a model is built?"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_oreal.config import Config
from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.launch import Nodes, launch
from megatron_oreal.layout.model_spec import ModelSpec, load_model_spec
from megatron_oreal.preflight import devices, fabric, host, storage
from megatron_oreal.preflight.identity import differences, node_facts, require_reachable_servers, server_override
from megatron_oreal.preflight.meeting import Meeting
from megatron_oreal.preflight.result import (
    Check,
    NodeReport,
    as_json,
    as_text,
    checked,
    fail,
    ok,
    summary,
    warning,
)

_NODE_TIMEOUT_S = 900.0
"""How long nodes wait for the slowest one's checks: its judges have deadlines of their own."""
_CLOCK_S = 5.0


class Table(Protocol):
    """Where the nodes of a run put something down and see what the others have."""

    def gather(self, item: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """One item of each node, in the order of nodes, on every node."""
        ...


class Alone:
    """The table of a single node."""

    def gather(self, item: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """Only this node's item."""
        return [item]


@dataclass(frozen=True)
class Place:
    """This node among the others."""

    nnodes: int
    node_rank: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nnodes * self.ranks_per_node


def check(arguments: argparse.Namespace, nodes: Nodes) -> int:
    """Run the command on this node; returns 0, or 1 when a check failed on any node."""
    config = load_config(arguments.config, arguments.overrides)
    if not 0 < arguments.fabric_timeout <= 86400:
        raise UserError(f"--fabric-timeout={arguments.fabric_timeout:g}: must be above 0 and at most 86400 seconds")
    if arguments.min_bandwidth is not None and not arguments.min_bandwidth >= 0:
        raise UserError(f"--min-bandwidth={arguments.min_bandwidth:g}: must be 0 or more GB/s")
    if "LOCAL_RANK" in os.environ:
        return _under_torchrun(arguments, config)
    place = Place(nodes.nnodes, nodes.node_rank, nodes.nproc_per_node)
    try:
        with ExitStack() as stack:
            table: Table = Alone()
            if nodes.nnodes > 1:
                table = stack.enter_context(Meeting(nodes.seat))
                config = own_address(config, table.address, nodes)
            reports = check_nodes(config, place, table)
    except UserError as error:  # nodes that do not meet
        reports = [NodeReport(nodes.node_rank, socket.gethostname(), [fail("nodes", str(error))])]
    if arguments.fabric and summary(reports) is None:
        found = _fabric(arguments, config, nodes)
        reports = [replace(report, checks=[*report.checks, found]) for report in reports]
    return _say(arguments, reports, speaks=nodes.node_rank == 0)


def own_address(config: Config, address: str, nodes: Nodes) -> Config:
    """The config of this node of several: its SGLang servers listen where the other nodes reach it."""
    override = server_override(config, address, nodes.nnodes)
    if override is None:
        return config
    changed = config.model_copy(deep=True)
    changed.rollout.server.host = address
    return changed


def check_nodes(config: Config, place: Place, table: Table) -> list[NodeReport]:
    """All checks but the fabric's: this node's own, then what must agree. Every node gets the reports of all."""
    nonce = secrets.token_hex(8)
    hostname = socket.gethostname()
    local = _local(config, place)
    with ExitStack() as stack:
        if place.node_rank == 0:
            local += checked("work_dir", lambda: _place_nonce(config.work_path, nonce, stack))
        wrote = place.node_rank == 0 and local[-1].status == "ok"
        mine = {
            "facts": node_facts(config, place.ranks_per_node, devices.installed_driver()),
            "nonce": nonce if wrote else None,
        }
        hello = table.gather(mine, "checks", _NODE_TIMEOUT_S)
        now = time.time()
        if place.node_rank and hello[0]["nonce"] is not None:
            first = hello[0]["facts"]["host"]
            local += checked("work_dir", lambda: storage.check_seen(config.work_path, hello[0]["nonce"], first))
        facts = [item["facts"] for item in hello]
        own = {"host": hostname, "time": now, "checks": [vars(item) for item in local]}
        gathered = table.gather(own, "findings", _NODE_TIMEOUT_S)
    reports = [
        NodeReport(rank, item["host"], [Check(**found) for found in item["checks"]])
        for rank, item in enumerate(gathered)
    ]
    if place.nnodes > 1:
        times = [item["time"] for item in gathered]
        shared = checked("nodes", lambda: _agreement(config, facts)) + checked("clocks", lambda: _clocks(times, facts))
        reports[0] = replace(reports[0], checks=[*reports[0].checks, *shared])
    return reports


def _place_nonce(work_dir: Path, nonce: str, stack: ExitStack) -> Iterator[Check]:
    try:
        stack.enter_context(storage.nonce_file(work_dir, nonce))
    except OSError as error:
        yield fail("work_dir", f"work_dir={str(work_dir)!r} cannot be written to ({error.strerror}): use another")
    else:
        yield ok("work_dir", f"{work_dir.absolute()} can be written to")


def _local(config: Config, place: Place) -> list[Check]:
    """What this node finds by itself."""
    device = "cpu" if config.device == "cpu" or devices.torch_says() is not None else "cuda"
    world, per_node = place.world_size, place.ranks_per_node
    spec: ModelSpec | None = None

    def shape() -> Iterator[Check]:
        nonlocal spec
        with of_key("model.path"):
            spec = load_model_spec(config.model.path)
        from megatron_oreal.config_check import check_config

        check_config(config, spec, world, per_node)
        yield ok("config", f"{world} ranks on {place.nnodes} nodes, work_dir {config.work_dir}")

    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("config", shape),
        ("gpus", lambda: devices.check_gpus(config.device, per_node)),
        ("interconnect", lambda: devices.check_interconnect(device, place.nnodes, per_node)),
        ("packages", lambda: host.check_packages(device)),
        ("open files", lambda: host.check_descriptors(config, world)),
        ("shared memory", lambda: host.check_shared_memory(device, per_node)),
        ("environment", lambda: host.check_environment(os.environ)),
        ("allocator", lambda: host.check_server_allocator(config, device, os.environ)),
        ("ports", lambda: host.check_ports(config, per_node)),
        ("verifier", lambda: _verifier(config)),
    ]
    found = [item for name, look in looks for item in checked(name, look)]
    if spec is not None:
        known = spec
        found += checked("host memory", lambda: host.check_memory(config, known, world, per_node, device))
        found += checked("model", lambda: storage.check_model(config, known))
        found += checked("data", lambda: storage.check_data(config, known))
        found += checked("disk", lambda: storage.check_disk(config, known))
    return found


def _verifier(config: Config) -> Iterator[Check]:
    """Every judge host gives a verdict to this node, by the verifier's own request."""
    if not config.verifier.hosts:
        yield ok("verifier", "verifier.hosts=[]: the rules alone")
        return
    from megatron_oreal.verifier import Verifier

    alone = config.verifier.model_copy(deep=True)
    alone.judge.cache = None  # nothing is written
    with Verifier(alone, stop_words=[config.model.stop_word], work_dir=config.work_path) as verifier:
        complaints = verifier.check()
    for complaint in complaints:
        yield warning("verifier", f"verifier.hosts: {complaint}: start it again, or take it out")
    if not complaints:
        yield ok("verifier", f"{len(alone.hosts)} judge hosts give verdicts: {', '.join(alone.hosts)}")


def _agreement(config: Config, facts: Sequence[dict[str, Any]]) -> Iterator[Check]:
    require_reachable_servers(config, [item["host"] for item in facts])
    found = [fail("nodes", f"differ in their {kind}: {line}") for kind, line in differences(facts)]
    found += [warning("nodes", f"differ in their {kind}: {line}") for kind, line in differences(facts, soft=True)]
    yield from found
    if not found:
        hosts = ", ".join(dict.fromkeys(str(item["host"]) for item in facts))
        yield ok("nodes", f"{len(facts)} with one config, code, packages and model ({hosts})")


def _clocks(times: Sequence[float], facts: Sequence[dict[str, Any]]) -> Iterator[Check]:
    """Read within moments of each other; what is left is the clocks."""
    late = max(range(len(times)), key=lambda node: abs(times[node] - times[0]))
    apart = times[late] - times[0]
    if abs(apart) > _CLOCK_S:
        yield warning(
            "clocks",
            f"node {late} ({facts[late]['host']}) is {apart:+.0f} s off node 0: run chrony or ntpd, or logs and dates "
            "of files do not compare",
        )
    else:
        yield ok("clocks", f"within {abs(apart):.1f} s of each other")


def _fabric(arguments: argparse.Namespace, config: Config, nodes: Nodes) -> Check:
    """Start the ranks and read what they found. ``SystemExit`` when a signal has ended them."""
    if nodes.world_size == 1:
        return ok("fabric", "one rank: nothing to measure")
    with tempfile.TemporaryDirectory(prefix="oreal-fabric-") as folder:
        ranks = ["check", arguments.config, *arguments.overrides, "--fabric", "--fabric-folder", folder]
        ranks += ["--fabric-timeout", str(arguments.fabric_timeout)]
        try:
            status = launch(ranks, nodes, quiet=True)
        except UserError as error:
            return fail("fabric", str(error))
        if status > 128:  # Ctrl-C or a scheduler: nothing was found out
            raise SystemExit(status)
        first = nodes.node_rank * nodes.nproc_per_node
        found = fabric.read_result(Path(folder), range(first, first + nodes.nproc_per_node), arguments.fabric_timeout)
    return found if isinstance(found, Check) else fabric.judge(found, arguments.min_bandwidth)


class _RankTable:
    """The nodes of a process group; every rank takes part, the first of each node speaks for it."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform
        self.speaks = platform.rank % platform.ranks_per_node == 0

    def gather(self, item: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        found = self._platform.gather_objects((item,) if self.speaks else None, what)
        return [entry[0] for entry in found if entry is not None]


def _under_torchrun(arguments: argparse.Namespace, config: Config) -> int:
    """One process a rank already: those of a check started by ``torchrun``, or by ``--fabric``."""
    if arguments.fabric_folder is not None:
        return fabric.fabric_rank(config, arguments.fabric_folder, arguments.fabric_timeout)
    from megatron_oreal import platform as platforms

    cpu = config.model_copy(update={"device": "cpu" if devices.torch_says() is not None else config.device})
    platform = platforms.init_distributed(cpu.device, int(_NODE_TIMEOUT_S))
    table = _RankTable(platform)
    per_node = platform.ranks_per_node
    place = Place(platform.world_size // per_node, platform.rank // per_node, per_node)
    if table.speaks:
        reports = check_nodes(config, place, table)
    else:  # the same two rounds
        table.gather(None, "checks")
        table.gather(None, "findings")
        reports = []
    reports = platform.broadcast_object(reports, what="the findings")
    if arguments.fabric and summary(reports) is None:
        with fabric.Stages(None, arguments.fabric_timeout, platform.rank) as stages:
            found = fabric.measure(platform, stages)
        result = fabric.judge(found, arguments.min_bandwidth) if found else ok("fabric", "one rank: nothing to measure")
        reports = [replace(report, checks=[*report.checks, result]) for report in reports]
    platforms.shutdown_distributed()
    return _say(arguments, reports, speaks=platform.rank == 0)


def _say(arguments: argparse.Namespace, reports: Sequence[NodeReport], *, speaks: bool) -> int:
    """Print the findings once, on node 0 (or where the nodes did not meet), and one line on what failed everywhere."""
    if speaks or len(reports) == 1:
        print(as_json(reports) if arguments.json else as_text(reports), flush=True)
    failed = summary(reports)
    if failed is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {failed}", file=sys.stderr, flush=True)
    return 0 if failed is None else 1
