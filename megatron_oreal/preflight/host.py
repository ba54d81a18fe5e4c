"""This machine apart from its GPUs: packages, memory, file descriptors, ports, variables."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_oreal.accelerators import survey
from megatron_oreal.config import Config
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.model_spec import ModelSpec
from megatron_oreal.preflight.result import Check, fail, ok, warning
from megatron_oreal.rollout.sglang.args import check_allocator

_GIB = 2**30
_SHARED_MEMORY = _GIB
"""NCCL's buffers between ranks of a node lie in /dev/shm; a container's default of 64 MiB does not hold them."""
_SPARE_DESCRIPTORS = 512
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel waits for the one before"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node talk through host memory"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked by another one"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a node talk over the network"),
}
_OFFLOADED_BYTES_IN_OPTIMIZER = 12
"""fp32 weights and two moments."""


def check_packages(device: str) -> Iterator[Check]:
    """Installed versions against those that setup.py asks for, and accelerated parts that do not load."""
    try:
        wanted = importlib.metadata.requires("megatron-oreal") or []
    except importlib.metadata.PackageNotFoundError:
        yield warning("packages", "megatron-oreal is not installed (pip install -e .): versions were not compared")
        return
    wrong = list(wrong_versions(wanted))
    if wrong:
        yield fail("packages", f"{'; '.join(wrong)}: pip install -e . again in this environment")
    else:
        yield ok("packages", f"as setup.py wants: torch {torch.__version__}, megatron-core {_version('megatron-core')}")
    if device == "cuda":
        for part in survey().parts:
            if part.status == "broken":
                yield warning(
                    "packages", f"{part.name} does not load ({part.detail}): mend it; instead: {part.instead}"
                )


def wrong_versions(requirements: list[str]) -> Iterator[str]:
    """Yield ``name version, wanted >=...`` for each requirement that the environment does not meet; extras aside."""
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield f"{requirement.name} is not installed, wanted {requirement.specifier or 'any'}"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found}, wanted {requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_descriptors(config: Config, world_size: int) -> Iterator[Check]:
    """Open files that rank 0 needs, a socket a request in flight, against what the process may ever have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted_descriptors(config, world_size)
    allowed = math.inf if hard == resource.RLIM_INFINITY else hard
    if allowed < wanted:
        yield warning(
            "open files",
            f"ulimit -Hn is {hard}, rank 0 wants {wanted} for its requests and judges: raise it (LimitNOFILE=, "
            "docker --ulimit nofile=), or lower rollout.server.requests_per_server; fewer requests will be in flight",
        )
    else:
        yield ok("open files", f"{wanted} wanted, ulimit -Hn {'unlimited' if math.isinf(allowed) else hard}")


def wanted_descriptors(config: Config, world_size: int) -> int:
    """Sockets of rank 0's dispatcher (one a request in flight), its judges' and a reserve."""
    rollout, verifier = config.rollout, config.verifier
    wanted = _SPARE_DESCRIPTORS
    if rollout.engine == "sglang":
        servers = max(1, world_size // rollout.engine_tp)
        samples = (rollout.prompts_per_step + rollout.oversample_prompts) * rollout.prompt_repeat_k
        wanted += min(servers * rollout.server.requests_per_server, samples) + servers
    if verifier.hosts:
        each = verifier.judge.concurrency_per_host
        total = verifier.num_processes * verifier.concurrency_per_proc[0]
        wanted += each * len(verifier.hosts) if each else total
    return wanted


def check_shared_memory(device: str, ranks_per_node: int, path: str = "/dev/shm") -> Iterator[Check]:
    """The size of /dev/shm, through which ranks of a node talk."""
    stats = os.statvfs(path)
    free = stats.f_bavail * stats.f_frsize
    if device == "cuda" and ranks_per_node > 1 and free < _SHARED_MEMORY:
        yield warning(
            "shared memory",
            f"{path} has {free / 2**20:.0f} MiB free, NCCL may want {_SHARED_MEMORY // 2**20}: docker --shm-size=16g, "
            "or an emptyDir of medium Memory",
        )
    else:
        yield ok("shared memory", f"{path} has {free / _GIB:.1f} GiB free")


def check_memory(config: Config, spec: ModelSpec, world_size: int, ranks_per_node: int, device: str) -> Iterator[Check]:
    """Pinned host memory of ``parallel.offload`` and of kept weights on this node against what is available."""
    available = available_memory()
    kept = kept_bytes(config, spec)
    needed = (offloaded_bytes(config, spec, world_size) + kept) * ranks_per_node if device == "cuda" else 0
    name = "host memory"
    what = "parallel.offload" + (" and rollout.server.keep_weights" if kept else "")
    share = f"{needed / _GIB:.0f} GiB pinned for {what}, {available / _GIB:.0f} GiB available"
    if needed > available:
        instead = "offload less, " + ("set rollout.server.keep_weights=false, " if kept else "")
        yield fail(name, f"{share}: {instead}use more nodes, or raise the container's limit")
    elif needed > 0.8 * available:
        yield warning(name, f"{share}: little is left for servers, the page cache and verifiers")
    else:
        yield ok(name, share if needed else f"{available / _GIB:.1f} GiB available")


def offloaded_bytes(config: Config, spec: ModelSpec, world_size: int) -> int:
    """Bytes of a rank that ``parallel.offload`` moves to the host, at an even split of the layers over pipeline stages.

    Optimizer state is 12 bytes a parameter (fp32 weights, two moments; 8 where the model itself is fp32), divided by
    the data-parallel size with the distributed optimizer; weights are replicated over it.
    """
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    replicas = max(1, world_size // model_ranks) if parallel.use_distributed_optimizer else 1
    itemsize = 2 if config.model.dtype == "bf16" else 4
    optimizer = _OFFLOADED_BYTES_IN_OPTIMIZER - (0 if itemsize == 2 else 4)
    policy = -(-spec.num_parameters() // model_ranks)
    scorer = -(-reward_model_parameters(spec) // model_ranks) if config.model.reward_model else 0
    bytes_of = {
        "policy": policy * itemsize,
        "reference": policy * itemsize,
        "optimizer": policy * optimizer // replicas,
        "reward_model": scorer * itemsize + scorer * optimizer // replicas,
    }
    return sum(bytes_of[name] for name in set(parallel.offload))


def kept_bytes(config: Config, spec: ModelSpec) -> int:
    """Bytes of an engine's shard that a rank keeps for a server that is started again."""
    rollout = config.rollout
    if rollout.engine != "sglang" or not rollout.server.keep_weights:
        return 0
    return -(-spec.num_parameters() // rollout.engine_tp) * (2 if config.model.dtype == "bf16" else 4)


def reward_model_parameters(spec: ModelSpec) -> int:
    """Parameters of the token reward model: the backbone and a scalar head."""
    return sum(math.prod(shape) for shape in hf_tensors(spec, reward_model=True).values())


def available_memory(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes that may still be used: the kernel's ``MemAvailable``, and what a container's or a job's limits leave.

    The page cache gives way, so a limit is not used up by files that were read; ``MemAvailable`` counts alike.
    """
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = int(match[1]) * 1024 if match else 0
    for folder in _control_groups(cgroups, own):
        names = ("memory.max", "memory.current", "active_file", "inactive_file")
        if not (folder / names[0]).is_file():  # version 1
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file")
        limit, used = folder / names[0], folder / names[1]
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
            stat = folder / "memory.stat"
            counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
            cached = sum(int(counts.get(name, 0)) for name in names[2:])
            free = min(free, int(limit.read_text()) - max(0, int(used.read_text()) - cached))
    return max(0, free)


def _control_groups(root: Path, own: Path) -> Iterator[Path]:
    """Every group that this process is in, of version 2 and of version 1's memory controller, outermost first.

    A container sees its own group as ``root``; a scheduler's job lies deeper. Some may not exist here.
    """
    yield from (root, root / "memory")
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            folder = root / "memory" if controllers else root
            for part in Path(path).parts[1:]:
                folder /= part
                yield folder


def check_environment(environment: Mapping[str, str]) -> Iterator[Check]:
    """Variables that are left over from looking for a fault and make every step slow."""
    left_over = [
        f"{name}={value} ({why})" for name, (value, why) in _SLOW.items() if environment.get(name, "").upper() == value
    ]
    if left_over:
        yield warning("environment", f"{'; '.join(left_over)}: unset")
    else:
        yield ok("environment", "nothing in it slows a run")


def check_server_allocator(config: Config, device: str, environment: Mapping[str, str]) -> Iterator[Check]:
    """Settings of PyTorch's CUDA allocator with which no server could map the trainer's weights."""
    if config.rollout.engine == "sglang" and device == "cuda":
        check_allocator(environment)
        yield ok("allocator", "ordinary segments, which SGLang's workers can map")


def check_ports(config: Config, ranks_per_node: int) -> Iterator[Check]:
    """Addresses and ports that SGLang servers of this node will listen on: two a server, which the kernel chooses."""
    if config.rollout.engine != "sglang":
        yield ok("ports", "no servers: rollout.engine=embedded")
        return
    host = config.rollout.server.host
    count = 2 * max(1, ranks_per_node // config.rollout.engine_tp)
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            held.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            held[-1].bind((host, 0))
    except OSError as error:
        yield fail(
            "ports",
            f"rollout.server.host={host!r}: this machine cannot listen there ({error.strerror or error}): give an "
            "address of its own (hostname -I)",
        )
    else:
        yield ok("ports", f"{count} free on {host} for {count // 2} servers")
    finally:
        for sock in held:
            sock.close()
