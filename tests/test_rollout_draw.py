"""What a step draws stays where it was verified: rows, fetched tokens and saved files are those of gathering it all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dist import run_ranks

from megatron_oreal.actor.sums import quantile_over_ranks
from megatron_oreal.telemetry import names

RANKS = 4


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("draw")
    return folder, run_ranks("draw_cases:everything", RANKS, {"folder": folder})


@pytest.mark.parametrize("name", ["embedded", "served", "enough"])
def test_rows_metrics_and_fetched_tokens_equal_those_of_all_trajectories_on_every_rank(answers, name: str) -> None:
    ranks = [found[name] for found in answers[1]]
    for rank, found in enumerate(ranks):
        groups = sorted({group for group, _ in found["keys"]})
        assert found["keys"] == [(group, k) for group in groups for k in range(4)]
        assert len(groups) == (3 if name == "enough" else 6)
        assert found["own groups"] == [group for group in groups if group % RANKS == rank]
        assert found["kept"] >= 4
        for fact in ("rewards", "brought", "mass", "tokens", "truncated", "unknown"):
            assert found[fact], fact
        assert found["metrics"] == ranks[0]["metrics"] and found["judge"] == ranks[0]["judge"]
    asked = ranks[0]["judge"][names.JUDGE_REQUESTS]
    assert asked == 24 if name != "enough" else 12 <= asked < 24


@pytest.mark.parametrize("name", ["embedded", "served", "enough"])
def test_the_file_that_ranks_write_together_is_the_one_that_one_rank_writes_of_all(answers, name: str) -> None:
    folder = answers[0]
    written = (folder / f"{name}.jsonl").read_bytes()
    assert written and written == (folder / f"{name}.expected.jsonl").read_bytes()


def test_mean_percentile_and_maximum_are_those_of_all_tokens_together(answers) -> None:
    for found in (answer["statistics"] for answer in answers[1]):
        assert found["values"] == {"loss": pytest.approx(0.1 + 0.2 + 0.4)}
        assert found["count"] == (3002, 3002)
        assert found["mean"][0] == pytest.approx(found["mean"][1], rel=1e-12)
        assert found["p999"][0] == pytest.approx(found["p999"][1], rel=1e-12)
        assert found["max"][0] == found["max"][1]


def test_log_probabilities_that_are_not_finite_are_not_hidden_by_the_percentile(answers) -> None:
    assert all(not math.isfinite(answer["not finite"][0]) for answer in answers[1])


def test_servers_that_fail_end_the_draw_on_every_rank(answers) -> None:
    assert [answer["errors"] for answer in answers[1]] == [["server 3 is gone"] * 2] * RANKS


def test_a_verifier_that_fails_on_one_rank_ends_the_draw_on_all_long_before_their_deadline(answers) -> None:
    for rank, (said, took) in enumerate(answer["left alone"] for answer in answers[1]):
        assert said.startswith("the verifier is broken" if rank == 2 else f"rank {rank} waited for "), said
        assert took < 200


def test_a_rank_that_waits_in_vain_says_for_what_at_its_deadline() -> None:
    said, took = run_ranks("draw_cases:wait_in_vain", 2)[1]
    assert said.startswith("rank 1 waited for a letter: ")
    assert 3.5 < took < 300


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 1001, 4321])
@pytest.mark.parametrize("q", [0.0, 0.5, 0.999, 1.0])
def test_the_quantile_by_counting_is_numpys_of_the_sorted_values(count: int, q: float) -> None:
    rng = np.random.default_rng(count)
    for values in (rng.exponential(1e-3, count), rng.integers(0, 3, count), np.full(count, 0.25)):
        one = values.astype(np.float32)
        expected = np.quantile(one.astype(np.float64), q)
        assert quantile_over_ranks(one, q, count, lambda counts: counts) == pytest.approx(expected, rel=1e-12)
