"""Length distributions: cut where generation cuts, drawn by seed, read from the command line and from trajectories."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.data.lengths import DEFAULT_SIGMA, LengthDistribution, parse_lengths
from megatron_oreal.data.trajectories import TrajectoryWriter
from megatron_oreal.data.types import Trajectory
from megatron_oreal.errors import UserError

MAXIMUM = 14_000


def write_trajectories(path: Path, lengths: list[int]) -> Path:
    with TrajectoryWriter(path) as writer:
        for sample, length in enumerate(lengths):
            ids = np.arange(length, dtype=np.int32)
            writer.write(Trajectory(0, sample, ids[:1], ids, np.zeros(length, np.float32), stopped=True), "p")
    return path


def test_draws_have_the_log_normal_s_median_and_sigma_below_the_cut() -> None:
    lengths = LengthDistribution.lognormal(10**9, 3000, 0.8).draw(20_000, seed=1)
    logs = np.log(lengths)
    assert np.exp(np.median(logs)) == pytest.approx(3000, rel=0.02)
    assert logs.std() == pytest.approx(0.8, rel=0.02)


def test_longer_draws_are_cut_to_the_maximum_and_keep_their_share() -> None:
    found = LengthDistribution.lognormal(MAXIMUM, 3000, 0.8)
    lengths = found.draw(20_000, seed=2)
    above = 0.5 * math.erfc(math.log(MAXIMUM / 3000) / 0.8 / math.sqrt(2))
    assert lengths.max() == MAXIMUM and lengths.min() >= 1
    assert (lengths == MAXIMUM).mean() == pytest.approx(above, rel=0.1)
    assert found.mean() == pytest.approx(lengths.mean(), rel=0.02)


def test_the_same_seed_draws_the_same_lengths_and_another_seed_others() -> None:
    found = LengthDistribution.default(MAXIMUM)
    assert np.array_equal(found.draw(1000, 3), found.draw(1000, 3))
    assert not np.array_equal(found.draw(1000, 3), found.draw(1000, 4))


def test_the_default_is_the_documented_share_of_the_maximum() -> None:
    assert str(LengthDistribution.default(MAXIMUM)) == "lognormal:median=3000,sigma=0.8"
    assert LengthDistribution.default(1).draw(10, 0).tolist() == [1] * 10


def test_quantiles_of_recorded_lengths_are_those_lengths() -> None:
    found = LengthDistribution.from_lengths([40, 10, 30, 20])
    assert [int(found.quantile(share)) for share in (0.0, 0.24, 0.25, 0.5, 0.99)] == [10, 10, 20, 30, 40]
    assert found.mean() == 25.0
    assert set(found.draw(200, 0).tolist()) == {10, 20, 30, 40}


def test_the_expected_longest_is_that_of_many_draws() -> None:
    found = LengthDistribution.lognormal(10**9, 1000, 0.5)
    longest = [int(found.draw(64, seed).max()) for seed in range(400)]
    assert found.expected_longest(64) == pytest.approx(np.mean(longest), rel=0.05)


def test_lengths_come_from_a_trajectories_file_without_its_aborted_responses(tmp_path: Path) -> None:
    path = write_trajectories(tmp_path / "step.jsonl", [5, 0, 9, 7])
    found = parse_lengths(f"file:{path}", 8)
    assert found.values == (5, 7, 8)
    assert LengthDistribution.from_trajectories(path).maximum == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "lognormal:median=3000,sigma=0.8"),
        ("lognormal", "lognormal:median=3000,sigma=0.8"),
        ("lognormal:median=500", f"lognormal:median=500,sigma={DEFAULT_SIGMA}"),
        ("lognormal:sigma=0.3,median=7", "lognormal:median=7,sigma=0.3"),
        ("fixed:512", "fixed:512"),
    ],
)
def test_the_command_line_is_read_and_printed_back(text: str | None, expected: str) -> None:
    assert str(parse_lengths(text, MAXIMUM)) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lognorml:", "did you mean 'lognormal'"),
        ("lognormal:mean=3", "unknown parameter 'mean'"),
        ("lognormal:median=x", "'x' is not a number"),
        ("lognormal:median=nan", "median=nan must be 1 or more"),
        ("lognormal:sigma=-1", "sigma=-1 must lie between 0 and 10"),
        ("fixed:1.5", "'1.5' is not a whole number"),
        ("fixed:0", "fixed length=0 must be 1 or more"),
        ("fixed:14001", "exceeds the 14000 new tokens"),
        ("file:/nowhere.jsonl", "/nowhere.jsonl: no such trajectory file"),
        ("512", "unknown distribution"),
    ],
)
def test_a_wrong_distribution_is_refused_in_one_line(text: str, named: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        parse_lengths(text, MAXIMUM)
    assert named in str(error.value)


def test_a_file_without_responses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no response in it"):
        parse_lengths(f"file:{write_trajectories(tmp_path / 'empty.jsonl', [0])}", 8)
