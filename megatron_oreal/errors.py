"""The one exception type that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a data file, a checkpoint or a command line.

    The message is one line that names the key or file, the value and the mend. The command line prints it after
    ``error:`` and exits with status 2; a traceback is reserved for our own defects.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest valid name, or the sorted list of names if nothing is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (valid: {', '.join(names)})"
