"""Where the seconds of a step go: named phases, nested, and what no phase covered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_oreal.telemetry import names


class PhaseTimers:
    """Wall-clock phases of one step.

    ``with timers("update"):`` adds to ``update``; ``with timers("forward"):`` inside it adds to ``update/forward``
    (the full name is understood too). A phase that is entered again adds up. Phases are timed on the thread that owns
    the object, on every rank; they write nothing.

    ``synchronize`` (``torch.cuda.synchronize`` on a GPU) is called where a phase begins and ends, so that asynchronous
    kernels count for the phase that launched them.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._open: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything; the step begins now."""
        self._require_closed()
        self._seconds: dict[str, float] = {}
        self._covered = 0.0
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase. The time counts too when the phase raises."""
        full = self._full_name(name)
        self._synchronize()
        began = time.perf_counter()
        self._open.append(full)
        try:
            yield
            # Not after an exception: a broken device would raise again here and hide the first cause.
            self._synchronize()
        finally:
            self._open.pop()
            seconds = time.perf_counter() - began
            self._seconds[full] = self._seconds.get(full, 0.0) + seconds
            if not self._open:
                self._covered += seconds

    def collect(self) -> dict[str, float]:
        """Seconds by metric name, then ``reset()``: the next step begins where this one ends.

        ``time/<phase>`` for each phase, ``time/step`` since the last ``reset()`` or ``collect()``, and ``time/other``,
        the part of it outside all phases. Raises ``RuntimeError`` inside a phase.
        """
        self._require_closed()
        step = time.perf_counter() - self._began
        seconds = {names.phase_metric(phase): value for phase, value in self._seconds.items()}
        seconds[names.TIME_OTHER] = max(0.0, step - self._covered)
        seconds[names.TIME_STEP] = step
        self.reset()
        return seconds

    def _full_name(self, name: str) -> str:
        if not self._open or name.startswith(self._open[-1] + "/"):
            full = name
        else:
            full = f"{self._open[-1]}/{name}"
        if names.phase_metric(full) in (names.TIME_OTHER, names.TIME_STEP):
            raise ValueError(f"phase '{full}' is a name that collect() fills in itself")
        return full

    def _require_closed(self) -> None:
        if self._open:
            raise RuntimeError(f"phase '{self._open[-1]}' is still open")
