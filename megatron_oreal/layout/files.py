"""Files that cannot be read or written, said in one line that names the file and the mend."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_oreal.errors import UserError

WRITE_MENDS = {
    errno.ENOSPC: "free some space, or write to another file system",
    errno.EDQUOT: "your quota is used up: free some space, or write to another file system",
    errno.EFBIG: "the file system or `ulimit -f` allows no file of this size: use smaller shards",
    errno.ENOENT: "it has gone, or a rank that writes does not see the file system of the first",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.EROFS: "choose a directory that you may write to",
    errno.EEXIST: "a part of the path is a file: choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.ENOTEMPTY: "something else wrote there meanwhile: remove it, or choose another directory",
}
_READ_MENDS = {
    errno.EACCES: "you need the permission to read it, and to enter the directories above it",
    errno.EPERM: "you need the permission to read it, and to enter the directories above it",
    errno.ENOENT: "it is missing, or a link to nowhere",
    errno.EISDIR: "a file is expected there",
    errno.ENOTDIR: "a part of the path is a file",
}


def _number(error: Exception) -> int | None:
    """``errno`` of a failure; safetensors tells it in words only."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return number


def _reason(number: int | None, error: Exception) -> str:
    return os.strerror(number) if number else " ".join(str(error).split())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into a ``UserError`` that names the file and says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        # of a copy or a rename, the second is what could not be written
        name = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        mend = WRITE_MENDS.get(number or 0, "check the disk and its permissions")
        raise UserError(f"{name}: cannot be written ({_reason(number, error)}): {mend}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read ``path`` into a ``UserError`` that names the file and the mend."""
    try:
        yield
    except OSError as error:
        name = getattr(error, "filename", None) or path
        mend = _READ_MENDS.get(error.errno or 0, "check the disk and its permissions")
        raise UserError(f"{name}: cannot be read ({_reason(error.errno, error)}): {mend}") from error


def check_readable(path: Path) -> None:
    """Raise ``UserError`` unless a file can be opened: libraries report what the system refuses as damage."""
    with reading(path), path.open("rb"):
        pass


def is_file(path: Path) -> bool:
    """Whether a file is there; ``UserError`` when the directories above it may not be entered."""
    with reading(path):
        return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ``UserError`` when that is not possible or not what the file holds."""
    with reading(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
