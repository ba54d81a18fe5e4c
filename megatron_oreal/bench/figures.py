"""One measured figure with its spread, and the table of all."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """``values``: one a repeat, warm-up excluded, in ``unit``. ``better`` None: a detail, which no comparison judges.

    ``spread``: (max - min) / median, 0 for a median of 0.
    """

    part: str
    name: str
    unit: str
    better: Better | None
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(max - min) / median."""
        return (max(self.values) - min(self.values)) / abs(self.median) if self.median else 0.0

    @property
    def key(self) -> str:
        """``part/name``."""
        return f"{self.part}/{self.name}"

    def as_record(self) -> dict[str, Any]:
        """Return what stands in the JSON."""
        ends = {"median": self.median, "min": min(self.values), "max": max(self.values), "spread": self.spread}
        return asdict(self) | {"values": list(self.values)} | ends

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Figure:
        """Read what ``as_record`` made; ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        part, name, unit, better = (record[key] for key in ("part", "name", "unit", "better"))
        if not all(isinstance(text, str) for text in (part, name, unit)) or better not in ("higher", "lower", None):
            raise ValueError(f"part {part!r}, name {name!r}, unit {unit!r}, better {better!r}")
        values = tuple(value for value in record["values"] if isinstance(value, (int, float)))
        if not values or len(values) < len(record["values"]) or not all(abs(v) <= sys.float_info.max for v in values):
            raise ValueError(f"{part}/{name} has no finite values")
        return cls(part, name, unit, better, tuple(map(float, values)))


def table(figures: Sequence[Figure]) -> str:
    """Lay the figures out for a terminal, a heading for each part."""
    lines, part = [], ""
    width = max((len(figure.name) for figure in figures), default=0) + 2
    for figure in figures:
        if figure.part != part:
            part = figure.part
            lines += ["", f"{part:<{width + 2}}{'median':>12}{'min':>12}{'max':>12}{'spread':>9}  unit"]
        cells = "".join(f"{number(value):>12}" for value in (figure.median, min(figure.values), max(figure.values)))
        spread = f"{figure.spread:.1%}" if len(figure.values) > 1 else "-"
        lines.append(f"  {figure.name:<{width}}{cells}{spread:>9}  {figure.unit}")
    return "\n".join(lines[1:])


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(figures: Sequence[Figure]) -> str:
    """The figures that comparisons judge, as a Markdown table."""
    lines = ["| part | figure | median | min | max | unit |", "|---|---|---|---|---|---|"]
    for figure in figures:
        if figure.better is not None:
            cells = " | ".join(number(value) for value in (figure.median, min(figure.values), max(figure.values)))
            lines.append(f"| {figure.part} | `{figure.name}` | {cells} | {figure.unit} |")
    return "\n".join(lines)
