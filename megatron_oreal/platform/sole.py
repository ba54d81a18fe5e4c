"""One training run a directory: two would take away each other's metrics and half-written checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_oreal.errors import UserError

LOCK_NAME = ".running"


@contextlib.contextmanager
def sole_run(work_dir: Path) -> Iterator[None]:
    """Hold ``work_dir`` for this process; it is free again when the process ends, however that ends.

    A POSIX lock: it holds across the nodes of a shared file system and is not passed on to children. On a file system
    without locks nothing is held. Raises ``UserError`` when another process has it, or it cannot be written to.
    """
    path = work_dir / LOCK_NAME
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"work_dir: cannot write {path}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read().strip() or "another process"
                raise UserError(
                    f"work_dir={str(work_dir)!r}: {who} is training in it: end that run, or give another work_dir; "
                    f"if its machine is gone, remove {path}"
                ) from None
        else:
            with contextlib.suppress(OSError):  # a full disk is told where it costs something
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield
