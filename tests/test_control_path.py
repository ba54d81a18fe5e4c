"""The control path of a step at 1,024 ranks and 16,384 samples: bytes and messages, counted on real code."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_oreal.algorithm import REWARD, select

ROOT = Path(__file__).parent.parent
COSTS = ("bytes_in", "bytes_out", "messages_in", "messages_out")
LINEAR = 1.05
"""A slope: what is linear may look a little steeper where a logarithm is in it, what is quadratic has 2."""


@pytest.fixture(scope="module")
def control() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("control_path")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def steps(control: ModuleType):
    """Costs by (ranks, samples); responses are short, for every byte of a token is counted exactly below."""
    sizes = [(128, 2048), (128, 16384), (1024, 2048), (1024, 16384)]
    return {size: control.run_step(control.Setting(*size, mean_tokens=24)) for size in sizes}


def test_what_two_living_ranks_count_among_ghosts_is_what_they_count_in_a_world_that_lives(control) -> None:
    for served in (True, False):
        setting = control.Setting(16, 1024, mean_tokens=24, served=served, save=True)
        real, ghostly = control.run_step(setting, all_alive=True), control.run_step(setting)
        for name, ranks in real.items():
            for rank, cost in ranks.items():
                for kind in COSTS:
                    expected, found = getattr(cost, kind), getattr(ghostly[name][rank], kind)
                    # Pickles of the ranks' numbers differ by a few bytes; everything else must not.
                    slack = 0.05 if kind.startswith("bytes") and name in ("sample", "statistics") else 0.0
                    assert found == pytest.approx(expected, rel=slack, abs=0), (served, name, rank, kind)


@pytest.mark.parametrize("rank", ["rank 0", "last rank"])
def test_nothing_grows_faster_than_ranks_or_samples(control, steps, rank: str) -> None:
    for name in steps[1024, 16384]:
        for kind in COSTS:
            if name == "fetch" and kind.endswith("out"):
                continue  # depends on who else has something: bounded in a test of its own
            for small, large, sizes in (
                ((128, 2048), (1024, 2048), (128, 1024)),
                ((128, 16384), (1024, 16384), (128, 1024)),
                ((128, 2048), (128, 16384), (2048, 16384)),
                ((1024, 2048), (1024, 16384), (2048, 16384)),
            ):
                costs = [getattr(steps[each][name][rank], kind) for each in (small, large)]
                order = control.slope(sizes, costs)
                assert order is None or order <= LINEAR, (name, kind, small, large, costs)


def test_every_response_leaves_the_first_rank_once_and_reaches_one_rank(control, steps) -> None:
    for (ranks, samples), found in steps.items():
        lengths = control.lengths_of(control.Setting(ranks, samples, mean_tokens=24))
        groups = np.arange(samples) // control.SAMPLES_A_PROMPT
        heads = 17 * samples * int(np.log2(ranks))  # to the children in a tree
        sent = found["sample"]["rank 0"].bytes_out - 8 * int(lengths[groups % ranks != 0].sum())
        gathered = found["sample"]["rank 0"].bytes_in  # a ring passes on what it takes
        assert heads < sent - gathered < 1.5 * heads + 100_000
        received = found["sample"]["last rank"].bytes_in - 8 * int(lengths[groups % ranks == ranks - 1].sum())
        assert received < gathered + 1.5 * 17 * samples + 10_000


def test_kept_sequences_alone_are_fetched(control, steps) -> None:
    for (ranks, samples), found in steps.items():
        setting = control.Setting(ranks, samples, mean_tokens=24)
        others = control.Others(setting, control.Answers(setting))
        own = {(t.group, t.sample): t for rank in range(ranks) for t in others.own(rank)}
        rewards = np.array([REWARD[own[key].judgement.verdict] for key in sorted(own)], np.int8)
        kept = [(item.group, item.sample) for item in select(rewards.reshape(-1, 16), run_seed=0, step=0)]
        assert len(kept) == samples // 8
        expected = sum(4 * (100 + 2 * len(own[key].response_ids)) for key in kept if key[0] % ranks)
        assert found["fetch"]["rank 0"].bytes_in == expected
        own_part = sum(4 * (100 + 2 * len(own[key].response_ids)) for key in kept if key[0] % ranks == 0)
        for rank in ("rank 0", "last rank"):  # one broadcast in a world of them is passed on to all, by all
            assert found["fetch"][rank].bytes_out <= 1.2 * expected + own_part * np.log2(ranks)
            assert found["fetch"][rank].messages_out <= min(ranks, samples // 16) + 2 * np.log2(ranks)


def test_statistics_do_not_depend_on_the_number_of_samples(steps) -> None:
    for ranks in (128, 1024):
        few, many = (steps[ranks, samples]["statistics"]["rank 0"] for samples in (2048, 16384))
        assert abs(many.bytes_in - few.bytes_in) <= 8 * ranks
        assert many.messages_in == few.messages_in


def test_a_tree_passes_every_broadcast_on_once(control) -> None:
    world = importlib.import_module("control_world")
    for size in (1, 2, 3, 8, 100, 1024):
        children = [world.num_children(position, size) for position in range(size)]
        assert sum(children) == size - 1
        assert children[0] == max(children) == (size - 1).bit_length()


def test_a_schedule_asks_for_each_request_once(control) -> None:
    """Whatever ``next`` gives out, at 128 engines: no request is looked at again and again."""
    parts = importlib.import_module("control_parts")
    few, many = (parts.schedule_steps(128, samples)["assigned"] for samples in (2048, 16384))
    assert (few, many) == (2048, 16384)


def test_the_schedule_does_not_look_at_every_engine_for_every_request(control) -> None:
    parts = importlib.import_module("control_parts")
    for engines in (8, 128, 1024):
        assert parts.schedule_steps(engines, 4096)["looks"] < 10 * 4096


def test_the_table_in_the_docs_is_that_of_the_result_file() -> None:
    parts = importlib.import_module("control_parts")
    report = json.loads((ROOT / "benchmarks/results/control_path.json").read_text())
    text = (ROOT / "docs/scaling.md").read_text()
    for name, table in parts.tables(report).items():
        assert table in text, f"docs/scaling.md: the table {name!r} is not that of control_path.json"
