"""Rules first, then the judge: one place to hand a response in and to get its verdict back.

Order: what the rules call correct is correct. A response that did not end with its stop word is wrong. The rest goes to
the judge when there is one; without one the rules' word stands. A thread of its own moves items from the worker
processes to the judge, so a response is verified while its rank still generates, and handing one in costs microseconds.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_oreal.errors import UserError
from megatron_oreal.verifier.pool import VerifierPool, VerifyItem
from megatron_oreal.verifier.verdict import Judgement, Verdict

if TYPE_CHECKING:
    from megatron_oreal.config import VerifierConfig
    from megatron_oreal.verifier.judge_stats import JudgeStats

_POLL_S = 1.0
_STALL_S = 150.0
"""What a verdict may take beyond the deadlines of its worker and its judge: a worker's start on a loaded machine."""


class Verifier:
    """Worker processes with the rules, and the judge where the config names hosts; best as a context manager.

    Results come in the order in which they are ready, exactly one for each ``submit``. All methods but ``submit`` are
    for one thread. ``stop_words`` are removed from the end of a response; ``work_dir`` is where a relative
    ``verifier.judge.cache`` lies. Raises ``UserError`` for a checker or a cache that cannot be used.
    """

    def __init__(self, config: VerifierConfig, *, stop_words: Sequence[str] = (), work_dir: Path | None = None) -> None:
        self._config = config
        self._stall_s = config.deadline_s + _STALL_S + (config.judge.deadline_s if config.hosts else 0.0)
        self._inbox: deque[VerifyItem] = deque()
        self._items: dict[Hashable, VerifyItem] = {}
        self._done: queue.SimpleQueue[tuple[Hashable, Judgement] | BaseException] = queue.SimpleQueue()
        self._in_flight: set[Hashable] = set()
        self._closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        with contextlib.ExitStack() as stack:
            stack.callback(self._wake_in.close)
            stack.callback(self._wake_out.close)
            self._pool = stack.enter_context(VerifierPool.from_config(config, stop_words))
            self.judge = None
            if config.hosts:
                # Imported here: it brings aiohttp with it, a third of a second that rules alone do not need.
                from megatron_oreal.verifier.judge import Judge

                cache = None if config.judge.cache is None else (work_dir or Path()) / config.judge.cache
                self.judge = stack.enter_context(Judge(config, self._take, stop_words=stop_words, cache=cache))
            self._pool.wait_until_ready()
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
        self._thread.start()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of items submitted and not yet handed back."""
        return len(self._in_flight)

    def check(self) -> list[str]:
        """Ask the judge's hosts for a verdict; returns complaints. ``UserError`` when none of them answers."""
        return [] if self.judge is None else self.judge.check()

    def stats(self) -> JudgeStats | None:
        """Counts of the judge since the last call, None without one."""
        return None if self.judge is None else self.judge.stats()

    def submit(self, key: Hashable, text: str, gold: str, *, stopped: bool = True, question: str = "") -> None:
        """Queue one response and return at once; ``ValueError`` when ``key`` is in flight already."""
        self._require_open()
        if key in self._in_flight:
            raise ValueError(f"an item with key {key!r} is in flight already")
        self._in_flight.add(key)
        self._inbox.append(VerifyItem(key, text, gold, stopped, question))
        self._wake()

    def drain(self, timeout_s: float = 0) -> list[tuple[Hashable, Judgement]]:
        """Return what has been decided since the last call, waiting up to ``timeout_s`` seconds for a first one."""
        self._require_open()
        found: list[tuple[Hashable, Judgement]] = []
        end = time.monotonic() + timeout_s
        while self._in_flight:
            left = 0.0 if found else max(0.0, end - time.monotonic())
            try:
                result = self._done.get(timeout=left) if left else self._done.get_nowait()
            except queue.Empty:
                break
            found.append(self._hand_back(result))
        return found

    def results(self) -> Iterator[tuple[Hashable, Judgement]]:
        """Yield (key, judgement) as they come until nothing is in flight. ``RuntimeError`` when none comes for long."""
        self._require_open()
        while self._in_flight:
            try:
                result = self._done.get(timeout=self._stall_s)
            except queue.Empty:
                keys = ", ".join(map(repr, list(self._in_flight)[:3]))
                raise RuntimeError(
                    f"no verdict for {self._stall_s:.0f} s, longer than all deadlines together, while waiting for "
                    f"{len(self._in_flight)} items ({keys}, ...), {len(self._items)} of them with the rules"
                ) from None
            yield self._hand_back(result)

    def verify(
        self, items: Sequence[VerifyItem], on_result: Callable[[VerifyItem, Judgement], None] | None = None
    ) -> list[Judgement]:
        """Judge all ``items``, in their order; ``on_result`` sees each as it comes. Nothing else may be in flight."""
        if self._in_flight:
            raise ValueError(f"{len(self._in_flight)} items are in flight; drain them first")
        by_key = {item.key: item for item in items}
        for item in items:
            self.submit(item.key, item.text, item.gold, stopped=item.stopped, question=item.question)
        judgements: dict[Hashable, Judgement] = {}
        for key, judgement in self.results():
            judgements[key] = judgement
            if on_result is not None:
                on_result(by_key[key], judgement)
        return [judgements[item.key] for item in items]

    def close(self) -> None:
        """Kill the workers, drop what is in flight, end both threads; may be called again."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._stack.close()
        self._in_flight.clear()

    def _require_open(self) -> None:
        if self._closing:
            raise RuntimeError("the verifier is closed")

    def _hand_back(self, result: tuple[Hashable, Judgement] | BaseException) -> tuple[Hashable, Judgement]:
        if isinstance(result, UserError):
            raise result
        if isinstance(result, BaseException):
            raise RuntimeError(f"the verifier's workers failed: {result}") from result
        self._in_flight.discard(result[0])
        return result

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._wake_out.send(b"\0")

    def _run(self) -> None:
        """The thread: from the inbox to the workers, and from them to the judge or out."""
        try:
            while not self._closing:
                while self._inbox:
                    item = self._inbox.popleft()
                    self._items[item.key] = item
                    self._pool.submit(item.key, item.text, item.gold, stopped=item.stopped, question=item.question)
                for key, judgement in self._pool.drain(_POLL_S, self._wake_in):
                    self._route(self._items.pop(key), judgement)
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(1 << 16)
        except BaseException as error:
            self._done.put(error)

    def _route(self, item: VerifyItem, judgement: Judgement) -> None:
        if self.judge is None or judgement.verdict is Verdict.CORRECT or not item.stopped:
            self._take(item.key, judgement)
        else:
            self.judge.submit(item.key, item.question, item.gold, item.text, judgement)

    def _take(self, key: Hashable, judgement: Judgement) -> None:
        self._done.put((key, judgement))
