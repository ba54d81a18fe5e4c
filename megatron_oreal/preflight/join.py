"""The nodes of a training run come together before any rank is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.preflight.identity import node_facts, require_reachable_servers, require_same, server_override
from megatron_oreal.preflight.meeting import Meeting

if TYPE_CHECKING:
    from megatron_oreal.launch import Nodes


def join(nodes: Nodes, config: Config, look: Callable[[], None]) -> list[str]:
    """Meet the other nodes; returns overrides of this node's own: the address of its SGLang servers.

    ``look`` checks what this node can see by itself. Raises ``UserError``, the same on every node that came, for a
    mistake that one of them sees, nodes that do not come, and configs, code, packages or models that differ.
    """
    with Meeting(nodes.seat) as meeting:
        mine: dict[str, Any] = {"host": meeting.host}
        try:
            look()
            mine["facts"] = node_facts(config, nodes.nproc_per_node)
        except UserError as error:
            mine["error"] = str(error)
        found = meeting.gather(mine, "config")
        address = meeting.address
    for rank, item in enumerate(found):
        if "error" in item:
            raise UserError(f"node {rank} ({item['host']}): {item['error']}")
    require_same([item["facts"] for item in found])
    override = server_override(config, address, nodes.nnodes)
    if override is None:
        require_reachable_servers(config, [item["host"] for item in found])
        return []
    return [override]
