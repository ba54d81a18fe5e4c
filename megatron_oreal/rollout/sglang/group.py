"""The trainer ranks that share one server, and how they agree on what became of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist


class EngineGroup(Protocol):
    """``size`` neighbouring ranks of a node; the first (``rank`` 0) has the server. Every call is made by all."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """Return every member's value in order of rank on the first, None on the others."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return the first's value on all."""
        ...


class SoloGroup:
    """A process alone with its server."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return ``[value]``."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value


class RankGroup:
    """Members of a ``torch.distributed`` group of gloo (objects travel through host memory)."""

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._ranks = group, dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self._ranks)

    def gather(self, value: Any) -> list[Any] | None:
        """A collective of the group."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=self._ranks[0], group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        """A collective of the group."""
        box = [value]
        dist.broadcast_object_list(box, src=self._ranks[0], group=self._group)
        return box[0]
