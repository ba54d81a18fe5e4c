"""A ``verifier.checker`` that judges as ``mixed_checker`` does, and once makes a server of the run fail.

``OREAL_TEST_FAULT`` is the fault as JSON: ``work_dir``; ``signal``; ``after``: so many responses of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import mixed_checker

from megatron_oreal.rollout.sglang.guard import group_members
from megatron_oreal.verifier.verdict import Judgement

VICTIM = "engine001"


def judge_response(
    text: str, stopped: bool, gold: str, finish_words: Sequence[str] = (), stop_words: Sequence[str] = ()
) -> Judgement:
    """As ``mixed_checker.judge_response``."""
    fault = json.loads(os.environ["OREAL_TEST_FAULT"])
    work_dir = Path(fault["work_dir"])
    with (work_dir / "responses").open("ab", buffering=0) as file:
        file.write(b".")
        count = file.tell()  # of all that every process has appended
    if count == fault["after"]:
        members = group_members(leader_of(work_dir))
        (work_dir / "victims").write_text(json.dumps(members))
        for pid in members[1:] if fault["signal"] == "SIGKILL" else members:  # the first is the guard
            with contextlib.suppress(ProcessLookupError):  # gone with another one
                os.kill(pid, getattr(signal, fault["signal"]))
    return mixed_checker.judge_response(text, stopped, gold, finish_words, stop_words)


def leader_of(work_dir: Path) -> int:
    """The process group of the victim: its guard's id."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "guard.py" in " ".join(words) and str(work_dir / "sglang" / f"{VICTIM}.json") in words:
                return int(entry.name)
    raise AssertionError(f"{VICTIM} does not run")
