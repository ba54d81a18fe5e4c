"""Plans for 7B on 32 and 32B on 128 ranks, built from metadata, and the committed table of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_oreal.layout import Plan, padded_vocab_size, sglang_padded_vocab_size

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks/results/reshard_plans.json").read_text())


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reshard_plans", ROOT / "benchmarks/reshard_plans.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()
PLANS: dict[int, Plan] = {}


def plan_of(number: int) -> Plan:
    if number not in PLANS:
        PLANS[number] = BENCHMARK.plan_of(BENCHMARK.CASES[number])
    return PLANS[number]


ROWS = range(len(BENCHMARK.CASES))


@pytest.mark.parametrize("number", ROWS)
def test_committed_sizes_and_counts_are_those_of_the_plan(number: int) -> None:
    case, row = BENCHMARK.CASES[number], dict(RESULT["rows"][number])
    for key in ("seconds", "cpu_seconds"):
        del row[key]
    assert row == case.__dict__ | BENCHMARK.sizes(case, plan_of(number))


@pytest.mark.parametrize("number", ROWS)
def test_every_gpu_receives_its_lower_bound_and_the_busiest_sender_sends_its_own(number: int) -> None:
    stats = plan_of(number).statistics
    assert stats.ratio == 1.0
    assert stats.received == stats.lacked
    assert max(stats.sent.values(), default=0) <= 1.01 * stats.send_bound
    row = RESULT["rows"][number]
    assert row["received_mean"] <= row["all_gather_mean"]
    if row["engine_tp"] > 1:
        assert row["received_mean"] < 0.51 * row["all_gather_mean"]


def test_nothing_moves_exactly_where_the_layouts_coincide() -> None:
    for number, case in enumerate(BENCHMARK.CASES):
        spec = BENCHMARK.MODELS[case.model]
        vocab = padded_vocab_size(spec.vocab_size, tp=case.tp, vocab_divisor=case.make_vocab_size_divisible_by)
        coincide = (
            case.engine_tp == case.tp == spec.num_kv_heads
            and case.pp == case.gpu_step == 1
            and vocab == sglang_padded_vocab_size(spec.vocab_size, tp=case.engine_tp)
        )
        assert plan_of(number).statistics.nothing_moves is coincide
        assert RESULT["rows"][number]["nothing_moves"] is coincide
    assert sum(row["nothing_moves"] for row in RESULT["rows"]) == 2


def test_no_node_asks_another_when_it_holds_the_whole_model() -> None:
    for number, case in enumerate(BENCHMARK.CASES):
        whole = case.pp == 1 and case.tp <= BENCHMARK.RANKS_PER_NODE
        assert (plan_of(number).statistics.cross_node == 0) is whole


def test_the_committed_table_is_that_of_the_result_file() -> None:
    assert BENCHMARK.table(RESULT) in (ROOT / "docs/layout.md").read_text()
    assert RESULT["repeats"] >= 5
    for row in RESULT["rows"]:
        assert len(row["seconds"]["all"]) == RESULT["repeats"]
        assert row["cpu_seconds"]["median"] < 5
    models = [(row["model"], row["tp"], row["pp"], row["dp"], row["engine_tp"]) for row in RESULT["rows"]]
    assert {("Qwen2.5-7B", 4, 1, 8, tp) for tp in (1, 2, 4)} <= set(models)
    assert {("Qwen2.5-32B", 8, *rest, tp) for rest in ((4, 4), (1, 16)) for tp in (4, 8)} <= set(models)


def test_files_that_the_document_names_exist() -> None:
    import re

    text = (ROOT / "docs/layout.md").read_text()
    names = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.(?:py|json))`", text)
    names += [f"megatron_oreal/{name}" for name in re.findall(r"`((?:layout|actor|rollout)/\w+\.py)`", text)]
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
