"""All-reduce bandwidth over all ranks, with a deadline: a fabric that hangs is found, and does not hang the check.

Bus bandwidth as nccl-tests define it: 2 (n - 1) / n x bytes / seconds for n ranks, the rate at which a ring moves bytes
through every link, whatever n is. Seconds are those of the slowest rank, the mean of the timed calls.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oreal import platform as platforms
from megatron_oreal.config import Config
from megatron_oreal.platform import Platform
from megatron_oreal.preflight.devices import link_kind, rdma_ports
from megatron_oreal.preflight.result import Check, fail, ok

LEAST_GB_S = {"gloo": 0.01, "NVLink": 50.0, "PCIe": 3.0, "RDMA": 10.0, "TCP": 0.5}
"""Default of ``--min-bandwidth`` by kind, GB/s of bus bandwidth: an order of magnitude under what the kind can do, so
that what fails is broken (a link down, RDMA not in use), not a little slow."""

_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
_CALLS = {"cuda": (5, 20), "cpu": (1, 4)}  # warm-up, timed


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of bus bandwidth over ``num_ranks``; ``by_node``: within each node, by host, where there are several.

    ``kinds``: what joins the GPUs of each node, by host.
    """

    kind: str
    num_ranks: int
    message_bytes: int
    gb_s: float
    by_node: dict[str, float]
    kinds: dict[str, str] = field(default_factory=dict)


def bus_bandwidth(num_ranks: int, message_bytes: int, seconds: float) -> float:
    """GB/s (10^9 bytes) of an all-reduce of ``message_bytes`` a rank."""
    return 2 * (num_ranks - 1) / num_ranks * message_bytes / seconds / 1e9


def judge(found: Bandwidth, least_gb_s: float | None = None) -> Check:
    """The measured bandwidths against the least that is expected of their kinds; ``least_gb_s``: over all ranks."""
    least = LEAST_GB_S[found.kind] if least_gb_s is None else least_gb_s
    nodes = ""
    if found.by_node:
        slowest = min(found.by_node, key=lambda host: found.by_node[host])
        nodes = f"; within a node {found.by_node[slowest]:.3g} or more (least on {slowest})"
    text = (
        f"all-reduce of {found.message_bytes // 2**20} MiB over {found.num_ranks} ranks ({found.kind}): bus bandwidth "
        f"{found.gb_s:.3g} GB/s{nodes}"
    )
    if found.gb_s < least:
        return fail(
            "fabric",
            f"{text}, less than --min-bandwidth={least:g}: NCCL_DEBUG=INFO shows the path that NCCL takes; mend the "
            "link or lower the threshold",
        )
    for host, kind in found.kinds.items():  # the slowest link of all hides behind the network's threshold
        if found.by_node[host] < LEAST_GB_S[kind]:
            return fail(
                "fabric",
                f"within {host} the all-reduce has a bus bandwidth of {found.by_node[host]:.3g} GB/s, less than "
                f"{LEAST_GB_S[kind]:g} for {kind}: see nvidia-smi nvlink --status and NCCL_P2P_DISABLE there, or leave "
                "the node out",
            )
    return ok("fabric", text)


class Stages:
    """Where a rank is, in a file for the launcher; ends the process when ``deadline_s`` pass before ``done``."""

    def __init__(self, folder: Path | None, deadline_s: float, rank: int) -> None:
        self._rank = rank
        self._file = None if folder is None else folder / f"rank_{rank}.json"
        self._deadline_s = deadline_s
        self._stage, self._number, self._is_done = "", 0, False
        self._writing = threading.Lock()
        """The deadline may come while a state is written; it ends the process before or after that, not between."""
        self._timer = threading.Timer(deadline_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Stages:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def at(self, stage: str) -> None:
        """Say what is waited for from now on."""
        with self._writing:
            self._stage, self._number = stage, self._number + 1
            self._write({"stage": stage, "number": self._number})

    def done(self, found: Bandwidth) -> None:
        """Leave the result."""
        with self._writing:
            self._is_done = True
            self._write({"found": vars(found)})

    def failed(self, error: Exception) -> None:
        """Leave the reason."""
        with self._writing:
            self._write({"stage": self._stage, "error": " ".join(str(error).split())[:300]})

    def _write(self, state: dict[str, Any]) -> None:
        if self._file is not None:
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(state))
            partial.replace(self._file)

    def _end(self) -> None:
        self._writing.acquire()  # for good
        if self._file is None:
            line = f"error: rank {self._rank} has waited {self._deadline_s:.0f} s for {self._stage}"
            print(f"{line}: --fabric-timeout", file=sys.stderr, flush=True)
        elif not self._is_done:
            self._write({"stage": self._stage, "number": self._number, "waited": True})
        os._exit(0 if self._file is not None else 1)  # threads inside NCCL or gloo do not end otherwise


def fabric_rank(config: Config, folder: Path, deadline_s: float) -> int:
    """Be one of the ranks that ``--fabric`` starts: join, measure, leave what was found in ``folder``; exit status.

    What the rank waits for is written to ``folder`` too; the process is ended at the deadline.
    """
    with Stages(folder, deadline_s, int(os.environ["RANK"])) as stages:
        stages.at("all ranks to join the process group")
        try:
            # Its own deadline is later than ours, which says what was waited for.
            platform = platforms.init_distributed(config.device, int(deadline_s) + 60)
            found = measure(platform, stages)
        except Exception as error:  # whatever it is, it is the finding
            stages.failed(error)
            os._exit(1)  # a broken communicator may hang at Python's end, behind the deadline
        if found is not None:
            stages.done(found)
        platforms.shutdown_distributed()
        return 0


def measure(platform: Platform, stages: Stages) -> Bandwidth | None:
    """Bandwidth over all ranks of the process group, a collective of them; None for a single rank."""
    if platform.world_size == 1:
        return None
    device = platform.device.type
    message = torch.empty(_BYTES[device] // 4, dtype=torch.float32, device=platform.device)
    stages.at("the first all-reduce of all ranks")
    message.fill_(platform.rank + 1)
    dist.all_reduce(message)
    wanted = platform.world_size * (platform.world_size + 1) / 2
    if not bool((message == wanted).all()):
        raise RuntimeError(f"an all-reduce of 1..{platform.world_size} gave other sums than {wanted:g}")
    stages.at(f"all-reduces of {_BYTES[device] // 2**20} MiB over all ranks")
    seconds = _timed(message, None, platform)
    per_node = platform.ranks_per_node
    by_node: dict[str, float] = {}
    kinds: dict[str, str] = {}
    num_nodes = platform.world_size // per_node
    if num_nodes > 1 and per_node > 1:
        stages.at("all-reduces within the nodes")
        own = None
        for node in range(num_nodes):
            group = dist.new_group(list(range(node * per_node, (node + 1) * per_node)))
            own = group if platform.rank // per_node == node else own
        inside = bus_bandwidth(per_node, _BYTES[device], _timed(message, own, platform))
        link = _kind(device, 1, per_node) if platform.rank % per_node == 0 else None
        for host, gb_s, kind in platform.gather_objects((socket.gethostname(), inside, link)):
            by_node[host] = min(gb_s, by_node.get(host, gb_s))
            if kind is not None:
                kinds[host] = kind
    slowest = max(platform.gather_objects(seconds))
    found = bus_bandwidth(platform.world_size, _BYTES[device], slowest)
    kind = platform.broadcast_object(_kind(device, num_nodes, per_node))
    return Bandwidth(kind, platform.world_size, _BYTES[device], found, by_node, kinds)


def _timed(message: torch.Tensor, group: dist.ProcessGroup | None, platform: Platform) -> float:
    """Mean seconds of an all-reduce on this rank."""
    warm_up, timed = _CALLS[platform.device.type]
    message.zero_()
    for _ in range(warm_up):
        dist.all_reduce(message, group=group)
    platform.synchronize()
    began = time.perf_counter()
    for _ in range(timed):
        dist.all_reduce(message, group=group)
    platform.synchronize()
    return (time.perf_counter() - began) / timed


def _kind(device: str, num_nodes: int, ranks_per_node: int) -> str:
    if device == "cpu":
        return "gloo"
    if num_nodes == 1:
        return link_kind(ranks_per_node)
    return "RDMA" if rdma_ports(Path("/sys/class/infiniband"))[0] else "TCP"


def read_result(folder: Path, ranks: Sequence[int], deadline_s: float) -> Bandwidth | Check:
    """What the ranks of this node left in ``folder``: the bandwidth, or a failure that names the rank to look at."""
    states = dict(_states(folder, ranks))
    for rank, state in states.items():
        if "error" in state:
            return fail("fabric", f"rank {rank} failed while it waited for {state['stage']}: {state['error']}")
    waiting = {rank: state for rank, state in states.items() if "found" not in state}
    if waiting:
        rank = min(waiting, key=lambda number: waiting[number].get("number", 0))  # the others wait for it
        stage = waiting[rank].get("stage", "its start")
        if not any("waited" in state for state in waiting.values()):
            return fail(
                "fabric",
                f"a rank of this node ended by itself, while rank {rank} waited for {stage}: see its output above; "
                "NCCL_DEBUG=INFO says more",
            )
        return fail(
            "fabric",
            f"rank {rank} has waited {deadline_s:.0f} s for {stage}: look for a rank or node that is missing, a "
            "firewall between the nodes, or a wrong NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more",
        )
    return Bandwidth(**states[ranks[0]]["found"])


def _states(folder: Path, ranks: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in ranks:
        try:
            yield rank, json.loads((folder / f"rank_{rank}.json").read_text())
        except (OSError, ValueError):
            yield rank, {}
