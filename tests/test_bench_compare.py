"""``megatron-oreal bench --compare``: which figures count as worse, and the exit status that gates on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import yaml

from megatron_oreal.bench.compare import figures_of, read_record, row_of
from megatron_oreal.bench.figures import Better, Figure, markdown, number, table
from megatron_oreal.bench.parts import Bench
from megatron_oreal.cli import main

RATE, SECONDS, DETAIL = (100.0, 101.0, 102.0), (2.0, 2.1, 2.2), (0.5, 0.5, 0.5)


def figure(name: str, better: Better | None, values: Sequence[float]) -> Figure:
    return Figure("step", name, "unit", better, tuple(values))


def write(path: Path, rate: Sequence[float] = RATE, seconds: Sequence[float] = SECONDS, **more: Any) -> Path:
    figures = [figure("rate", "higher", rate), figure("seconds", "lower", seconds), figure("phase", None, DETAIL)]
    record = {"format": 1, "figures": [each.as_record() for each in figures], "versions": {"torch": "2"}}
    path.write_text(json.dumps(record | more))
    return path


def compare(before: Path, after: Path, *options: str) -> int:
    return main(["bench", "--compare", str(before), str(after), *options])


def scaled(values: Sequence[float], factor: float) -> list[float]:
    return [factor * value for value in values]


@pytest.mark.parametrize(
    ("rate", "seconds", "status"),
    [
        (1.0, 1.0, 0),
        (1.5, 0.5, 0),
        (0.91, 1.09, 0),
        (0.89, 1.0, 1),
        (1.0, 1.11, 1),
        (1.5, 1.5, 1),
    ],
    ids=["equal", "better", "within the tolerance", "lower rate", "longer time", "one better, one worse"],
)
def test_the_exit_status_tells_whether_a_figure_is_worse(
    tmp_path: Path, rate: float, seconds: float, status: int
) -> None:
    after = write(tmp_path / "b.json", scaled(RATE, rate), scaled(SECONDS, seconds))
    assert compare(write(tmp_path / "a.json"), after) == status


def test_the_tolerance_can_be_chosen(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json", scaled(RATE, 0.7))
    assert compare(before, after, "--tolerance", "0.2") == 1
    assert compare(before, after, "--tolerance", "0.35") == 0
    assert compare(before, before, "--tolerance", "0") == 0


def test_details_are_shown_and_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = figure("phase", None, scaled(DETAIL, 9))
    record = json.loads(write(tmp_path / "b.json").read_text())
    record["figures"][2] = slow.as_record()
    (tmp_path / "b.json").write_text(json.dumps(record))
    assert compare(write(tmp_path / "a.json"), tmp_path / "b.json") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step/phase"))
    assert line.split()[-3:] == ["9.000", "yes", "unit"]


def test_a_figure_that_is_no_longer_there_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(write(tmp_path / "b.json").read_text())
    del record["figures"][1]
    (tmp_path / "b.json").write_text(json.dumps(record))
    assert compare(write(tmp_path / "a.json"), tmp_path / "b.json") == 1
    assert "step/seconds: is in" in capsys.readouterr().out


def test_the_table_says_whether_a_difference_exceeds_the_spread() -> None:
    before = figure("rate", "higher", (10.0, 11.0, 12.0))
    overlapping, apart = (figure("rate", "higher", values) for values in ((11.5, 12.5, 13.5), (12.5, 13.0, 13.5)))
    assert row_of(before, overlapping, 0.1).is_beyond_spread is False
    assert row_of(before, apart, 0.1).is_beyond_spread is True
    assert row_of(before, figure("rate", "higher", (20.0,)), 0.1).is_beyond_spread is None
    assert row_of(before, apart, 0.1).ratio == pytest.approx(13 / 11)


def test_other_machines_and_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = {"config": {"parallel": {"tensor_model_parallel_size": 4}}}
    before = write(tmp_path / "a.json", git_commit="abc", options={"warmup": 1})
    work: dict[str, Any] = {"options": {"warmup": 0}, "parts": {"update": {"tokens": 9}}}
    after = write(tmp_path / "b.json", versions={"torch": "3"}, git_commit="def", **config, **work)
    assert compare(before, after) == 0
    said = capsys.readouterr().out
    assert f"A: {before}, commit abc" in said and f"B: {after}, commit def" in said
    assert "differs: options.warmup: 1 -> 0" in said and "differs: parts.update.tokens: None -> 9" in said
    assert "worse by more than 10%: none; measured under 4 differences" in said
    assert compare(before, before) == 0 and "differ" not in capsys.readouterr().out
    assert "differs: versions.torch: 2 -> 3" in said
    assert "differs: config.parallel.tensor_model_parallel_size: None -> 4" in said


def one_figure(**changes: Any) -> str:
    """A result of one figure with wrong fields."""
    return json.dumps({"format": 1, "figures": [figure("rate", "higher", RATE).as_record() | changes]})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "not a result of megatron-oreal bench"),
        ('{"rows": []}', "not a result of megatron-oreal bench"),
        ('{"format": 1, "figures": [{"part": "step"}]}', "a figure is damaged (KeyError"),
        (one_figure(better=["higher"]), "a figure is damaged (ValueError"),
        (one_figure(name=3), "a figure is damaged (ValueError"),
        (one_figure(values=[]), "step/rate has no finite values"),
        (one_figure(values=["1"]), "step/rate has no finite values"),
        (one_figure(values=[10**400]), "step/rate has no finite values"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"format": 1, "figures": []}', "have no figure in common"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_one_line(
    tmp_path: Path, content: str | None, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    assert compare(write(tmp_path / "a.json"), path) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and named in said.err and str(path) in said.err


@pytest.mark.parametrize("tolerance", ["-0.1", "1", "nan"])
def test_a_tolerance_that_says_nothing_is_refused(tmp_path: Path, tolerance: str) -> None:
    path = write(tmp_path / "a.json")
    assert compare(path, path, "--tolerance", tolerance) == 2


def test_a_figure_reads_back_and_has_its_spread() -> None:
    made = figure("rate", "higher", (8.0, 10.0, 11.0))
    assert Figure.from_record(json.loads(json.dumps(made.as_record()))) == made
    assert (made.median, made.spread) == (10.0, pytest.approx(0.3))
    assert "30.0%" in table([made]) and table([figure("rate", None, (8.0,))]).endswith("-  unit")
    assert [number(value) for value in (0, 12345.6, 1.23456, 1e-9, 5e8)] == [
        "0",
        "12,346",
        "1.235",
        "1.000e-09",
        "5.000e+08",
    ]


def test_utilisation_is_operations_a_second_of_one_gpu_over_its_peak() -> None:
    run = cast(Any, SimpleNamespace(platform=SimpleNamespace(world_size=4)))
    bench = Bench(run, cast(Any, None), cast(Any, None), peak_flops=1e12, warmup=0, repeats=2)
    bench.add_rates("update", "policy_", [2.0, 4.0], tokens=800, flops=4 * 10**12)
    found = {each.name: each.values for each in bench.figures}
    assert found["policy_tokens_per_s_gpu"] == (100.0, 50.0)
    assert found["policy_tflops_gpu"] == (0.5, 0.25)
    assert found["policy_mfu"] == (0.5, 0.25)


def test_the_page_has_the_figures_of_the_committed_result() -> None:
    result = str(tiny.REPOSITORY / "benchmarks" / "results" / "bench_cpu.json")
    record = read_record(result)
    page = (tiny.REPOSITORY / "docs" / "bench.md").read_text()
    table = page.partition("<!-- bench: begin -->\n")[2].partition("\n<!-- bench: end -->")[0]
    assert table == markdown(figures_of(record, result))
    config = yaml.safe_load((tiny.REPOSITORY / "benchmarks" / "configs" / "bench_cpu.yaml").read_text())
    assert all(record["config"]["rollout"][key] == value for key, value in config["rollout"].items())
    assert record["world"]["device"] == "cpu" and "other processes shared" in record["note"]
