"""Verdicts of the judge on disk, shared by all processes of a run and by later runs.

One text file to which every process appends one line a verdict with a single ``write`` to a descriptor opened with
``O_APPEND``; a process reads on from where it stood when it looks for what it does not have. There is no lock to be
left behind by a killed process. Every line has a checksum and begins with a line break: a torn line (a crash, a full
disk, a network file system without atomic appends) costs that one entry. Of two verdicts on one key the first in the
file holds, for every reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

from megatron_oreal.errors import UserError
from megatron_oreal.verifier.judge_prompt import PROMPT_VERSION, Case
from megatron_oreal.verifier.verdict import Verdict

_LETTERS = {Verdict.CORRECT: b"C", Verdict.WRONG: b"W"}
_VERDICTS = {letter: verdict for verdict, letter in _LETTERS.items()}


def cache_key(case: Case, model: str, votes: int) -> str:
    """Return the key of a case: question, gold and answer with white space normalised, model, votes, prompt version."""
    parts = [
        PROMPT_VERSION,
        model,
        votes,
        *(" ".join(text.split()) for text in (case.question, case.gold, case.answer)),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class JudgeCache:
    """The file at ``path``; for one thread of each process. ``UserError`` when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._verdicts: dict[bytes, Verdict] = {}
        self._rest = b""
        self._read = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"verifier.judge.cache: {str(path)!r} cannot be written ({error.strerror}): give another path, or null"
            ) from None
        self._catch_up()

    def __len__(self) -> int:
        """Return the number of verdicts read so far."""
        return len(self._verdicts)

    def get(self, key: str) -> Verdict | None:
        """Return the verdict on ``key``, also one that another process has written meanwhile."""
        name = bytes.fromhex(key)
        if name not in self._verdicts:
            self._catch_up()
        return self._verdicts.get(name)

    def put(self, key: str, verdict: Verdict) -> None:
        """Append a verdict, which is ``CORRECT`` or ``WRONG``. ``OSError`` when the disk is full."""
        body = key.encode() + b" " + _LETTERS[verdict]
        os.write(self._fd, b"\n%b %08x\n" % (body, zlib.crc32(body)))

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _catch_up(self) -> None:
        try:
            size = os.fstat(self._fd).st_size
            while self._read < size and (data := os.pread(self._fd, min(1 << 20, size - self._read), self._read)):
                self._read += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._rest = self._rest[-200:]
                for line in lines:
                    self._take(line)
        except OSError:  # what cannot be read is asked again
            return

    def _take(self, line: bytes) -> None:
        body, _, checksum = line.rpartition(b" ")
        key, _, letter = body.partition(b" ")
        if len(key) == 64 and letter in _VERDICTS and checksum == b"%08x" % zlib.crc32(body):
            self._verdicts.setdefault(bytes.fromhex(key.decode()), _VERDICTS[letter])
