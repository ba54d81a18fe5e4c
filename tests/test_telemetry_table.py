from __future__ import annotations

import io
import math
import re

import pytest

from megatron_oreal.telemetry import StepTable, names
from megatron_oreal.telemetry.table import COLUMNS, HEADING_EVERY, STEP_COLUMN, cell, heading_line, step_line

ALL = (STEP_COLUMN, *COLUMNS)


def slices() -> list[slice]:
    """Where each column lies in a line, worked out from the widths alone."""
    found, start = [], 0
    for column in ALL:
        found.append(slice(start, start + column.width))
        start += column.width + 2
    return found


def test_the_table_fits_160_columns_and_no_heading_is_wider_than_its_column():
    assert len(heading_line()) <= 160
    assert all(len(column.heading) <= column.width for column in ALL)


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -1.0, 0.123456789, 12345.678, -98765432.1, 1e-9, -1.234e-12, 1e300, math.nan, -math.inf]
)
def test_every_value_stays_inside_its_column_and_keeps_its_magnitude(value):
    line = step_line(12345, {column.metric: value for column in COLUMNS})
    assert len(line) == len(heading_line())
    for column, place in zip(ALL[1:], slices()[1:], strict=True):
        text = line[place].strip()
        assert text == cell(column, value)
        if math.isfinite(value) and "#" not in text:
            # A fixed format may round a small value away, never a large one.
            assert float(text) == pytest.approx(value, rel=0.34, abs=0.5 if column.format == ".0f" else 6e-4)
        elif not math.isfinite(value):
            assert text == str(value)
    assert all(line[place.stop : place.stop + 2] in ("  ", "") for place in slices())


def test_a_missing_metric_prints_a_dash():
    cells = step_line(3, {names.PASS_RATE: 0.25}).split()
    assert cells[:2] == ["3", "0.250"]
    assert set(cells[2:]) == {"-"}
    assert len(cells) == len(ALL)


def test_the_heading_is_repeated_every_20_lines():
    stream = io.StringIO()
    table = StepTable(enabled=True, stream=stream)
    for step in range(45):
        table.row(step, {})
    lines = stream.getvalue().splitlines()
    at = [index for index, line in enumerate(lines) if line == heading_line()]
    assert at == [0, HEADING_EVERY + 1, 2 * (HEADING_EVERY + 1)]
    assert len(lines) == 48


def test_ranks_above_0_print_nothing(capsys):
    StepTable(enabled=False).row(0, {})
    assert capsys.readouterr().out == ""


def test_everything_in_the_table_is_documented():
    for column in COLUMNS:
        assert names.describe(column.metric).name == column.metric


def test_the_registry_is_well_formed_and_says_what_each_metric_means():
    for name, metric in names.REGISTRY.items():
        assert metric.name == name
        assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+|time/(<phase>|[a-z_]+(/[a-z_]+)+)", name)
        assert metric.meaning
        assert "\n" not in metric.meaning


def test_every_name_constant_is_a_documented_metric_and_every_metric_but_phases_has_one():
    constants = {key: value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    constants.pop("TIME")
    phases = {name for name in names.REGISTRY if name.startswith(names.TIME)}
    assert set(constants.values()) - phases == set(names.REGISTRY) - phases
    assert set(constants.values()) <= set(names.REGISTRY)


def test_any_phase_is_documented_and_an_invented_metric_is_not():
    assert names.describe(names.phase_metric("update/forward")).unit == "s"
    with pytest.raises(KeyError):
        names.describe("reward/pas_rate")
