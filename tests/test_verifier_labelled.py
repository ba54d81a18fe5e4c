"""Precision and recall on the labelled set, and the documentation's tables of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MIN_PRECISION, MIN_RECALL = 0.995, 0.98
KINDS = {
    "integer", "decimal", "fraction", "mixed number", "percent", "unit", "degree", "currency", "scientific", "interval",
    "set", "tuple", "matrix", "equation", "polynomial", "surd", "complex", "inequality", "multiple choice", "text",
    "plus-minus", "several answers", "latex oddities", "thousands", "closed form", "base", "calculus", "extraction",
    "size", "sign and digit", "expression in symbols",
}  # fmt: skip


def _benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUALITY = _benchmark("verifier_quality")


@pytest.fixture(scope="module")
def items():
    return QUALITY.load()


@pytest.fixture(scope="module")
def ours(items):
    return QUALITY.measure(items, QUALITY.ours)


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "verifier_quality.json").read_text())


def _documentation(marker):
    (path,) = [path for path in (ROOT / "docs").glob("*.md") if marker in path.read_text()]
    return path.read_text()


def test_the_set_is_large_balanced_and_covers_every_kind(items):
    count = Counter((item["kind"], item["verdict"]) for item in items)
    assert len(items) >= 750
    assert {kind for kind, _ in count} == KINDS
    for kind in KINDS:
        right, wrong = count[kind, "correct"], count[kind, "wrong"]
        assert right + wrong >= 15
        assert 0.33 <= right / (right + wrong) <= 0.67, kind
    assert 0.45 < sum(item["verdict"] == "correct" for item in items) / len(items) < 0.55
    assert len({(item["gold"], item["response"]) for item in items}) == len(items)
    assert max(len(item["response"]) for item in items) >= 100_000
    assert {"", "{"} < {item["response"] for item in items}
    assert 0.4 < sum(item["half"] == "held_out" for item in items) / len(items) < 0.6


def test_rules_reach_their_precision_and_recall_in_both_halves(ours):
    for scores in (ours["all"], *ours["by_half"].values()):
        assert scores["precision"] >= MIN_PRECISION, scores
        assert scores["recall"] >= MIN_RECALL, scores


def test_the_committed_result_is_that_of_this_set_and_these_rules(ours, committed):
    assert committed["set_sha256"] == hashlib.sha256(QUALITY.LABELLED.read_bytes()).hexdigest()
    assert committed["systems"]["ours"] == ours


@pytest.mark.parametrize("other", ["math_verify", "math_verify_after_thinking"])
@pytest.mark.parametrize("rate", ["precision", "recall"])
def test_rules_are_in_no_kind_worse_than_math_verify(ours, committed, other, rate):
    for kind, scores in committed["systems"][other]["by_kind"].items():
        if scores[rate] is not None:
            assert ours["by_kind"][kind][rate] >= scores[rate], kind


def test_a_judge_behind_the_rules_is_left_no_error_that_it_cannot_mend(ours):
    counts = ours["with_judge"]
    assert counts["false_positives_left"] <= (1 - MIN_PRECISION) * ours["all"]["true_positives"]
    assert counts["asked"] < 0.55 * ours["all"]["items"]


def test_the_documented_tables_are_those_of_the_committed_results(committed):
    for name, result in (
        ("verifier_quality", committed),
        ("verifier", json.loads((RESULTS / "verifier.json").read_text())),
    ):
        benchmark = _benchmark(name)
        text = _documentation(benchmark.BEGIN)
        assert text.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0].strip() == benchmark.table(result)


def test_the_documented_history_is_that_of_its_file():
    history = json.loads((RESULTS / "verifier_quality_history.json").read_text())
    before, tuned, later, blind = history["stages"]
    lines = QUALITY.LABELLED.read_bytes().splitlines(keepends=True)
    assert hashlib.sha256(b"".join(lines[: before["items"]])).hexdigest() == history["first_998_lines_sha256"]
    text = _documentation(QUALITY.BEGIN)
    assert before["items"] + later["items"] + blind["items"] == len(lines)
    stages = [before["by_half"]["held_out"], tuned["by_half"]["held_out"], later["next_120_lines"]]
    for scores in (*stages, blind["last_134_lines"], blind["math_verify"]):
        assert f"{100 * scores['precision']:.1f} % and {100 * scores['recall']:.1f} %" in text


def test_the_adversarial_set_is_what_it_was_and_its_rates_are_those_committed(committed):
    adversarial = committed["adversarial"]
    assert adversarial["set_sha256"] == hashlib.sha256(QUALITY.ADVERSARIAL.read_bytes()).hexdigest()
    measured = QUALITY.measure_adversarial(QUALITY.load(QUALITY.ADVERSARIAL), QUALITY.ours)
    assert adversarial["systems"]["ours"] == measured
    assert measured["all"]["precision"] >= MIN_PRECISION
    assert measured["all"]["recall"] >= adversarial["systems"]["math_verify"]["all"]["recall"]


def test_the_documented_adversarial_rates_are_those_before_and_after(committed):
    history = json.loads((RESULTS / "verifier_quality_history.json").read_text())["adversarial"]
    after = committed["adversarial"]["systems"]
    left_out = sum(
        history[key] for key in ("either_verdict_right", "left_out_as_mislabelled_or_undecidable", "repeated")
    )
    assert history["rows_written"] - left_out == history["before"]["items"] == after["ours"]["all"]["items"]
    text = _documentation(QUALITY.BEGIN)
    for scores in (history["before"], after["ours"]["all"], after["math_verify"]["all"]):
        assert f"{100 * scores['precision']:.1f} % and {100 * scores['recall']:.1f} %" in text
    assert f"{history['before']['false_positives']} false positives" in text


@pytest.mark.slow
def test_math_verify_still_scores_what_was_committed(items, committed):
    measured = QUALITY.measure(items, QUALITY.systems()["math_verify"])["all"]
    for name, count in committed["systems"]["math_verify"]["all"].items():
        assert measured[name] == pytest.approx(count, rel=0.02), name  # its time limits depend on the machine
