"""Loading of libraries, which no item is to blame for: a worker stops the item's clock meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

Around = Callable[[], contextlib.AbstractContextManager[None]]
_around: list[Around] = [contextlib.nullcontext]


def untimed() -> contextlib.AbstractContextManager[None]:
    """A context for the first import of a large library inside a checker; does nothing outside a worker process."""
    return _around[0]()


def set_untimed(around: Around) -> None:
    """Say what ``untimed`` does in this process; for ``worker``."""
    _around[0] = around
