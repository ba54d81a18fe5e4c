"""The small process between the trainer and an SGLang server, that lets nothing of the server outlive either.

``python guard.py PIPE_FD SCRATCH COMMAND ...`` in a session of its own runs the command in its process group and ends
it when the command ends, or when the pipe ends whose other side only the trainer holds: with all of the group's
processes, the scratch directory and the shared-memory segments that they had mapped, which SGLang leaves behind when
it is killed. The kernel's parent-death signal is SIGCONT here, so that a stopped guard does its work too. A guard that
is killed itself takes the server along: the server's parent-death signal is SIGKILL (``launch.py``), as SGLang sets it
for its workers.

Standard library only, run as a file: importing the package would cost a hundred megabytes.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

SEGMENTS = "segments"
"""File in the scratch directory, in which the server's processes note shared-memory files that they will make."""

_SEGMENTS_OF_SERVERS = ("/dev/shm/sgl", "/dev/shm/sem.mp-", "/dev/shm/psm_")
_PR_SET_PDEATHSIG = 1
_LOOK_S = 2.0
_GONE_TIMEOUT_S = 10.0


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def group_members(group: int) -> list[int]:
    """Ids of the process group's processes that still run (not of those that are dead and only not collected)."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat", encoding="latin-1") as file:
                fields = file.read().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in "ZX":
                    members.append(int(entry))
    return members


def kill_group(group: int, *, but: int = 0) -> bool:
    """Kill the members of a group and wait until they are gone; False when some are left after ten seconds."""
    end = time.monotonic() + _GONE_TIMEOUT_S
    while members := [pid for pid in group_members(group) if pid != but]:
        if time.monotonic() > end:
            return False
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return True


def shared_segments(group: int) -> set[str]:
    """SGLang's and multiprocessing's files in /dev/shm that members of the group have mapped or open."""
    found = set()
    for pid in group_members(group):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="latin-1") as file:
            found |= {line.split(maxsplit=5)[5].strip() for line in file if "/dev/shm/" in line}
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(entry.path))
    return {path for path in found if path.startswith(_SEGMENTS_OF_SERVERS)}


def stop_group(group: int, *, but: int = 0) -> None:
    """Stop the members of a group, so that none makes anything new."""
    for pid in group_members(group):
        if pid != but:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)


def clean(scratch: str, segments: set[str]) -> None:
    """Remove segments, those that are noted in the scratch directory too, and that directory. Idempotent."""
    with contextlib.suppress(OSError), open(os.path.join(scratch, SEGMENTS), encoding="utf-8") as file:
        segments |= set(file.read().split())
    for path in segments:
        with contextlib.suppress(OSError):
            os.unlink(path)
    shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    """Run the command; returns its exit status, 128 + the signal's number when one ended it."""
    pipe, scratch, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    set_parent_death_signal(signal.SIGCONT)
    group = os.getpid()
    server = subprocess.Popen([*command, str(group)], stdin=subprocess.DEVNULL)
    segments: set[str] = set()
    poll = select.poll()
    for source in (pipe, os.pidfd_open(server.pid)):
        poll.register(source, select.POLLIN | select.POLLHUP)
    while not poll.poll(_LOOK_S * 1000):
        segments |= shared_segments(group)
    stop_group(group, but=group)
    segments |= shared_segments(group)
    kill_group(group, but=group)
    code = server.wait()
    clean(scratch, segments)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
