"""The planner's memory: closed forms against Megatron's modules on meta tensors, and both against real gloo ranks."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from planner_memory_cases import BLIND_CASES, CASES, CI_CASES, PROMPT, Case, small_spec

from megatron_oreal.config_load import parse_config
from megatron_oreal.layout import ModelSpec, RopeSpec, megatron_layout, pipeline_layer_split
from megatron_oreal.layout.digest import CHUNK_ELEMENTS
from megatron_oreal.layout.megatron import padded_vocab_size
from megatron_oreal.planner import (
    Setting,
    distinct_ranks,
    memory,
    parameter_shapes,
    quick_memory,
    quick_rank_memory,
    rank_memory,
)
from megatron_oreal.planner.activations import in_flight, layer_bytes
from megatron_oreal.planner.engine import CHUNK_ELEMENTS as DIGEST_CHUNK_ELEMENTS
from megatron_oreal.planner.memory import grid_of
from megatron_oreal.planner.types import RankMemory
from megatron_oreal.planner.update import simulate_update

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_memory as benchmark  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "plan_memory.json"
QWEN_7B = ModelSpec("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))
QWEN_32B = ModelSpec("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def parallel(tp: int = 1, pp: int = 1, **more: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} | more


STATIC = [
    Case("one rank", 1, {}),
    Case("fp32, no reward model", 2, {}, dtype="fp32", reward_model=False),
    Case("TP2, DP3", 6, parallel(2)),
    Case("TP4 of 2 KV heads, DP4", 16, parallel(4)),
    Case("PP4, DP2, fp32", 8, parallel(1, 4), dtype="fp32"),
    Case("PP2, VPP2, DP64", 128, parallel(1, 2, virtual_pipeline_model_parallel_size=2)),
    Case("PP3, short first stage", 3, parallel(1, 3, num_layers_in_first_pipeline_stage=2)),
    Case("tied embeddings", 2, parallel(2), shape={"tie_word_embeddings": True}),
    Case("tied embeddings on two stages", 4, parallel(2, 2), shape={"tie_word_embeddings": True}),
    Case("no distributed optimizer", 4, parallel(2, use_distributed_optimizer=False)),
    Case("no distributed optimizer, fp32", 2, {"use_distributed_optimizer": False}, dtype="fp32"),
    Case("buckets of overlapped reductions", 3, {"overlap_grad_reduce": True, "ddp_bucket_size": 100_000}),
    Case("vocabulary padded to 128", 4, parallel(4, make_vocab_size_divisible_by=128)),
    Case(
        "Qwen3: norms on q and k, no bias",
        2,
        parallel(2),
        shape={"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    ),
]


@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name)
def test_closed_forms_of_parameters_gradients_and_optimizer_equal_megatrons_buffers(case):
    setting = case.setting()
    last = setting.world_size - 1
    for rank in {*distinct_ranks(setting), last}:
        real = {k: v for k, v in simulate_update(setting, rank, learn=False).static.items() if k != "constants"}
        assert real == quick_rank_memory(setting, rank).static
        assert real["policy gradients"] > 0


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_the_distinct_ranks_hold_the_whole_model_once(shape, sizes):
    tp, pp = sizes
    setting = Case("", tp * pp * 2, parallel(tp, pp), shape=shape).setting()
    spec = setting.spec
    split = replicated = 0
    for rank in distinct_ranks(setting):
        for name, dims in parameter_shapes(setting, rank)["policy"].items():
            if name == "output_layer.weight" and spec.tied_embeddings:
                continue  # the last stage's copy of the embedding
            count = torch.Size(dims).numel()
            split, replicated = (split, replicated + count) if "norm" in name else (split + count, replicated)
    padding = padded_vocab_size(spec.vocab_size, tp=tp) - spec.vocab_size
    tables = 1 if spec.tied_embeddings else 2
    assert split * tp + replicated - tables * padding * spec.hidden_size == spec.num_parameters()


@pytest.mark.parametrize(
    ("spec", "tp", "pp", "world"),
    [
        pytest.param(QWEN_7B, 4, 1, 32, id="7B TP4 x 32"),
        pytest.param(QWEN_32B, 8, 1, 128, id="32B TP8 PP1 x 128"),
        pytest.param(QWEN_32B, 8, 2, 128, id="32B TP8 PP2 x 128", marks=pytest.mark.slow),
        pytest.param(QWEN_32B, 4, 4, 128, id="32B TP4 PP4 x 128", marks=pytest.mark.slow),
    ],
)
def test_the_modules_of_production_sizes_have_the_layouts_shapes(spec, tp, pp, world):
    setting = production(spec, tp, pp, world)
    grid, stages = grid_of(setting), pipeline_layer_split(spec, pp=pp)
    for reward_model, name in ((False, "policy"), (False, "reference"), (True, "reward model")):
        layout = megatron_layout(spec, tp=tp, pp=pp, reward_model=reward_model, layer_split=stages)
        shards = {rank: layout.shards[grid.model_index(rank)].shapes for rank in distinct_ranks(setting)}
        for rank, shapes in shards.items():
            assert BUILT(setting, rank)[name] == dict(shapes)


_built: dict[tuple[Any, ...], dict[str, dict[str, tuple[int, ...]]]] = {}


def BUILT(setting: Setting, rank: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of a rank, built once."""
    key = (setting.spec.num_layers, setting.world_size, grid_of(setting), rank)
    if key not in _built:
        _built[key] = parameter_shapes(setting, rank)
    return _built[key]


def production(spec: ModelSpec, tp: int, pp: int, world: int, **changes: Any) -> Setting:
    """A setting of the published sizes; ``changes``: of the config's parallel section."""
    tree = {
        "work_dir": "unused",
        "model": {"path": "unused", "stop_word": "x"},
        "data": {"train": "unused"},
        "rollout": {"engine": "sglang", "engine_tp": tp, "sglang": {"mem_fraction_static": 0.6}},
        "parallel": parallel(tp, pp, sequence_parallel=tp > 1) | changes,
    }
    return Setting(parse_config(tree), spec, world, 8, device_memory_bytes=141 * 10**9)


DEPTHS = [
    ("bf16", {}, {}),
    ("fp32", {}, {}),
    ("bf16", TP2_SP, {}),
    pytest.param("bf16", {"tensor_model_parallel_size": 2}, {"num_key_value_heads": 8}, marks=pytest.mark.slow),
    ("bf16", {}, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}),
]


@pytest.mark.parametrize(("dtype", "sizes", "shape"), DEPTHS)
def test_a_further_torch_native_layer_costs_what_the_formula_says(dtype, sizes, shape):
    def peak(layers: int, predict: Any) -> int:
        world = sizes.get("tensor_model_parallel_size", 1)
        case = Case("", world, sizes, dtype=dtype, shape=shape | {"num_hidden_layers": layers}, lengths=(1024,))
        return predict(case.setting())

    def counted(setting: Setting) -> int:
        return sum(simulate_update(setting, 0).dynamic["policy"].values())

    def formula(setting: Setting) -> int:
        live = quick_rank_memory(setting, 0).phase("policy").live
        return live["activations"] + live["logits and loss"]

    real, closed = (peak(5, way) - peak(3, way) for way in (counted, formula))
    assert closed == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "world", "share"),
    [
        pytest.param(parallel(2, 1, sequence_parallel=True), 2, 0.05, marks=pytest.mark.slow),
        pytest.param(parallel(1, 2), 2, 0.05, marks=pytest.mark.slow),
        pytest.param(parallel(2, 2, sequence_parallel=True), 4, 0.05),
        pytest.param(parallel(1, 2, virtual_pipeline_model_parallel_size=2), 2, 0.07),
        pytest.param(parallel(2, 1, sequence_parallel=True) | FULL, 2, 0.05),
        pytest.param(parallel(1, 1, loss_chunk_tokens=2048), 1, 0.05, marks=pytest.mark.slow),
    ],
)
def test_closed_forms_of_activations_are_near_the_counted_ones(sizes, world, share):
    """At widths of a 1.5B model and full micro-batches, where what the formulas leave out is small.

    That is more in the interleaved schedule: the last stage holds hidden states that were sent and received.
    """
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "vocab_size": 8000}
    case = Case("", world, sizes, shape=shape, max_length=4096)
    setting = case.setting(lengths=None, prompt_tokens=200)
    for rank in distinct_ranks(setting):
        exact, quick = rank_memory(setting, rank), quick_rank_memory(setting, rank)
        for phase in ("reward_model", "policy"):
            real, closed = (
                each.phase(phase).live["activations"] + each.phase(phase).live.get("logits and loss", 0)
                for each in (exact, quick)
            )
            assert closed == pytest.approx(real, rel=share), (rank, phase)
        assert quick.peak.total == pytest.approx(exact.peak.total, rel=share - 0.02)


def test_stages_hold_the_micro_batches_of_megatrons_schedules():
    plain = Case("", 4, parallel(1, 4)).setting()
    assert [in_flight(plain, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(plain, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = Case("", 2, parallel(1, 2, virtual_pipeline_model_parallel_size=2)).setting()
    assert [in_flight(interleaved, stage, 4) for stage in range(2)] == [5, 3]


@pytest.fixture(scope="module")
def measured_in_ci() -> dict[str, list[dict[str, int]]]:
    """Bytes by phase of every rank of the cases that take seconds, one launch for all."""
    cases = list(CI_CASES.values())
    ranks = run_ranks("planner_memory_cases:measure", cases[0].world_size, {"cases": cases})
    return {case.name: [measured[index] for measured in ranks] for index, case in enumerate(cases)}


@functools.cache
def exact(name: str, rank: int) -> RankMemory:
    """The planner's word on a CI case."""
    return rank_memory(CI_CASES[name].setting(), rank)


@pytest.mark.parametrize("name", list(CI_CASES))
def test_real_ranks_hold_what_was_predicted(name, measured_in_ci):
    """Training within 2 %, also where the policy's update is not the peak; the other phases are modelled in part."""
    for rank, measured in enumerate(measured_in_ci[name]):
        planned = exact(name, rank)
        phases = {each.name: each.total for each in planned.phases}
        assert set(phases) <= set(measured), "every phase that is planned is measured"
        rest = ("generate", "publish", "checkpoint")
        training = {phase: size for phase, size in measured.items() if phase not in rest}
        ratios = {phase: phases[phase] / size for phase, size in training.items()}
        assert all(abs(ratio - 1) <= 0.02 for ratio in ratios.values()), ratios
        assert all(phases[phase] == pytest.approx(measured[phase], rel=0.15) for phase in rest)
        assert planned.peak.total == pytest.approx(max(measured.values()), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES | BLIND_CASES))
def test_the_benchmarks_settings_are_within_ten_percent(name):
    case = (CASES | BLIND_CASES)[name]
    ranks = run_ranks("planner_memory_cases:measure", case.world_size, {"cases": [case]}, timeout_s=1200)
    for rank, (measured,) in enumerate(ranks):
        planned = {each.name: each.total for each in rank_memory(case.setting(), rank).phases}
        assert max(planned[name] for name in measured) == pytest.approx(max(measured.values()), rel=0.1)


def test_the_committed_comparison_is_within_ten_percent_and_is_the_documented_one():
    rows = json.loads(RESULT.read_text())["rows"]
    cases = CASES | BLIND_CASES
    assert [(row["setting"], row["rank"]) for row in rows] == [
        (name, rank) for name, case in cases.items() for rank in range(case.world_size)
    ]
    assert {row["setting"] for row in rows if "predicted_before" in row} == set(BLIND_CASES)
    for row in rows:
        assert row["measured_peak"] == max(row["measured"].values())
        assert row["exact_peak"] == pytest.approx(row["measured_peak"], rel=0.1)
        # Of torch-native layers the closed forms leave selective recomputation out: an upper bound.
        over = 1.3 if cases[row["setting"]].parallel.get("recompute_granularity") == "selective" else 1.1
        assert 0.9 <= row["quick_peak"] / row["measured_peak"] <= over
        before = row.get("predicted_before", row)
        assert before["exact_peak"] == pytest.approx(row["measured_peak"], rel=0.1)
    text = (ROOT / "docs" / "planner_memory.md").read_text()
    documented = text.split(benchmark.BEGIN)[1].split(benchmark.END)[0].strip()
    assert documented == benchmark.table(rows)


def test_the_planner_still_predicts_what_the_result_file_says():
    for row in json.loads(RESULT.read_text())["rows"]:
        if row["setting"] == "DP2, full recompute, all offloaded, bf16":
            quick = quick_rank_memory(CASES[row["setting"]].setting(), row["rank"])
            assert {each.name: each.total for each in quick.phases if each.name in row["quick"]} == {
                name: size for name, size in row["quick"].items() if size is not None
            }


def test_offloaded_parts_are_there_only_in_their_phases():
    case = CASES["DP2, full recompute, all offloaded, bf16"]
    offloaded = quick_rank_memory(case.setting(), 0)
    assert "policy optimizer" not in offloaded.phase("reference").live
    assert "policy parameters" not in offloaded.phase("generate").live
    assert {"reward model optimizer", "reward model gradients"} <= set(offloaded.phase("reward_model").live)
    assert {"policy parameters", "policy optimizer"} <= set(offloaded.phase("policy").live)
    stays = quick_rank_memory(replace(case, parallel=FULL).setting(), 0).phase("start")
    assert set(offloaded.static) <= set(stays.live)
    # One model after the other: the policy, which has the vocabulary head, takes most.
    start = offloaded.phase("start").live
    assert {"policy parameters", "policy gradients", "policy optimizer", "model building"} >= set(start) - {
        "engine weights"
    }
    assert offloaded.phase("start").total < stays.total
    assert offloaded.host["policy optimizer"] == offloaded.static["policy optimizer"]
    assert "policy gradients" not in offloaded.host


def test_a_served_engine_takes_its_share_and_sleeps_while_the_actors_train():
    setting = production(QWEN_32B, 8, 1, 128)
    planned = quick_memory(setting)
    generate = planned.phase("generate").live
    assert generate["engine weights"] + generate["KV cache"] == round(0.6 * setting.device_memory_bytes)
    assert not {"engine weights", "KV cache"} & set(planned.phase("policy").live)
    assert {"engine weights", "staging"} <= set(planned.phase("publish").live)
    assert planned.phase("publish").live["staging"] <= 2 * setting.config.rollout.server.bucket_bytes
    assert planned.modelled and planned.phase("policy").live["reserve"] == setting.reserve_bytes


def test_more_of_everything_that_saves_memory_saves_memory():
    base = production(QWEN_32B, 8, 1, 128)
    total = quick_memory(base).phase("policy").total
    for changes in (FULL, {"optimizer_cpu_offload": True}, {"max_tokens_per_microbatch": 8192}):
        sections = base.config.model_dump()
        sections["parallel"] |= changes
        sections["rollout"] |= {"gen_max_length": 8192, "gen_max_new": 8000}
        saving = replace(base, config=parse_config(sections))
        assert quick_memory(saving).phase("policy").total < total


def test_a_search_can_ask_hundreds_of_settings():
    settings = [production(QWEN_32B, 8, pp, 128) for pp in (1, 2, 4)]
    for setting in settings:
        quick_memory(setting)  # layouts of engines are kept
    began = time.process_time()
    for setting in settings * 5:
        quick_memory(setting)
    assert (time.process_time() - began) / 15 < 0.05


def test_simulation_leaves_no_process_group_behind_and_repeats():
    setting = CI_CASES["TP2, SP"].setting()
    first = exact("TP2, SP", 0)
    assert not dist.is_initialized()
    assert torch.zeros(1).device.type == "cpu"
    again = memory(setting)
    assert [each.phases for each in again] == [first.phases]
    assert [each.rank for each in again] == distinct_ranks(setting) == [0]


@pytest.mark.slow
def test_a_process_with_a_group_of_its_own_plans_in_another():
    setting = CI_CASES["TP2, SP"].setting()
    expected = memory(setting)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert memory(setting) == expected
    finally:
        dist.destroy_process_group()


def test_digests_are_planned_for_the_chunks_that_they_are_taken_in():
    assert DIGEST_CHUNK_ELEMENTS == CHUNK_ELEMENTS


def test_selective_recomputation_of_the_mlp_keeps_its_input_alone():
    base = production(QWEN_32B, 8, 1, 128)

    def saved(**changes: Any) -> float:
        return layer_bytes(production(QWEN_32B, 8, 1, 128, **changes), 16384).saved

    s, f, heads = 16384 // 8, 27648 // 8, 40 // 8
    selective = {"recompute_granularity": "selective"}
    assert layer_bytes(base, 16384).saved - saved(**selective) == 4 * 16384 * heads
    mlp = 2 * s * 5120 + 4 * s + 2 * 16384 * 3 * f
    assert layer_bytes(base, 16384).saved - saved(**selective, recompute_modules=["mlp"]) == mlp


def test_worst_case_needs_at_least_what_any_lengths_need():
    case = Case("", 2, parallel(1, 2))
    worst = quick_memory(case.setting(lengths=None)).peak.total
    for lengths in ((1024,) * 8, (300, 40 + 1, 900), (PROMPT + 1,) * 30):
        assert quick_memory(case.setting(lengths=lengths)).peak.total <= worst * 1.02
    assert small_spec() == case.setting().spec


def test_the_precision_aware_optimizer_keeps_two_bytes_of_a_main_weight() -> None:
    owned = quick_memory(production(QWEN_7B, 4, 1, 32)).static["policy optimizer"] // 12
    for dtypes, size in (
        ({}, 10),
        ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 6),
        ({"main_params_dtype": "fp16", "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}, 5),
    ):
        setting = production(QWEN_7B, 4, 1, 32, use_precision_aware_optimizer=True, **dtypes)
        assert quick_memory(setting).static["policy optimizer"] == size * owned


def test_adam_on_the_cpu_is_host_memory() -> None:
    owned = quick_memory(production(QWEN_7B, 4, 1, 32)).static["policy optimizer"] // 12
    changes = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "offload": ["optimizer"]}
    setting = production(QWEN_7B, 4, 1, 32, **changes)
    found = quick_memory(setting)
    # Half of it there for good, with its gradients; the other half waits there while it is not in use.
    assert found.static["policy optimizer"] == 6 * owned
    assert found.host["policy optimizer"] == 8 * owned + 6 * owned
    assert memory(setting)[0].host == found.host


def test_activations_on_the_host_are_not_on_the_device() -> None:
    def found(layers: int) -> RankMemory:
        return quick_memory(production(QWEN_7B, 4, 1, 32, cpu_offloading_num_layers=layers))

    none, ten = found(0), found(10)
    saved = layer_bytes(production(QWEN_7B, 4, 1, 32), 16384).saved
    for phase in ("reward_model", "policy"):
        freed = none.phase(phase).live["activations"] - ten.phase(phase).live["activations"]
        assert freed == pytest.approx(10 * saved, rel=1e-6)
    assert none.phase("reference") == ten.phase("reference")
    assert ten.host["activations"] == pytest.approx(10 * saved, rel=1e-6)
    assert "activations" not in none.host


def test_servers_leave_for_a_checkpoint_only_where_trained_parts_come_back() -> None:
    for offload, asleep in ([], False), (["reference"], False), (["reference", "optimizer"], True):
        found = quick_memory(production(QWEN_7B, 4, 1, 32, offload=offload)).phase("checkpoint").live
        assert ("KV cache" not in found) == asleep, offload


@pytest.mark.parametrize(
    ("memory_gib", "engine_tp", "reserved_mib"),
    [
        (24, 4, 512 + 1.5 * 2048 + 512 + 2 * 80 + 8 * 42),
        (44.4, 1, 512 + 1.5 * 4096 + 128 + 2 * 32 + 8 * 50),
        (79.1, 4, 512 + 1.5 * 8192 + 512 + 2 * 512 + 8 * 58),
        (79.1, 1, 512 + 1.5 * 8192 + 128 + 2 * 256 + 8 * 58),
        (178.3, 1, 512 + 1.5 * 16384 + 128 + 2 * 512 + 8 * 74),
    ],
)
def test_the_share_of_an_engine_is_sglangs_default(memory_gib: float, engine_tp: int, reserved_mib: float) -> None:
    """By ``ServerArgs._handle_gpu_memory_settings`` of 0.5.17, whatever number of requests may run."""
    base = production(QWEN_7B, 4, 1, 32)
    rollout = {"engine_tp": engine_tp, "sglang": {}, "max_running_requests": 4}
    config = base.config.model_copy(update={"rollout": base.config.rollout.model_copy(update=rollout)})
    device = int(memory_gib * 2**30)
    live = quick_memory(replace(base, config=config, device_memory_bytes=device)).phase("generate").live
    share = (live["engine weights"] + live.get("KV cache", 0)) / device
    assert share == pytest.approx(1 - reserved_mib * 2**20 / device, abs=6e-4)
