"""What the ranks of ``test_platform.py`` do; apart from it, so that they need not import Megatron."""

from __future__ import annotations

from typing import Any

from megatron_oreal import platform as platforms
from megatron_oreal.errors import UserError


def fail_in_all_ways() -> list[dict[str, Any]]:
    """Each way in a process group of its own, which the ranks join and leave."""
    answers = []
    for ranks in ([], [1], [0, 1]):
        platform = platforms.init_distributed("cpu", 300)
        answers.append(_fail_on(ranks, platform))
        platforms.shutdown_distributed()
    return answers


def _fail_on(ranks: list[int], platform: platforms.Platform) -> dict[str, Any]:
    def work() -> str:
        if platform.rank in ranks:
            raise UserError(f"rank {platform.rank} misses its file")
        return "done"

    answer: dict[str, Any] = {}
    try:
        answer["result"] = platform.fail_together(work)
    except UserError as error:
        answer["error"] = str(error)
    # The group must still be usable: nobody was left behind in a collective.
    answer["ranks"] = platform.gather_objects(platform.rank)
    answer["from rank 1"] = platform.broadcast_object(f"of {platform.rank}", source=1)
    return answer
