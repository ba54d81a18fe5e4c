"""One line a step on standard output, aligned, with the heading repeated."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from megatron_oreal.telemetry import names

HEADING_EVERY = 20
MISSING = "-"
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A metric's place in the table: ``format`` is a format specification, values wider than ``width`` lose digits."""

    metric: str
    heading: str
    width: int
    format: str


STEP_COLUMN = Column("step", "step", 5, "d")
COLUMNS = (
    Column(names.PASS_RATE, "pass", 5, ".3f"),
    Column(names.EVAL_PASS_AT_1, "eval", 5, ".3f"),
    Column(names.GROUPS_KEPT, "kept", 4, ".0f"),
    Column(names.UNKNOWN_SHARE, "unkn", 5, ".3f"),
    Column(names.LOSS_POSITIVE, "L pos", 8, ".4f"),
    Column(names.LOSS_NEGATIVE, "L neg", 8, ".4f"),
    Column(names.LOSS_KL, "L kl", 7, ".1e"),
    Column(names.LOSS_REWARD_MODEL, "L rm", 6, ".4f"),
    Column(names.GRAD_NORM_POLICY, "|g|", 6, ".3f"),
    Column(names.GRAD_NORM_REWARD_MODEL, "|g| rm", 6, ".3f"),
    Column(names.LR_POLICY, "lr", 7, ".1e"),
    Column(names.ENTROPY, "entr", 5, ".3f"),
    Column(names.LENGTH_MEAN, "length", 6, ".0f"),
    Column(names.TRUNCATED_SHARE, "trunc", 5, ".3f"),
    Column(names.TOKENS_PER_S, "tok/s", 7, ".0f"),
    Column(names.LOGP_DIFF_MEAN, "dlogp", 7, ".1e"),
    Column(names.TIME_STEP, "sec", 6, ".1f"),
)


class StepTable:
    """Prints a line a step to ``stream`` (standard output); ``enabled=False`` (ranks > 0) prints nothing."""

    def __init__(self, enabled: bool, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._stream = stream
        self._rows = 0

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one step; a metric that is missing prints ``-``."""
        if not self._enabled:
            return
        stream = self._stream or sys.stdout
        if self._rows % HEADING_EVERY == 0:
            print(heading_line(), file=stream)
        self._rows += 1
        print(step_line(step, metrics), file=stream, flush=True)


def heading_line() -> str:
    """Return the headings, right-aligned over their columns."""
    return _GAP.join(f"{column.heading:>{column.width}}" for column in (STEP_COLUMN, *COLUMNS))


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    """One step's values, as wide as ``heading_line()``."""
    cells = [cell(STEP_COLUMN, step), *(cell(column, metrics.get(column.metric)) for column in COLUMNS)]
    return _GAP.join(f"{text:>{column.width}}" for column, text in zip((STEP_COLUMN, *COLUMNS), cells, strict=True))


def cell(column: Column, value: float | None) -> str:
    """Return the value in the column's format, or with fewer digits where that is too wide for the column."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(float(value))
    text = format(value, column.format)
    if len(text) <= column.width:
        return text
    for digits in range(3, -1, -1):
        mantissa, exponent = format(float(value), f".{digits}e").split("e")
        text = f"{mantissa}e{int(exponent)}"
        if len(text) <= column.width:
            return text
    return "#" * column.width
