"""Two results of ``megatron-oreal bench`` side by side. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oreal.bench.figures import Figure, number
from megatron_oreal.errors import UserError

_SAME = ("options", "world", "model", "workload", "parts", "hardware", "versions", "config")
"""What should be alike in two results that are compared; differences are shown above the table.

``parts``: the work that was measured (tokens, micro-batches, bytes), and the memory that it took.
"""


@dataclass(frozen=True)
class Row:
    """One figure of both. ``is_worse``: by more than the tolerance; ``is_beyond_spread``: the ranges do not overlap;
    None where one of them is a single repeat.
    """

    before: Figure
    after: Figure
    ratio: float
    is_worse: bool
    is_beyond_spread: bool | None


def compare(first: str, second: str, tolerance: float) -> int:
    """Print the table; 1 when a figure of ``second`` is worse by more than ``tolerance`` or is not there, else 0.

    Only figures that are better when higher or lower are judged. Raises ``UserError`` for files that are not results.
    """
    if not 0.0 <= tolerance < 1.0:
        raise UserError(f"--tolerance={tolerance:g}: must lie between 0 and 1, for example 0.1 for a tenth")
    records = [read_record(path) for path in (first, second)]
    figures = [figures_of(record, path) for record, path in zip(records, (first, second), strict=True)]
    before, after = ({figure.key: figure for figure in each} for each in figures)
    rows = [row_of(before[key], after[key], tolerance) for key in before if key in after]
    if not rows:
        raise UserError(f"--compare: {first} and {second} have no figure in common: measure the same --parts")
    for letter, path, record in zip("AB", (first, second), records, strict=True):
        print(f"{letter}: {path}, commit {record.get('git_commit')}, note: {record.get('note')}")
    differing = list(differences(*records))
    for line in differing:
        print(line)
    missing = [key for key, figure in before.items() if key not in after and figure.better is not None]
    print(compared_table(rows))
    for key in missing:
        print(f"{key}: is in {first} and not in {second}")
    worse = [row.before.key for row in rows if row.is_worse]
    which = ", ".join(worse) or "none"
    above = f"; measured under {len(differing)} differences, see above the table" if differing else ""
    print(f"\n{len(rows)} figures compared; worse by more than {tolerance:.0%}: {which}{above}")
    return 1 if worse or missing else 0


def row_of(before: Figure, after: Figure, tolerance: float) -> Row:
    """Compare medians: worse is lower by the tolerance where higher is better, and higher by it where lower is."""
    ratio = after.median / before.median if before.median else (1.0 if not after.median else float("inf"))
    worse = {"higher": ratio < 1 - tolerance, "lower": ratio > 1 + tolerance}
    apart = None
    if min(len(before.values), len(after.values)) > 1:
        apart = max(before.values) < min(after.values) or max(after.values) < min(before.values)
    return Row(before, after, ratio, worse.get(before.better or "", False), apart)


def compared_table(rows: list[Row]) -> str:
    """A line for each figure."""
    width = max((len(row.before.key) for row in rows), default=6) + 2
    lines = [f"{'figure':<{width}}{'A':>12}{'B':>12}{'B / A':>8}  {'beyond spread':<15}unit"]
    for row in rows:
        beyond = {True: "yes", False: "no", None: "one repeat"}[row.is_beyond_spread]
        mark = "  WORSE" if row.is_worse else ""
        cells = f"{number(row.before.median):>12}{number(row.after.median):>12}{row.ratio:>8.3f}"
        lines.append(f"{row.before.key:<{width}}{cells}  {beyond:<15}{row.before.unit}{mark}")
    return "\n".join(lines)


def read_record(path: str) -> dict[str, Any]:
    """Read a result. Raises ``UserError``."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--compare: {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--compare: {path}: cannot be read as JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != 1 or not isinstance(record.get("figures"), list):
        raise UserError(f"--compare: {path}: not a result of megatron-oreal bench --output")
    return record


def figures_of(record: Mapping[str, Any], path: str) -> list[Figure]:
    """All figures of a result. Raises ``UserError``."""
    try:
        return [Figure.from_record(each) for each in record["figures"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--compare: {path}: a figure is damaged ({type(error).__name__}: {error})") from None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting that is not the same: figures of other machines or configs say less."""
    for section in _SAME:
        flat = [dict(_flat(record.get(section), section)) for record in (before, after)]
        for key in dict.fromkeys([*flat[0], *flat[1]]):
            values = [each.get(key) for each in flat]
            if values[0] != values[1]:
                yield f"differs: {key}: {values[0]} -> {values[1]}"


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}")
    else:
        yield prefix, value
