"""The packing benchmark: its plans are plans, and docs/performance.md shows its committed result."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
WAYS = ("sequential", "first-fit", "karmarkar-karp", "ours")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packing_benchmark", ROOT / "benchmarks" / "packing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_places_every_sequence_once(benchmark: ModuleType) -> None:
    lengths = benchmark.draw_lengths(61, 6000, 0.6, seed=1)
    work = benchmark.MODELS["7B"]
    costs = [work(length) for length in lengths]
    for way in (benchmark.sequential, benchmark.first_fit, benchmark.karmarkar_karp, benchmark.ours(work, 2)):
        plan = way(lengths, costs, 7)
        assert len(plan) == 7
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(61))


def test_largest_differencing_beats_longest_first_where_it_is_known_to(benchmark: ModuleType) -> None:
    parts = benchmark.largest_differencing([8, 7, 6, 5, 4], range(5), 2)  # Karmarkar and Karp's own example
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in parts) == [14, 16]


def test_ours_stays_in_the_budget_and_near_the_bound(benchmark: ModuleType) -> None:
    for case in benchmark.compare(draws=2):
        ours = case["ways"]["ours"]
        assert ours["over_budget"] == 0
        assert ours["time"] < 1.03
        assert ours["time"] < case["ways"]["first-fit"]["time"] + 0.005


def test_the_page_shows_the_committed_result() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    result = json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())
    for case in result["cases"]:
        cells = []
        for way in WAYS:
            found = case["ways"][way]
            cells.append(f"{found['time']:.3f}" + (f" ({found['over_budget']:.1f})" if found["over_budget"] else ""))
        sizes = f"{case['sequences']}, {case['dp']}, {case['pp']}"
        assert f"| {case['name']} | {sizes} | {' | '.join(cells)} |" in page
