"""Ports for servers that a test starts under a number it has chosen before."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_FIRST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(count: int = 1) -> int:
    """The first of ``count`` neighbouring ports that are free, and stay it until they are used.

    They lie below those that the kernel gives to whoever asks for any: a server or a connection of a test that runs at
    the same time would take one of them in the seconds until the port is listened on.
    """
    below = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 2**15
    ours = range(_FIRST, below - count) if below > 2 * _FIRST else range(2 * _FIRST, 2**16 - count)
    while True:
        port = random.SystemRandom().choice(ours)
        try:
            with ExitStack() as held:
                for number in range(port, port + count):
                    held.enter_context(socket.create_server(("", number)))
        except OSError:
            continue
        return port
