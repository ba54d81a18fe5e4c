"""A finished, running or interrupted run at a glance: ``report.png`` and a few lines of text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.errors import UserError
from megatron_oreal.telemetry import names, records
from megatron_oreal.telemetry.records import STEP, Record

REPORT_FILE_NAME = "report.png"
_WIDTH = 16


def write_report(work_dir: str | Path) -> Path:
    """Draw ``metrics.jsonl`` of ``work_dir`` as ``report.png`` beside it, in one atomic rename, and return its path.

    Six panels: held-out pass@1, training prompts, losses, policy, responses, time per step; where nothing was logged
    one says "no data". Raises ``UserError`` when the file is missing or has no step, or the curves cannot be written.
    """
    # matplotlib takes most of a second to import; only this function needs it.
    from megatron_oreal.telemetry import panels

    work_dir = Path(work_dir)
    found = _read(work_dir)
    canvas = panels.draw(found, work_dir.resolve().name, _headline(found))
    path = work_dir / REPORT_FILE_NAME
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            canvas.print_png(file)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): mend that, or copy metrics.jsonl elsewhere and "
            "give its directory"
        ) from None
    return path


def summary(work_dir: str | Path) -> str:
    """Describe the same run in a few lines of text. Raises ``UserError`` as ``write_report`` does."""
    work_dir = Path(work_dir)
    found = _read(work_dir)
    lines = [(work_dir.resolve().name, _headline(found))]
    lines += _evaluations(found)
    for label, metric in (
        ("pass rate", names.PASS_RATE),
        ("kept groups", names.GROUPS_KEPT),
        ("unknown", names.UNKNOWN_SHARE),
        ("KL to reference", names.KL_TO_REFERENCE),
        ("entropy", names.ENTROPY),
        ("length", names.LENGTH_MEAN),
        ("truncated", names.TRUNCATED_SHARE),
        ("throughput", names.TOKENS_PER_S),
    ):
        line = _first_to_last(found, metric)
        if line:
            lines.append((label, line))
    lines += _times(found)
    broken = _not_finite(found)
    if broken:
        lines.append(("not finite", broken))
    return "\n".join(f"{label:<{_WIDTH}}  {text}" for label, text in lines)


def _read(work_dir: Path) -> list[Record]:
    path = work_dir / records.FILE_NAME
    found = sorted(records.read(path), key=lambda record: record[STEP])
    if not found:
        raise UserError(f"{path}: holds no complete step yet; run the report again after the first step")
    return found


def _having(found: Sequence[Record], metric: str) -> list[Record]:
    return [record for record in found if metric in record]


def _headline(found: Sequence[Record]) -> str:
    first, last = int(found[0][STEP]), int(found[-1][STEP])
    parts = [f"step {first}" if first == last else f"steps {first}-{last}"]
    seconds = sum(record[names.TIME_STEP] for record in _having(found, names.TIME_STEP))
    if seconds:
        parts.append(_duration(seconds))
    evaluated = _having(found, names.EVAL_PASS_AT_1)
    if evaluated:
        parts.append(f"held-out pass@1 {_pass_at_1(evaluated[-1])} at step {evaluated[-1][STEP]:.0f}")
    return " · ".join(parts)


def _evaluations(found: Sequence[Record]) -> list[tuple[str, str]]:
    """First, best and last evaluation; the best of many is an optimistic choice, so it never stands alone."""
    evaluated = _having(found, names.EVAL_PASS_AT_1)
    if not evaluated:
        return [("held-out pass@1", "no data")]
    # NaN compares false with everything, so it must not reach max().
    comparable = [record for record in evaluated if math.isfinite(record[names.EVAL_PASS_AT_1])]
    picks = [("first", evaluated[0]), ("last", evaluated[-1])]
    if comparable:
        picks.insert(1, ("best", max(comparable, key=lambda record: record[names.EVAL_PASS_AT_1])))
    lines = []
    for which, record in picks if len(evaluated) > 1 else picks[-1:]:
        greedy = f", greedy {record[names.EVAL_GREEDY]:.3f}" if names.EVAL_GREEDY in record else ""
        lines.append((f"pass@1 {which}", f"{_pass_at_1(record)}{greedy} at step {record[STEP]:.0f}"))
    return lines


def _pass_at_1(record: Record) -> str:
    text = f"{record[names.EVAL_PASS_AT_1]:.3f}"
    low, high = record.get(names.EVAL_PASS_AT_1_LOW), record.get(names.EVAL_PASS_AT_1_HIGH)
    return text if low is None or high is None else f"{text} [{low:.3f}, {high:.3f}]"


def _first_to_last(found: Sequence[Record], metric: str) -> str:
    values = [record[metric] for record in _having(found, metric)]
    if not values:
        return ""
    unit = names.describe(metric).unit
    tail = "" if unit in ("", "share", "groups") else f" {unit}"
    if len(values) == 1:
        return f"{values[0]:.4g}{tail}"
    return f"{values[0]:.4g} -> {values[-1]:.4g}, mean {sum(values) / len(values):.4g}{tail}"


def _times(found: Sequence[Record]) -> list[tuple[str, str]]:
    """Share of each top-level phase in the time of all steps, the longest first."""
    timed = _having(found, names.TIME_STEP)
    total = sum(record[names.TIME_STEP] for record in timed)
    if not total:
        return []
    shares = {
        name.removeprefix(names.TIME): sum(record.get(name, 0.0) for record in timed) / total
        for name in [*records.top_level_phases(timed), names.TIME_OTHER]
    }
    text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(), key=lambda x: -x[1]))
    return [("time", f"{_duration(total)}, {total / len(timed):.1f} s a step: {text}")]


def _not_finite(found: Sequence[Record]) -> str:
    """Which metrics were NaN or infinite, and at which steps first."""
    steps: dict[str, list[int]] = {}
    for record in found:
        for name, value in record.items():
            if not math.isfinite(value):
                steps.setdefault(name, []).append(int(record[STEP]))
    return ", ".join(f"{name} {len(at)} x, first at step {at[0]}" for name, at in sorted(steps.items()))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
