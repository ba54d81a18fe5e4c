"""Progress of a long phase on standard error: a live bar on a terminal, plain lines elsewhere, silence on ranks > 0."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import ClassVar, Protocol, Self, TextIO, cast

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL_S = 5.0


class Bar(Protocol):
    """What ``progress`` returns; use it as a context manager. ``update`` may be called from any thread."""

    def update(self, count: int = 1, extra: str = "") -> None:
        """``count`` more units are done. ``extra`` is shown behind the count until the next non-empty one."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress(
    label: str,
    total: int | None = None,
    unit: str = "",
    *,
    enabled: bool | None = None,
    stream: TextIO | None = None,
    interval_s: float = PLAIN_INTERVAL_S,
) -> Bar:
    """Show how far a long phase has come.

    ``with progress("generate", total=n, unit="responses") as bar: bar.update(k, extra="1234 tok/s")``

    On a terminal: a live bar that disappears at the end; bars that are open at the same time stand below each other.
    Elsewhere (a file, a CI log): a plain line at most every ``interval_s`` seconds and one at the end, no control
    characters. ``total`` None: only counted. ``enabled`` None: on when torchrun's ``RANK`` is 0 or not set.
    """
    if enabled is None:
        enabled = os.environ.get("RANK", "0") == "0"
    if not enabled:
        return _NoBar()
    stream = stream or sys.stderr
    if isinstance(stream, FileProxy):  # what rich puts in the place of sys.stderr while a live bar is on
        stream = cast(TextIO, stream.rich_proxied_file)
    # isatty and not rich's own guess: FORCE_COLOR, which CI services set, would put control characters into their logs.
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        return _LiveBar(label, total, unit, stream)
    return _PlainBar(label, total, unit, stream, interval_s)


class _NoBar:
    def update(self, count: int = 1, extra: str = "") -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _PlainBar:
    """``generate: 12/64 responses (19 %), 3 s, 13 s left, 1234 tok/s``."""

    def __init__(self, label: str, total: int | None, unit: str, stream: TextIO, interval_s: float) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._stream, self._interval_s = stream, interval_s
        self._lock = threading.Lock()
        self._done = 0
        self._extra = ""

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        return self

    def update(self, count: int = 1, extra: str = "") -> None:
        with self._lock:
            self._done += count
            self._extra = extra or self._extra
            now = time.monotonic()
            if now - self._printed < self._interval_s:
                return
            self._printed = now
            elapsed = now - self._began
            parts = [self._count(), _duration(elapsed)]
            if self._total and 0 < self._done < self._total:
                parts[0] += f" ({100 * self._done // self._total} %)"
                parts.append(f"{_duration(elapsed / self._done * (self._total - self._done))} left")
            self._write(*parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            elapsed = _duration(time.monotonic() - self._began)
            if kind is None:
                self._write(f"{self._count()} in {elapsed}")
            else:
                self._write(f"stopped at {self._count()} after {elapsed} ({kind.__name__})")

    def _count(self) -> str:
        return _count(self._done, self._total, self._unit)

    def _write(self, *parts: str) -> None:
        line = f"{self._label}: " + ", ".join((*parts, self._extra) if self._extra else parts)
        print("".join(c if c.isprintable() else " " for c in line), file=self._stream, flush=True)


class _LiveBar:
    """A task of the one live display of its stream: two displays on one terminal would overwrite each other."""

    _displays: ClassVar[dict[TextIO, Progress]] = {}
    _displays_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, label: str, total: int | None, unit: str, stream: TextIO) -> None:
        self._label, self._total, self._unit, self._stream = label, total, unit, stream

    def __enter__(self) -> Self:
        with self._displays_lock:
            display = self._displays.get(self._stream)
            if display is None:
                display = self._displays[self._stream] = _new_display(self._stream)
                display.start()
            self._display = display
            self._task = display.add_task(self._label, total=self._total, unit=self._unit, extra="")
        return self

    def update(self, count: int = 1, extra: str = "") -> None:
        if extra:
            self._display.update(self._task, advance=count, extra=extra)
        else:
            self._display.update(self._task, advance=count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._displays_lock:
            self._display.remove_task(self._task)
            if not self._display.tasks:
                self._display.stop()
                del self._displays[self._stream]


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_count(int(task.completed), task.total, task.fields["unit"]))


def _new_display(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _CountColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}", markup=False),
        console=Console(file=stream, force_terminal=True),
        transient=True,
        # rich would send what is printed meanwhile to this stream, also where standard output is a file.
        redirect_stdout=sys.stdout.isatty(),
    )


def _count(done: int, total: float | None, unit: str) -> str:
    return f"{done}/{total:.0f} {unit}".rstrip() if total is not None else f"{done} {unit}".rstrip()


def _duration(seconds: float) -> str:
    """``4.2 s``, ``1:05``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
