"""What has to be the same on all nodes of a run: the config, the code, the packages, the model's files, the prompts."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_oreal
from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.platform import Platform

Facts = dict[str, Any]
"""Of one node, what JSON can hold; ``node_facts`` makes it."""

_PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "sglang", "transformer-engine", "flash-attn", "apex")
_OWN_VALUES = ("rollout.server.host",)
"""Keys that each node may have a value of its own for."""
_HASHED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MEND = {
    "config": "start every node with the same file and overrides",
    "code": "install the same version of megatron_oreal on every node",
    "packages": "install the same versions on every node",
    "ranks a node": "give every node the same --nproc-per-node",
    "model": "copy the same directory to every node, or put it on a shared file system",
    "prompts": "copy the same file to every node, or put it on a shared file system",
    "environment": "export the same variables on every node",
    "driver": "install the same driver on every node",
}
_SOFT = ("environment", "driver")
"""Differences that a run survives."""


def node_facts(config: Config, ranks_per_node: int, driver: str | None = None) -> Facts:
    """This node's facts: small enough to be sent to every other one (some kilobytes)."""
    return {
        "host": socket.gethostname(),
        "config": _flat_config(config),
        "code": {"megatron-oreal": f"{megatron_oreal.__version__} ({_code_digest()})"},
        "packages": {name: _version(name) for name in _PACKAGES},
        "ranks a node": {"--nproc-per-node": ranks_per_node},
        "model": model_files(config.model.path),
        "prompts": prompt_files(config),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
        "driver": {"driver": driver},
    }


def differences(facts: Sequence[Facts], *, soft: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (kind, one line with the first difference and its mend) for every kind that differs between nodes.

    ``soft``: those that a run survives, instead of those that it does not.
    """
    first = facts[0]
    for kind, mend in _MEND.items():
        if (kind in _SOFT) != soft:
            continue
        for node, other in enumerate(facts):
            ours, theirs = first.get(kind, {}), other.get(kind, {})  # other code may know other kinds
            unlike = [key for key in [*ours, *theirs] if ours.get(key, "") != theirs.get(key, "")]
            if not unlike:
                continue
            key = unlike[0]
            more = f" (and {len(set(unlike)) - 1} more)" if len(set(unlike)) > 1 else ""
            yield (
                kind,
                f"{key} is {_shown(ours, key)} on node 0 ({first['host']}) and {_shown(theirs, key)} on "
                f"node {node} ({other['host']}){more}: {mend}",
            )
            break


def require_same(facts: Sequence[Facts]) -> None:
    """Raise ``UserError`` with the first difference between nodes that would spoil a run."""
    for kind, line in differences(facts):
        raise UserError(f"the nodes differ in their {kind}: {line}")


def require_same_ranks(config: Config, platform: Platform) -> None:
    """The same between the nodes of a process group, a collective of all ranks; each node's first rank speaks for it.

    Refused too are SGLang servers that only their own node could reach.
    """
    first_of_node = platform.rank % platform.ranks_per_node == 0
    mine = platform.fail_together(lambda: node_facts(config, platform.ranks_per_node) if first_of_node else None)
    facts = [item for item in platform.gather_objects(mine, "the other nodes' config") if item is not None]
    require_same(facts)
    require_reachable_servers(config, [item["host"] for item in facts])


def require_reachable_servers(config: Config, hosts: Sequence[str]) -> None:
    """Raise ``UserError`` when servers on several machines have an address that names none; rank 0 draws from all."""
    address = config.rollout.server.host
    if config.rollout.engine == "sglang" and len(set(hosts)) > 1 and is_loopback(address):
        raise UserError(
            f"rollout.server.host={address!r} is reached from its own node only, and there are {len(set(hosts))}: "
            "start with megatron-oreal train --nnodes, which finds every node's address, or give each node its own"
        )


def server_override(config: Config, address: str, nnodes: int) -> str | None:
    """The override that has a node's servers listen at ``address``, None where the config's own is right."""
    if nnodes == 1 or config.rollout.engine != "sglang" or not is_loopback(config.rollout.server.host):
        return None
    return f"rollout.server.host={address}"


def is_loopback(address: str) -> bool:
    """Whether an address means the machine itself to whoever uses it, as that of all its interfaces does too."""
    return address in ("localhost", "::1", "0.0.0.0", "::") or address.startswith("127.")


def model_files(path: str | Path) -> dict[str, str]:
    """Name -> size in bytes of every file of a model directory, with a digest of the small ones that shape a run."""
    found = {}
    for file in sorted(Path(path).glob("[!.]*")):
        try:
            if file.is_file():
                found[file.name] = f"{file.stat().st_size} bytes"
                if file.name in _HASHED or file.name.endswith(".index.json"):
                    found[file.name] += f" ({hashlib.sha256(file.read_bytes()).hexdigest()[:12]})"
        except OSError as error:  # what cannot be read is said where it is needed
            found[file.name] = error.strerror or "unreadable"
    return found


def prompt_files(config: Config) -> dict[str, str]:
    """Key -> size and digest of each prompt set that is a file here. Every rank reads its own node's."""
    found = {}
    for key, source in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        path = Path(source or "")
        try:
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
                found[key] = f"{path.stat().st_size} bytes ({digest})"
        except OSError as error:  # what cannot be read is said where it is needed
            found[key] = error.strerror or "unreadable"
    return found


def _flat_config(config: Config) -> dict[str, str]:
    return {key: value for key, value in _flat(config.model_dump(mode="json")) if key not in _OWN_VALUES}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of the package's Python sources, whatever their place and dates are."""
    root = Path(megatron_oreal.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _matters(name: str) -> bool:
    """Variables that change how ranks talk or compute; those that name a node's own parts are left out."""
    own = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")
    return name.startswith(("NCCL_", "TORCH_NCCL_", "NVTE_", "OREAL_")) and name not in own


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "absent"
