"""The launchers of a run's nodes meet at the master address, before any rank is started.

Plain sockets with a deadline: every node learns who came and with what, and a node that cannot be reached, came twice
or never came is named in one line. Node 0 has closed its listening socket when the others go on, so whatever uses the
port next (torch's rendezvous) finds it free and is not mistaken for the meeting.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from megatron_oreal.errors import UserError

JOIN_TIMEOUT_S = 300.0
"""By default, how long nodes wait for each other."""

_MAGIC = "megatron-oreal"
_HELLO_S = 10.0
_RETRY_S = 0.5
_MAX_LINE = 16 * 2**20


@dataclass(frozen=True)
class Seat:
    """A node's place: ``node_rank`` of ``nnodes``; node 0 listens on ``master_port``, the others come to it."""

    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    timeout_s: float = JOIN_TIMEOUT_S

    @property
    def where(self) -> str:
        """The options that say where the nodes meet."""
        return f"--master-addr={self.master_addr} --master-port={self.master_port}"


@dataclass
class _Peer:
    """A connection that lines travel on; ``host`` is how the other side calls itself."""

    link: socket.socket
    host: str = ""
    _rest: bytes = field(default=b"", repr=False)

    def send(self, message: dict[str, Any], timeout_s: float) -> None:
        self.link.settimeout(timeout_s)
        self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message. ``OSError`` when none comes in time or the other side has gone, ``ValueError`` for junk."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")
            self.link.settimeout(left)
            more = self.link.recv(65536)
            if not more:
                raise ConnectionError("it has ended the connection")
            self._rest += more
            if len(self._rest) > _MAX_LINE:
                raise ValueError("a line too long")
        line, self._rest = self._rest.split(b"\n", 1)
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def has_left(self) -> bool:
        """Whether the other side has ended the connection."""
        self.link.settimeout(0)
        try:
            return not self.link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Meeting:
    """All nodes of a run at one table; a context manager. Collective: every node makes the same calls.

    Raises ``UserError`` on every node that can be told: node 0 is not reached, or a node has not come, within
    ``seat.timeout_s``; two nodes have one rank; the nodes do not agree on their number; the port is taken.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.host = socket.gethostname()
        self.address = "127.0.0.1"
        """This node's own address, as the nodes reach each other."""
        self._peers: dict[int, _Peer] = {}
        self._deadline = time.monotonic() + seat.timeout_s
        try:
            if seat.node_rank == 0:
                self._host_meeting()
            else:
                self._join()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. Idempotent."""
        for peer in self._peers.values():
            peer.link.close()
        self._peers.clear()

    def gather(self, item: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """Every node's ``item`` (what JSON can hold), in the order of nodes, on every node. ``what`` is for errors."""
        timeout_s = self.seat.timeout_s if timeout_s is None else timeout_s
        if self.seat.node_rank:
            return self._ask(item, what, timeout_s)
        items = [item]
        end = time.monotonic() + timeout_s
        for rank in range(1, self.seat.nnodes):
            peer = self._peers[rank]
            try:
                items.append(peer.receive(max(0.1, end - time.monotonic()))["item"])
            except (OSError, ValueError, KeyError) as error:
                self._refuse(f"node {rank} ({peer.host}) has not sent its {what}: {error}; see its output")
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # one that has gone is found in the next round, or by torch
                peer.send({"items": items}, timeout_s)
        return items

    def _ask(self, item: Any, what: str, timeout_s: float) -> list[Any]:
        peer = self._peers[0]
        try:
            peer.send({"item": item}, timeout_s)
            reply = peer.receive(timeout_s + _HELLO_S)
        except (OSError, ValueError) as error:
            raise UserError(
                f"node 0 at {self.seat.where} is gone while {what} was awaited ({error}): see its output"
            ) from None
        if "refused" in reply:
            raise UserError(str(reply["refused"]))
        return list(reply["items"])

    def _host_meeting(self) -> None:
        seat = self.seat
        with self._listen() as server:
            while self._forget_who_left() < seat.nnodes - 1:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    missing = [str(rank) for rank in range(1, seat.nnodes) if rank not in self._peers]
                    self._refuse(
                        f"{len(self._peers) + 1} of --nnodes={seat.nnodes} nodes came to {seat.where} within "
                        f"{seat.timeout_s:g} s (missing: --node-rank {', '.join(missing)}): start them, or see why "
                        "they do not reach this port"
                    )
                server.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    link, _ = server.accept()
                    self._receive_guest(_Peer(link))
        for rank in sorted(self._peers):
            with contextlib.suppress(OSError):
                self._peers[rank].send({"welcome": self.host}, _HELLO_S)

    def _listen(self) -> socket.socket:
        seat = self.seat
        server = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        try:
            if server.family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", seat.master_port))
            server.listen(1024)
        except (OSError, OverflowError) as error:
            server.close()
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "is taken on this node: another run may be there; choose another one" if taken else f"({error})"
            raise UserError(f"--master-port={seat.master_port} {why}") from None
        return server

    def _forget_who_left(self) -> int:
        """Guests that are still there; one that was ended while it waited may be started again."""
        for rank in [rank for rank, peer in self._peers.items() if peer.has_left()]:
            self._peers.pop(rank).link.close()
        return len(self._peers)

    def _receive_guest(self, guest: _Peer) -> None:
        """Seat a node; a connection that does not speak as one is dropped."""
        seat = self.seat
        try:
            hello = guest.receive(_HELLO_S)
            rank, nnodes = int(hello["node_rank"]), int(hello["nnodes"])
            guest.host = str(hello["host"])
            known = hello["magic"] == _MAGIC and (0 <= rank < nnodes)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            known = False
        if not known:
            guest.link.close()
            return
        self._forget_who_left()
        problem = None
        if nnodes != seat.nnodes:
            problem = (
                f"--nnodes={nnodes} on node {rank} ({guest.host}), --nnodes={seat.nnodes} on node 0 ({self.host}): "
                "start all nodes with the same number"
            )
        elif rank in self._peers or rank == 0:
            first = self.host if rank == 0 else self._peers[rank].host
            problem = f"--node-rank={rank} was given twice, on {first} and on {guest.host}: number the nodes from 0"
        self._peers[rank if problem is None else -1] = guest
        if problem:
            self._refuse(problem)
        self.address = _plain(guest.link.getsockname()[0])

    def _refuse(self, problem: str) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.send({"refused": problem}, _HELLO_S)
        raise UserError(problem)

    def _join(self) -> None:
        seat = self.seat
        reason = ""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{seat.where}: node 0 was not reached within {seat.timeout_s:g} s ({reason or 'no answer'}): "
                    "start it with --node-rank 0, and check the name, the port and the firewall"
                )
            try:
                link = socket.create_connection((seat.master_addr, seat.master_port), timeout=min(left, 10.0))
            except (OSError, OverflowError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                time.sleep(min(_RETRY_S, max(0.0, left)))
                continue
            peer = _Peer(link)
            hello = {"magic": _MAGIC, "node_rank": seat.node_rank, "nnodes": seat.nnodes, "host": self.host}
            try:
                peer.send(hello, _HELLO_S)
                reply = peer.receive(max(0.1, self._deadline - time.monotonic() + _HELLO_S))
            except (OSError, ValueError) as error:  # something else listens there, or node 0 is starting again
                link.close()
                reason = f"what listens there does not answer as node 0 of this run does: {error}"
                time.sleep(min(_RETRY_S, max(0.0, left)))
                continue
            self._peers[0] = peer
            if "refused" in reply:
                raise UserError(str(reply["refused"]))
            peer.host = str(reply.get("welcome", ""))
            self.address = _plain(link.getsockname()[0])
            return


def _plain(address: str) -> str:
    """An IPv4 address without the prefix that it has on a socket of both families."""
    return address.removeprefix("::ffff:")
