"""The one exception type that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# More names than this are no help in a line.
_MOST_NAMES = 60


class UserError(ValueError):
    """A mistake in a config, a data file, a checkpoint or a command line.

    The message is one line that names the key or file, the value and the mend. The command line prints it after
    ``error:`` and exits with status 2; a traceback is reserved for our own defects.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest valid name, or the sorted names if nothing is close.

    Of more than 60 names only how many there are.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    if len(names) > _MOST_NAMES:
        return f" (none of the {len(names)} valid names is like it)"
    return f" (valid: {', '.join(names)})"


def seen_from(path: Path) -> str:
    """``" (seen from DIRECTORY)"`` behind a relative path that names nothing; nothing behind an absolute one."""
    return "" if path.is_absolute() else f" (seen from {Path.cwd()})"


@contextmanager
def of_key(key: str) -> Iterator[None]:
    """Put the config key whose value is being read before a ``UserError`` that names a file alone."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
