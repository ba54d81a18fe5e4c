"""The README's figures are those of the committed result files, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_quickstart_figures_are_those_of_the_result_file() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) → ([\d.]+) \| ([\d.]+) → ([\d.]+) \| ([\d.]+) \| (\d+) s \|$", README, re.M
    )
    expected = [
        (
            str(row["seed"]),
            f"{100 * row['before']['sampled']:.1f}",
            f"{100 * row['after']['sampled']:.1f}",
            f"{100 * row['before']['greedy']:.1f}",
            f"{100 * row['after']['greedy']:.1f}",
            f"{100 * row['export_in_transformers']['greedy']:.1f}",
            f"{row['seconds']:.0f}",
        )
        for row in load("quickstart.json")["rows"]
    ]
    assert rows == expected
    assert len(rows) >= 3


def test_quickstart_pass_at_1_rises_by_twenty_points_for_every_seed() -> None:
    for row in load("quickstart.json")["rows"]:
        assert row["after"]["sampled"] - row["before"]["sampled"] >= 0.2
        assert row["after"]["greedy"] > row["before"]["greedy"]
        assert row["export_in_transformers"]["greedy"] == row["after"]["greedy"]
        assert row["seconds"] < 600


def test_engine_figures_are_those_of_the_result_file() -> None:
    rows = {row["workload"]: row for row in load("embedded_engine.json")["rows"]}
    for workload, row in rows.items():
        ours = row["embedded"]["tokens_per_cpu_s"]["median"]
        theirs = row["generate"]["tokens_per_cpu_s"]["median"]
        line = next(line for line in README.splitlines() if line.startswith(f"| {workload}"))
        assert f"{ours:,.0f}" in line
        assert f"{theirs:,.0f}" in line
        assert f"{ours / theirs:.1f}" in line
    stop = rows["stop"]
    assert stop["embedded"]["tokens_per_cpu_s"]["median"] > 2 * stop["generate"]["tokens_per_cpu_s"]["median"]


def test_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"bash (\S+\.sh)", README):
        assert (ROOT / path).exists(), path


def test_real_model_figures_are_those_of_the_result_file() -> None:
    for row in load("real_model/result.json")["held_out_accuracy"]:
        low, high = row["sampled_95"]
        sampled = f"{100 * row['sampled']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        assert f"| {row['after_steps']} | {sampled} | {100 * row['greedy']:.1f} |" in README


def test_reshard_figures_are_those_of_the_result_file() -> None:
    table = (ROOT / "docs/publish.md").read_text()
    rows = load("reshard.json")["rows"]
    for row in rows:
        cells = [row["case"], f"{row['received_mb']['planned']:.1f} / {row['received_mb']['gathered']:.1f}"]
        for key in ("gathered_over_planned", "gathered_over_verified", "verified_over_planned"):
            ratio = row[key]
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
        assert f"| {' | '.join(cells)} |" in table
    assert len(rows) >= 4
