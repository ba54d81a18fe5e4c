"""Entry points of SGLang's scheduler processes, one a tensor-parallel rank. Imported in the server only."""

from __future__ import annotations

import os
from typing import Any

from megatron_oreal.rollout.sglang.guard import SEGMENTS


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's own scheduler process, with SGLang's own sampler."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    _note_segment(kwargs.get("port_args") or args[1])
    run_scheduler_process(*args, **kwargs)


def _note_segment(port_args: Any) -> None:
    """Tell the guard which shared-memory file SGLang will make, and will not remove when it is killed."""
    try:
        from sglang.srt.managers.load_snapshot import shm_path_for
    except ImportError:  # older and newer SGLang have none, or name it otherwise; the guard also looks for itself
        return
    with open(os.path.join(os.environ["TMPDIR"], SEGMENTS), "a", encoding="utf-8") as file:
        file.write(shm_path_for(port_args.instance_id) + "\n")


def run_counter_scheduler(*args: Any, **kwargs: Any) -> None:
    """The scheduler process with ``sampler.CounterSampler`` in the place of SGLang's PyTorch sampler."""
    from megatron_oreal.rollout.sglang.sampler import register

    register()
    run_scheduler(*args, **kwargs)
