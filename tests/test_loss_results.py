"""The figures of docs/loss.md are those of the committed result file, and the file says what the page claims."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks/results/loss_cpu.json").read_text())
CONFIGURATIONS = [(row["dtype"], row["workload"], row["threads"], row["heap"]) for row in RESULT["rows"]]


def test_the_page_has_the_figures_of_the_result_file() -> None:
    pattern = r"^\| (bf16|fp32) \| (\w+) \| (\d) \| (default|kept) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    found = re.findall(pattern, (ROOT / "docs/loss.md").read_text(), re.M)
    expected = [
        (
            *(str(part) for part in configuration),
            *(f"{row['reference_over_ours'][name]:.1f}" for name in ("wall", "cpu", "memory")),
        )
        for configuration, row in zip(CONFIGURATIONS, RESULT["rows"], strict=True)
    ]
    assert found == expected


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)), ids=[" ".join(map(str, c)) for c in CONFIGURATIONS])
def test_the_factors_are_those_of_the_single_values(index: int) -> None:
    row = RESULT["rows"][index]
    ours, reference = row["ways"]["ours"], row["ways"]["reference"]
    for name, key in (("wall", "total_ms"), ("cpu", "cpu_ms")):
        medians = [sorted(way[key]["all"])[len(way[key]["all"]) // 2] for way in (ours, reference)]
        assert row["reference_over_ours"][name] == pytest.approx(medians[1] / medians[0], abs=0.02)
        assert len(ours[key]["all"]) == RESULT["repeats"]
    assert row["reference_over_ours"]["memory"] == pytest.approx(
        reference["peak_bytes"] / ours["peak_bytes"], abs=0.006
    )


def test_three_times_faster_on_one_thread_with_a_third_of_the_memory() -> None:
    assert RESULT["vocabulary"] == 152_064
    for (_, _, threads, heap), row in zip(CONFIGURATIONS, RESULT["rows"], strict=True):
        factors = row["reference_over_ours"]
        least = {("default", 1): 3, ("default", 2): 2}.get((heap, threads), 1)  # ours uses one thread
        assert factors["memory"] >= 3
        assert factors["wall"] > least
        assert factors["cpu"] > least


def test_ours_is_as_exact_as_its_storage() -> None:
    for row in RESULT["rows"]:
        error = row["ways"]["ours"]["error"]
        assert error["logp"] < 1e-5
        assert error["entropy"] < 1e-5
        assert error["gradient"] < (4e-3 if row["dtype"] == "bf16" else 1e-5)
        assert error["label_gradient"] < (2**-8 + 2e-3 if row["dtype"] == "bf16" else 2e-3)  # at p = 0.999


def test_what_is_measured_before_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is there for minutes; and a way that fails is no reason to lose the others."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    loss = importlib.import_module("loss")
    calls: list[tuple[str, str]] = []

    def measure(names: list[str], rows: int, dtype: str, workload: str, *_: object) -> dict[str, Any]:
        if calls:
            raise TimeoutError
        calls.append((dtype, workload))
        return {"dtype": dtype, "ways": {"ours": {}}, "absent": {"reference": "out of memory"}}

    monkeypatch.setattr(loss, "measure", measure)
    monkeypatch.setattr(loss, "hardware", lambda device: {"device": device})
    output = tmp_path / "loss.json"
    monkeypatch.setattr("sys.argv", ["loss.py", "--device", "cuda", "--output", str(output)])
    with pytest.raises(TimeoutError):
        loss.main()
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["dtype"], row["reference_over_ours"]) == ("bf16", {})
