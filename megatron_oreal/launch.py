"""Start a command's ranks on this node, as torchrun does, without its traceback when a rank refuses a mistake."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oreal.errors import UserError
from megatron_oreal.preflight.meeting import JOIN_TIMEOUT_S, Seat


@dataclass(frozen=True)
class Nodes:
    """``nproc_per_node`` ranks on each of ``nnodes`` nodes; the other fields are needed for more than one node.

    ``join_timeout_s``: how long nodes wait for each other.
    """

    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "localhost"
    master_port: int = 29500
    join_timeout_s: float = JOIN_TIMEOUT_S

    @property
    def seat(self) -> Seat:
        """This node's place at the meeting of the nodes."""
        return Seat(self.nnodes, self.node_rank, self.master_addr, self.master_port, self.join_timeout_s)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nproc_per_node * self.nnodes


def threads_per_rank(nproc_per_node: int) -> int:
    """A rank's share of the cores that a scheduler or container lets this process use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // nproc_per_node)


def launch(arguments: Sequence[str], nodes: Nodes, *, quiet: bool = False) -> int:
    """Run ``python -m megatron_oreal ARGUMENTS`` on this node's ranks; returns the first failed rank's exit status.

    A rank's own one-line error is all that is printed for status 2; other failures are named in one line (``quiet``:
    in none). Raises ``UserError`` when the nodes do not come together within ``join_timeout_s``.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    single = nodes.nnodes == 1
    config = LaunchConfig(
        min_nodes=nodes.nnodes,
        max_nodes=nodes.nnodes,
        nproc_per_node=nodes.nproc_per_node,
        run_id=str(uuid.uuid4()) if single else "megatron-oreal",
        rdzv_backend="c10d" if single else "static",
        rdzv_endpoint="localhost:0" if single else f"{nodes.master_addr}:{nodes.master_port}",
        rdzv_configs={} if single else {"rank": nodes.node_rank, "timeout": max(1, int(nodes.join_timeout_s))},
        max_restarts=0,
        monitor_interval=0.2,
    )
    # Ranks on one node share its cores; without this each would start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(nodes.nproc_per_node)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megatron_oreal", *arguments)
    except SignalException as error:  # Ctrl-C, or a scheduler's SIGTERM: the ranks were ended with us
        return 128 + error.sigval
    except (DistNetworkError, DistStoreError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{nodes.seat.where}: the {nodes.nnodes} nodes do not come together ({said})") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status == 2:
            return 2
        if quiet:
            return 1
        how = f"was ended by signal {-status}" if status < 0 else f"exited with status {status}"
        print(f"error: rank {rank} {how}; its output is above", file=sys.stderr, flush=True)
        return 1
    return 0
