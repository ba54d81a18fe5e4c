"""``metrics.jsonl``: one JSON object a step, written a line at a time, read back and cut.

A line is ``{"step": 12, "reward/pass_rate": 0.41, ...}``. JSON has no NaN or infinity: they are the strings "nan",
"inf" and "-inf", which ``float()`` reads in most languages, so that every line is valid JSON and none of the three is
lost.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_oreal.errors import UserError
from megatron_oreal.telemetry import names

FILE_NAME = "metrics.jsonl"
PREVIOUS_FILE_NAME = "metrics.previous.jsonl"
STEP = "step"

Record = dict[str, float]

_log = logging.getLogger(__name__)


def encode(step: int, metrics: Mapping[str, float]) -> str:
    """Return one line, newline included. Anything that ``float()`` accepts is a value; integers stay integers."""
    if STEP in metrics:
        raise ValueError(f"'{STEP}' is the record's own key and cannot be a metric")
    record: dict[str, float | str] = {STEP: step}
    for name, value in metrics.items():
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        record[name] = number if math.isfinite(number) else str(number)
    return json.dumps(record, allow_nan=False) + "\n"


def decode(line: str) -> Record:
    """Undo ``encode``: floats by metric name, and the step. Raises ``ValueError`` for anything else."""
    parsed = json.loads(line)
    if not isinstance(parsed, dict) or not isinstance(parsed.get(STEP), int):
        raise ValueError("not a record of a step")
    record: Record = {name: float(value) for name, value in parsed.items()}
    record[STEP] = parsed[STEP]
    return record


def read(path: Path) -> list[Record]:
    """All records of the file in its order; a line that is torn or not a record is skipped with a warning.

    A run that was killed in the middle of a write leaves its last line torn. Raises ``UserError`` when the file is
    missing.
    """
    return [record for record, _ in _records(path)]


def cut(path: Path, first_step: int) -> None:
    """Drop the records of ``first_step`` and later, and torn lines, in one atomic rename; a missing file stays missing.

    A run that starts over (``first_step`` 0) leaves the old file beside it as ``metrics.previous.jsonl``.
    """
    if not path.exists() or not path.stat().st_size:
        return
    if first_step == 0:
        os.replace(path, path.with_name(PREVIOUS_FILE_NAME))
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for record, line in _records(path) if record[STEP] < first_step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def top_level_phases(records: Sequence[Record]) -> list[str]:
    """``time/<phase>`` metrics that are no part of another, the longest in all first.

    Without ``time/step`` and ``time/other``; ``time/a/b`` is top-level only where its step has no ``time/a``.
    """
    totals: dict[str, float] = {}
    for record in records:
        times = {name for name in record if name.startswith(names.TIME)} - {names.TIME_STEP, names.TIME_OTHER}
        for name in times:
            if name.rpartition("/")[0] not in times:
                totals[name] = totals.get(name, 0.0) + record[name]
    return sorted(totals, key=lambda name: (-totals[name], name))


def _records(path: Path) -> Iterator[tuple[Record, str]]:
    """Each complete record with its line, newline removed."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; give the work_dir of a run that has logged a step") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            yield decode(line), line
        except (ValueError, TypeError):
            _log.warning("%s: line %d is not a complete record and is skipped", path, number)
