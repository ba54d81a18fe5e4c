"""A worker process of the pool: receives batches of items, sends one message an item.

The pool starts it as a fresh interpreter, not through multiprocessing, so that it does not run the trainer's main
module again and imports no torch. Its end is certain without any help of the parent: the kernel's interval timer kills
it (default action of SIGALRM, so no Python code and no interpreter lock is in the way) when an item passes its
deadline, and a watcher ends it when the parent is gone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from megatron_oreal.verifier.verdict import Judgement, Verdict

READY = "ready"
RECYCLED = 75
"""Exit status of a worker that ends between two items: none of them is to blame."""
_PARENT_POLL_S = 0.5

Checker = Callable[[str, bool, str, Sequence[str], Sequence[str]], Judgement]
Words = tuple[Sequence[str], Sequence[str]]
"""(thinking finish words, stop words)"""
Item = tuple[int, str, bool, str]
"""(number, response text, stopped, gold answer)"""


def load_checker(path: str) -> Checker:
    """Return the function at ``module:name``; it takes (text, stopped, gold, finish_words, stop_words)."""
    module, _, name = path.partition(":")
    checker: Checker = getattr(importlib.import_module(module), name)
    return checker


def judge(checker: Checker, item: Item, words: Words) -> tuple[Judgement, bool]:
    """Judge one item; the second value is False when the process should not be used again (memory)."""
    _, text, stopped, gold = item
    try:
        return checker(text, stopped, gold, *words), True
    except MemoryError:
        return Judgement(Verdict.UNKNOWN, "memory limit of the worker exceeded"), False
    except RecursionError:
        return Judgement(Verdict.UNKNOWN, "nested too deeply"), True
    except Exception as error:
        return Judgement(Verdict.UNKNOWN, f"checker failed: {type(error).__name__}: {error}"[:300]), True


def serve(connection: Connection, checker: Checker, deadline_s: float, words: Words) -> None:
    """Answer batches until the other end closes."""
    connection.send(READY)
    while True:
        try:
            batch: list[Item] = connection.recv()
        except EOFError:
            return
        for item in batch:
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            judgement, reusable = judge(checker, item, words)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send((item[0], judgement.verdict.value, judgement.reason, judgement.answer))
            if not reusable:
                sys.exit(RECYCLED)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one worker on an inherited socket; for ``VerifierPool``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--deadline-s", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--checker", required=True)
    parser.add_argument("--finish-word", action="append", default=[])
    parser.add_argument("--stop-word", action="append", default=[])
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    threading.Thread(target=_end_with_parent, args=(args.parent,), daemon=True).start()
    checker = load_checker(args.checker)
    limit = args.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(args.fd) as connection:
        try:
            serve(connection, checker, args.deadline_s, (tuple(args.finish_word), tuple(args.stop_word)))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)
