"""The process that becomes an SGLang server: ``python -m megatron_oreal.rollout.sglang.launch ARGS.json PARENT_PID``.

``guard.py`` starts it, ``process.ServerProcess`` writes its arguments.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from megatron_oreal.rollout.sglang.guard import set_parent_death_signal


def main() -> None:
    """Serve until killed; a failure to start goes to standard error, which is the server's log."""
    args_file, parent = sys.argv[1], int(sys.argv[2])
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    with open(args_file, encoding="utf-8") as file:
        settings = json.load(file)

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    from megatron_oreal.rollout.sglang import worker

    scheduler = worker.run_counter_scheduler if settings["counter_sampler"] else worker.run_scheduler
    launch_server(ServerArgs(**settings["server_args"]), run_scheduler_process_func=scheduler)


if __name__ == "__main__":
    main()
