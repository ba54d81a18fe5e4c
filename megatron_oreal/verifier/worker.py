"""A worker process of the pool: receives batches of items, sends one message an item.

The pool starts it as a fresh interpreter, not through multiprocessing, so that it does not run the trainer's main
module again and imports no torch. Its end is certain without any help of the parent: the kernel's interval timer kills
it (default action of SIGALRM, so no Python code and no interpreter lock is in the way) when an item passes its
deadline, and a watcher ends it when the parent is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_oreal.verifier.untimed import set_untimed
from megatron_oreal.verifier.verdict import Judgement, Verdict

READY = "ready"
LOADING = "loading"
"""Sent before a library is loaded inside an item, with the clock stopped; ``READY`` follows."""
RECYCLED = 75
"""Exit status of a worker that ends between two items: none of them is to blame."""
_PARENT_POLL_S = 0.5

Checker = Callable[..., "Judgement | bool | None"]
"""Called with (text, stopped, gold, finish_words, stop_words), and ``question=`` when it has such a parameter."""
Words = tuple[Sequence[str], Sequence[str]]
"""(thinking finish words, stop words)"""
Item = tuple[int, str, bool, str, str]
"""(number, response text, stopped, gold answer, question)"""
Message = tuple[int, str, str, str | None, float]
"""(number, verdict, reason, answer, seconds)"""


def load_checker(path: str) -> Checker:
    """Return the function at ``module:name``, taking ``question`` as a last argument whether it wants it or not."""
    module, _, name = path.partition(":")
    checker: Checker = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(checker).parameters.values()
    if any(p.name == "question" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return checker

    def without_question(*arguments: Any, question: str) -> Judgement | bool | None:
        return checker(*arguments)

    return without_question


def judge(checker: Checker, item: Item, words: Words) -> tuple[Judgement, bool]:
    """Judge one item; the second value is False when the process should not be used again (memory).

    A response that did not end with its stop word is wrong, whatever the checker is (algorithm.md, "One step" 2).
    """
    _, text, stopped, gold, question = item
    if not stopped:
        return Judgement(Verdict.WRONG, "truncated"), True
    try:
        return _as_judgement(checker(text, stopped, gold, *words, question=question)), True
    except MemoryError:
        return Judgement(Verdict.UNKNOWN, "memory limit of the worker exceeded"), False
    except ImportError as error:  # what is half imported would fail every item behind this one
        return Judgement(Verdict.UNKNOWN, f"checker failed: {type(error).__name__}: {error}"[:300]), False
    except RecursionError:
        return Judgement(Verdict.UNKNOWN, "nested too deeply"), True
    except Exception as error:
        return Judgement(Verdict.UNKNOWN, f"checker failed: {type(error).__name__}: {error}"[:300]), True


def _as_judgement(result: Judgement | bool | None) -> Judgement:
    if isinstance(result, Judgement):
        return result
    if result is None:
        return Judgement(Verdict.UNKNOWN, "checker undecided")
    if isinstance(result, bool):
        return Judgement(Verdict.CORRECT if result else Verdict.WRONG, "equal" if result else "not equal")
    raise TypeError(f"a checker returns a Judgement, a bool or None, not {type(result).__name__}")


def serve(connection: Connection, checker: Checker, deadline_s: float, words: Words) -> None:
    """Answer batches until the other end closes."""
    set_untimed(lambda: _stopped_clock(connection))
    connection.send(READY)
    while True:
        try:
            batch: list[Item] = connection.recv()
        except EOFError:
            return
        for item in batch:
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            judgement, reusable = judge(checker, item, words)
            signal.setitimer(signal.ITIMER_REAL, 0)
            message: Message = (
                item[0],
                judgement.verdict.value,
                judgement.reason,
                judgement.answer,
                time.perf_counter() - began,
            )
            connection.send(message)
            if not reusable:
                sys.exit(RECYCLED)


@contextlib.contextmanager
def _stopped_clock(connection: Connection) -> Iterator[None]:
    """Give an item the rest of its time after what runs inside; the pool allows that the time of a start."""
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send(LOADING)
    try:
        yield
    finally:
        connection.send(READY)
        signal.setitimer(signal.ITIMER_REAL, left)


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
