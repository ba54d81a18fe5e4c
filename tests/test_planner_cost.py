"""The cost model against closed forms, Megatron's own schedule, a token-by-token simulation and published numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from planner_cases import QWEN_7B, QWEN_32B, setting_of

from megatron_oreal.data.lengths import LengthDistribution
from megatron_oreal.data.packing import WorkModel
from megatron_oreal.errors import UserError
from megatron_oreal.planner.activations import layer_bytes
from megatron_oreal.planner.assumptions import Assumptions, parse_assumptions
from megatron_oreal.planner.calibration import calibrate, solve_efficiency
from megatron_oreal.planner.cost import PUBLISHED_STEP_S, CostModel, Workload
from megatron_oreal.planner.devices import DEVICES, device_of_name, find_device
from megatron_oreal.planner.memory import quick_memory
from megatron_oreal.planner.pipeline import Op, pipeline_time, stage_ops
from megatron_oreal.planner.placement import place
from megatron_oreal.planner.rollout_model import EngineSpeed, RolloutEstimate, _Engine, simulate_rollout
from megatron_oreal.planner.traffic import quick_traffic
from megatron_oreal.planner.types import Setting
from megatron_oreal.planner.update_model import OPTIMIZER_BYTES, UpdateModel

ASSUMED = Assumptions()
H100, A100 = DEVICES["h100"], DEVICES["a100-80g"]


# Pipeline schedules


@pytest.mark.parametrize(("pp", "count"), [(1, 5), (2, 3), (4, 4), (4, 9), (8, 3)])
def test_equal_stages_take_the_closed_form_of_1f1b(pp: int, count: int) -> None:
    time = pipeline_time(pp, None, count, lambda _, op: 1.0 if op.kind == "F" else 2.0, lambda *_: 0.0)
    assert time.seconds == (count + pp - 1) * 3
    assert time.bubble == pytest.approx((pp - 1) / (count + pp - 1))


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 4), (4, 2, 8), (4, 4, 4)])
def test_interleaving_divides_the_bubble(pp: int, vpp: int, count: int) -> None:
    """Narayanan et al. (arXiv 2104.04473): (pp - 1) / vpp of a micro-batch's time, chunks being 1 / vpp as long."""
    time = pipeline_time(pp, vpp, count, lambda _, op: (1.0 if op.kind == "F" else 2.0) / vpp, lambda *_: 0.0)
    assert time.seconds == pytest.approx(3 * count + 3 * (pp - 1) / vpp)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 6), (4, 2, 8), (4, 4, 12)])
def test_interleaved_order_is_megatrons(pp: int, vpp: int, count: int) -> None:
    table = get_schedule_table(count, vpp, pp)  # of every forward: (micro-batch, chunk)
    for stage in range(pp):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=vpp,
        )
        _, _, warmup, _ = get_pp_rank_microbatches(count, vpp, pp, p2p_communicator=communicator)
        ops = stage_ops(stage, pp, vpp, count, forward_only=False)
        assert [(op.microbatch, op.chunk) for op in ops if op.kind == "F"] == [tuple(row) for row in table]
        expected = [(microbatch, vpp - 1 - chunk) for microbatch, chunk in table]
        assert [(op.microbatch, op.chunk) for op in ops if op.kind == "B"] == expected
        kinds = "".join(op.kind for op in ops)
        steady = len(table) - warmup
        assert kinds == "F" * warmup + "FB" * steady + "B" * warmup


def test_a_transfer_delays_every_stage_behind_it() -> None:
    quick = pipeline_time(3, None, 1, lambda *_: 1.0, lambda *_: 0.0)
    slow = pipeline_time(3, None, 1, lambda *_: 1.0, lambda *_: 0.5)
    assert slow.seconds - quick.seconds == 4 * 0.5  # two edges, forwards and backwards; the last stage has none
    assert slow.busy == quick.busy == (2.0, 2.0, 2.0)


def test_forward_only_runs_forwards_alone() -> None:
    assert all(op.kind == "F" for op in stage_ops(1, 4, 2, 8, forward_only=True))
    assert pipeline_time(4, None, 6, lambda *_: 1.0, lambda *_: 0.0, forward_only=True).seconds == 6 + 3


def test_each_op_runs_once_on_each_stage() -> None:
    for stage in range(4):
        ops = stage_ops(stage, 4, 2, 8, forward_only=False)
        assert sorted(map(repr, ops)) == sorted(repr(Op(k, c, m)) for k in "FB" for c in (0, 1) for m in range(8))


# Rollout


def speed(tp: int = 1, device: str = "h100") -> EngineSpeed:
    return EngineSpeed.of(QWEN_7B, tp, 2, DEVICES[device], ASSUMED)


def test_a_decode_step_of_one_request_reads_the_weights_and_the_cache() -> None:
    """7B in bf16 on an H100: 7.07 B multiplied weights over 3.35 TB/s x 0.75, and 57,344 bytes a token of cache."""
    assumed = replace(ASSUMED, decode_step_overhead_s=0.0, sampler_s_per_request=0.0)
    engine = EngineSpeed.of(QWEN_7B, 1, 2, H100, assumed)
    weights, cache = 2 * WorkModel.from_spec(QWEN_7B).matmul_params, 28 * 2 * 4 * 128 * 2
    assert cache == 57344
    assert weights == pytest.approx(14.14e9, rel=0.01)
    assert engine.steps_s(1, 9_999, 1) == pytest.approx((weights + 10_000 * cache) / (3.35e12 * 0.75))


def test_kv_heads_are_read_whole_by_more_ranks_than_heads() -> None:
    assert speed(8).per_context_token_s == speed(4).per_context_token_s == speed(1).per_context_token_s / 4


def test_a_cache_in_fp8_holds_twice_the_tokens_and_is_read_in_half_the_time() -> None:
    def rollout(**sglang: object) -> RolloutEstimate:
        setting = setting_of(QWEN_7B, 8, memory_gib=79.1, sglang={"mem_fraction_static": 0.6, **sglang})
        model = CostModel(H100, ASSUMED, Workload.draw(setting, LengthDistribution.fixed(50), ASSUMED))
        return model.rollout(setting, place(setting), quick_memory(setting))

    full, half = rollout(), rollout(kv_cache_dtype="fp8_e4m3")
    assert half.cache_tokens == pytest.approx(2 * full.cache_tokens, rel=0.01)
    bare = full.last_step_s - EngineSpeed.of(QWEN_7B, 1, 2, H100, ASSUMED).steps_s(1, -1, 1)
    assert full.last_step_s - half.last_step_s == pytest.approx(bare / 2)


def token_by_token(lengths: list[int], prompt: int, engine: EngineSpeed, most: int) -> float:
    """One engine, one decode step at a time; every request has a prompt of its own and the cache is never full."""
    waiting, running, now = list(lengths), [], 0.0  # running: [drawn, length]
    while waiting or running:
        while waiting and len(running) < most:
            running.append([0, waiting.pop(0)])
            now += prompt * engine.prefill_s_per_token
        held = sum(prompt + drawn for drawn, _ in running)
        now += engine.steps_s(len(running), held, 1)
        running = [[drawn + 1, length] for drawn, length in running if drawn + 1 < length]
    return now


def simulate(lengths: np.ndarray, engine: EngineSpeed, **changed: int) -> object:
    given = {"prompt_tokens": 10, "num_engines": 1, "cache_tokens": 10**9, "max_running": 256, "window": 512}
    given |= {"enough": len(lengths)} | changed
    return simulate_rollout(lengths, speed=engine, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [1, 3, 50])
def test_one_engine_takes_as_long_as_a_simulation_of_every_token(most: int) -> None:
    lengths = LengthDistribution.lognormal(200, 40).draw(40, seed=most).reshape(40, 1)
    found = simulate(lengths, speed(), max_running=most)
    assert found.seconds == pytest.approx(token_by_token(lengths[:, 0].tolist(), 10, speed(), most))
    assert found.most_running == min(most, 40)
    assert found.generated_tokens == lengths.sum()


def test_engines_share_a_step_and_end_when_the_last_response_does() -> None:
    """With room for everything, each engine runs alone: the step is that of the engine that takes longest."""
    lengths = np.array([[700], [100], [300], [200]])
    found = simulate(lengths, speed(), num_engines=4)
    alone = [token_by_token([int(n)], 10, speed(), 1) for n in lengths[:, 0]]
    assert found.seconds == pytest.approx(max(alone))
    assert found.finish_s.tolist() == pytest.approx(sorted(alone))
    assert found.idle_share == pytest.approx(1 - sum(alone) / (4 * max(alone)))


def test_a_waiting_request_goes_to_the_engine_that_is_free_first() -> None:
    found = simulate(np.array([[500], [100], [50]]), speed(), num_engines=2, window=1)
    first, second, third = (token_by_token(run, 10, speed(), 1) for run in ([100], [100, 50], [500]))
    assert found.finish_s.tolist() == pytest.approx([first, second, third])


def test_a_small_cache_retracts_and_still_ends_every_response() -> None:
    lengths = LengthDistribution.lognormal(4000, 1500).draw(64, seed=0).reshape(8, 8)
    roomy, tight = simulate(lengths, speed()), simulate(lengths, speed(), cache_tokens=20_000)
    assert roomy.retracted == 0 < tight.retracted
    assert len(tight.finish_s) == 64
    assert tight.generated_tokens == lengths.sum()
    assert tight.seconds > roomy.seconds


def test_the_request_that_has_drawn_least_is_put_back_not_the_one_that_will_draw_most() -> None:
    """A long response that began first stays: an engine does not know how long responses will be."""
    engine = _Engine(speed(), cache_tokens=4000, max_running=2)
    engine.waiting.extend([(0, 10, 9000), (1, 10, 500)])
    engine.admit([0, 1], 10)
    engine.advance(500)
    assert engine.take_ended() == [1]
    engine.waiting.append((2, 10, 2000))
    engine.admit([0, 1, 2], 10)
    while engine.context < 3900:
        engine.advance(1)
    engine.retract()
    assert list(engine.running) == [0]
    assert [(request, left) for request, _, left in engine.waiting] == [(2, 2000 - (engine.steps - 500))]


def test_drawing_ends_with_enough_complete_groups() -> None:
    lengths = np.array([[10, 10], [5000, 10], [20, 20]])
    found = simulate(lengths, speed(), enough=2)
    assert found.counted_groups == (0, 2)
    assert found.counted_tokens == 60 + 4 * 10
    assert len(found.finish_s) == 5
    # The response of 5,000 tokens was given up when the second group ended, after 20 decode steps.
    assert found.generated_tokens == 60 + 10 + 20


def test_the_embedded_engines_draw_their_own_groups() -> None:
    lengths = np.array([[400], [10], [400], [10]])
    found = simulate(lengths, speed(), num_engines=2, window=None)
    both = token_by_token([400, 400], 10, speed(), 2)
    assert found.seconds == pytest.approx(both)  # groups 0 and 2 on rank 0, though rank 1 is idle


def test_the_same_arguments_give_the_same_rollout() -> None:
    lengths = LengthDistribution.default(14000).draw(1024, seed=0).reshape(64, 16)
    one, two = (simulate(lengths, speed(), num_engines=32) for _ in range(2))
    assert one.seconds == two.seconds
    assert bool(np.array_equal(one.finish_s, two.finish_s))


# Update


def update_of(setting: Setting, lengths: list[int], assumed: Assumptions = ASSUMED) -> UpdateModel:
    return UpdateModel(setting, H100, assumed, place(setting), lengths, [n - 100 for n in lengths])


BARE = replace(ASSUMED, microbatch_overhead_s=0.0, collective_latency_s=0.0, logits_passes=0.0)


def test_one_gpu_takes_its_operations_over_its_rate() -> None:
    lengths = [4000, 9000, 16000, 500]
    update = update_of(setting_of(QWEN_7B, 1), lengths, BARE)
    work, head = WorkModel.from_spec(QWEN_7B), 2 * QWEN_7B.vocab_size * QWEN_7B.hidden_size
    forward = sum(work(n) - head * n + head * (n - 100) for n in lengths)  # the head reads responses alone
    assert update.reference().flops == forward
    assert update.policy().flops == 3 * forward
    assert update.reward_model().flops == 3 * sum(work(n) - head * n for n in lengths)
    rate = H100.flops * BARE.matmul_efficiency
    assert update.reference().seconds == pytest.approx(forward / rate)
    policy = update.policy()
    assert policy.compute_s == pytest.approx(3 * forward / rate)
    assert policy.bubble_s == pytest.approx(0, abs=1e-9)
    assert policy.dp_s == policy.tp_s == 0
    step_bytes = QWEN_7B.num_parameters() * OPTIMIZER_BYTES
    assert policy.optimizer_s == pytest.approx(step_bytes / (H100.hbm * BARE.hbm_efficiency), rel=1e-3)


@pytest.mark.parametrize(
    ("recompute", "forwards"),
    [
        ({}, 3.0),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 4.0),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 7}, 3.25),
    ],
)
def test_recompute_runs_layers_forward_again(recompute: dict[str, object], forwards: float) -> None:
    update = update_of(setting_of(QWEN_7B, 1, parallel=recompute), [8000, 3000], BARE)
    layers = sum(update.layer_work(n) for n in (8000, 3000)) / (H100.flops * BARE.matmul_efficiency)
    assert update.reward_model().compute_s == pytest.approx(forwards * layers)
    assert update.reward_model().flops == 3 * sum(update.layer_work(n) for n in (8000, 3000))


def test_activations_on_the_host_take_the_time_of_their_copies_where_it_is_longer() -> None:
    """Both ways: behind the forward pass and behind the backward pass."""
    setting = setting_of(QWEN_7B, 1, parallel={"cpu_offloading_num_layers": 2})
    here = update_of(setting_of(QWEN_7B, 1), [16384], BARE).reward_model()
    assert update_of(setting, [16384], replace(BARE, pcie_efficiency=1.0)).reward_model() == here
    saved = 2 * layer_bytes(setting, 16384).saved
    late = replace(BARE, pcie_efficiency=0.01)
    assert update_of(setting, [16384], late).reward_model().compute_s == pytest.approx(2 * saved / (H100.pcie * 0.01))
    assert update_of(setting, [16384], late).reference() == update_of(setting, [16384], BARE).reference()


def test_pipeline_stages_wait_and_tensor_parallel_ranks_talk() -> None:
    lengths = [6000] * 32
    flat = update_of(setting_of(QWEN_32B, 8, tp=8), lengths).policy()
    deep = update_of(setting_of(QWEN_32B, 8, tp=2, pp=4), lengths).policy()
    interleaved = update_of(setting_of(QWEN_32B, 8, tp=2, pp=4, vpp=4), lengths).policy()
    assert flat.bubble_s == pytest.approx(0, abs=1e-6)
    assert flat.tp_s > deep.tp_s > 0
    assert deep.bubble_s > interleaved.bubble_s > 0
    for each in (flat, deep, interleaved):
        parts = each.compute_s + each.tp_s + each.host_s + each.bubble_s + each.dp_s + each.optimizer_s
        assert parts == pytest.approx(each.seconds)


def test_gradients_travel_over_the_network_only_between_nodes() -> None:
    inside = update_of(setting_of(QWEN_7B, 8, tp=1), [2000] * 8)
    params = QWEN_7B.num_parameters()
    nvlink = H100.nvlink * ASSUMED.nvlink_efficiency
    assert inside.policy().dp_s == pytest.approx(params * 7 / 8 * 6 / nvlink, rel=1e-3)
    between = update_of(setting_of(QWEN_7B, 16, tp=8), [2000] * 8)
    network = H100.network * ASSUMED.network_efficiency
    assert between.policy().dp_s == pytest.approx(params / 8 * 1 / 2 * 6 / network, rel=1e-3)


def test_an_overlap_hides_what_it_overlaps_and_nothing_else() -> None:
    """2 bytes a parameter, the gathered weights, stay in sight until their own overlap; the policy's always do."""
    reduced = {"overlap_grad_reduce": True}
    weights = QWEN_7B.num_parameters() / 8 / 2 * 2 / (H100.network * ASSUMED.network_efficiency)
    update = update_of(setting_of(QWEN_7B, 16, tp=8, parallel=reduced), [16000] * 32)
    assert update.policy().dp_s == pytest.approx(weights, rel=1e-3)
    assert 0.9 * weights < update.reward_model().dp_s < weights  # no vocabulary head
    gathered = {"overlap_param_gather": True}
    update = update_of(setting_of(QWEN_7B, 16, tp=8, parallel=reduced | gathered), [16000] * 32)
    assert update.policy().dp_s == pytest.approx(weights, rel=1e-3)
    assert update.reward_model().dp_s == 0


# A whole step


def step_of(setting: Setting, device: str = "a100-80g", assumed: Assumptions = ASSUMED):
    gpu = DEVICES[device]
    placement = place(setting)
    lengths = LengthDistribution.default(setting.config.rollout.gen_max_new)
    model = CostModel(gpu, assumed, Workload.draw(setting, lengths, assumed))
    return model.step(setting, placement, None, quick_traffic(setting, placement, gpu, assumed))


def test_a_step_is_the_sum_of_its_phases_and_counts_all_tokens() -> None:
    cost = step_of(setting_of(QWEN_7B, 32, tp=4, engine_tp=2))
    assert cost.seconds == pytest.approx(sum(cost.phases.values()))
    assert cost.tokens == cost.rollout.lengths.sum() + 1024 * round(ASSUMED.prompt_tokens)
    assert cost.tokens_per_s_per_gpu == pytest.approx(cost.tokens / cost.seconds / 32)
    assert cost.update.kept_sequences == 128


def test_kept_sequences_follow_the_filter() -> None:
    counts = {"pair": 128, "groups": 1024, "none": 1024}
    for name, count in counts.items():
        setting = setting_of(QWEN_7B, 32, tp=4, algorithm={"filter": name})
        kept = Workload.draw(setting, LengthDistribution.fixed(50), ASSUMED).kept
        assert len(kept) == len(set(kept)) == count
    half = replace(ASSUMED, kept_groups=0.5)
    assert len(Workload.draw(setting_of(QWEN_7B, 32), LengthDistribution.fixed(50), half).kept) == 64


def test_the_published_step_is_between_the_model_and_a_static_batch_in_eager_mode() -> None:
    """The released code: 360 s for 7B on 32 A100. It decodes static batches to the longest response, 14,000 steps.

    So its decode step takes less than 360 s / 14,000 = 25.7 ms. The model's step must be shorter, for it batches
    continuously; so must 14,000 of its decode steps at the released code's TP 4 and 128 requests.
    """
    setting = setting_of(QWEN_7B, 32, tp=4, engine_tp=4)
    cost = step_of(setting)
    assert PUBLISHED_STEP_S / 10 < cost.seconds < PUBLISHED_STEP_S
    static = EngineSpeed.of(QWEN_7B, 4, 2, A100, ASSUMED).steps_s(128, 128 * 700, 14000)
    assert cost.rollout.seconds < static < PUBLISHED_STEP_S


def test_the_cache_is_reported_whole_and_simulated_as_far_as_it_is_of_use() -> None:
    setting = setting_of(QWEN_7B, 32, tp=4, engine_tp=4, memory_gib=79.1, sglang={"mem_fraction_static": 0.6})
    placement, found = place(setting), quick_memory(setting)
    model = CostModel(H100, ASSUMED, Workload.draw(setting, LengthDistribution.fixed(50), ASSUMED))
    tokens = model.cache_tokens(setting, placement, found)
    assert tokens == found.phase("generate").live["KV cache"] // (28 * 2 * 1 * 128 * 2)
    useful = setting.config.rollout.max_running_requests * setting.config.rollout.gen_max_length
    assert model.rollout(setting, placement, found).cache_tokens == min(useful, tokens // 1000 * 1000)
    few = setting_of(
        QWEN_7B, 32, tp=4, engine_tp=4, memory_gib=79.1, sglang=setting.config.rollout.sglang,
        rollout={"max_running_requests": 8},
    )  # fmt: skip
    assert model.rollout(few, placement, found).cache_tokens == 8 * 16384 < tokens


def test_offloaded_parts_cost_their_bytes_twice_over_pcie() -> None:
    from megatron_oreal.planner.types import Phase, RankMemory

    memory = RankMemory(0, 0, 0, 0, {"policy optimizer": 70 * 10**9}, (Phase("generate", {}),))
    setting = setting_of(QWEN_7B, 32, tp=4, parallel={"offload": ["optimizer"]})
    placement = place(setting)
    model = CostModel(H100, ASSUMED, Workload.draw(setting, LengthDistribution.fixed(50), ASSUMED))
    traffic = quick_traffic(setting, placement, H100, ASSUMED)
    phases = model.switch(setting, placement, memory, traffic)
    assert phases["offload and load"] == pytest.approx(2 * 70e9 / (H100.pcie * ASSUMED.pcie_efficiency))


# Assumptions, devices, calibration


def test_assumptions_name_their_values_units_and_sources() -> None:
    changed = parse_assumptions(ASSUMED, ["matmul_efficiency=0.6", "sleep_s=0"])
    rows = {row["name"]: row for row in changed.rows()}
    assert (rows["matmul_efficiency"]["value"], rows["matmul_efficiency"]["source"]) == (0.6, "--assume")
    assert all(row["unit"] and row["meaning"] and row["source"] for row in rows.values())
    assert rows["wake_cache_s"]["source"].startswith("assumed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("matmul=0.5", "did you mean 'matmul_efficiency'"),
        ("sources=1", "there is no assumption 'sources'"),
        ("matmul_efficiency", "is not of the form"),
        ("matmul_efficiency=fast", "is not of the form"),
        ("matmul_efficiency=1.01", "between 0.001 and 1"),
        ("matmul_efficiency=0", "between 0.001 and 1"),
        ("hbm_efficiency=1e-300", "between 0.001 and 1"),
        ("hbm_efficiency=nan", "between 0.001 and 1"),
        ("sleep_s=-1", "not negative"),
        ("sleep_s=inf", "not negative"),
        ("host_adam_bytes_per_s=0", "above 0"),
    ],
)
def test_an_assumption_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_assumptions(ASSUMED, [text])


def test_gpus_are_found_by_their_names() -> None:
    assert find_device("H200").memory_bytes > 139 * 2**30
    assert device_of_name("NVIDIA H200") is DEVICES["h200"]
    assert device_of_name("NVIDIA A100-SXM4-80GB") is DEVICES["a100-80g"]
    assert device_of_name("NVIDIA H100 PCIe") is None
    assert device_of_name("AMD EPYC") is None
    with pytest.raises(UserError, match=r"--gpu 'h1000' is not known \(did you mean 'h100'"):
        find_device("h1000")
    other = DEVICES["h100"].with_overrides(memory_gib=40, network_gbps=100)
    assert (other.memory_bytes, other.network) == (40 * 2**30, 12.5e9)


def bench_result(folder: Path, setting: Setting, device: str, figures: dict[tuple[str, str], float]) -> Path:
    """A file as ``megatron-oreal bench`` writes it."""
    spec = setting.spec
    keys = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "vocab_size")
    record = {
        "world": {"ranks": setting.world_size, "ranks_per_node": 8, "devices": [device], "device": "cuda"},
        "model": {"parameters": spec.num_parameters(), "shape": {key: getattr(spec, key) for key in keys}},
        "workload": {"prompt_tokens": 700, "response_lengths": None, "kept_sequences": 128},
        "figures": [{"part": part, "name": name, "median": value} for (part, name), value in figures.items()],
        "config": setting.config.model_dump(mode="json"),
    }
    file = folder / "bench_gpu.json"
    file.write_text(json.dumps(record))
    return file


def test_measured_times_give_back_the_efficiencies_that_made_them(tmp_path: Path) -> None:
    setting = setting_of(QWEN_7B, 8, tp=4, engine_tp=1)
    truth = replace(ASSUMED, matmul_efficiency=0.33, decode_hbm_efficiency=0.61, sleep_s=7.5)
    cost = step_of(setting, "h200", truth)
    update = sum(each.seconds for each in cost.update.passes.values())
    figures = {
        ("update", "seconds"): update + 3.0,
        ("switch", "phase update"): 3.0,  # copies of offloaded parts
        ("rollout", "output_seconds"): cost.rollout.seconds,
        ("switch", "phase sleep"): 7.5,
    }
    bench_result(tmp_path, setting, "NVIDIA H200", figures)
    found, notes = calibrate(ASSUMED, DEVICES["h200"], QWEN_32B, tmp_path)
    assert found.matmul_efficiency == pytest.approx(0.33, rel=0.01)
    assert found.decode_hbm_efficiency == pytest.approx(0.61, rel=0.01)
    assert found.sleep_s == 7.5
    assert notes == []
    sources = {row["name"]: row["source"] for row in found.rows()}
    assert sources["matmul_efficiency"] == sources["sleep_s"] == "measured: bench_gpu.json"
    assert sources["wake_cache_s"].startswith("assumed")


def test_results_of_other_hardware_calibrate_nothing(tmp_path: Path) -> None:
    setting = setting_of(QWEN_7B, 8, tp=4)
    bench_result(tmp_path, setting, "NVIDIA H100 80GB HBM3", {("update", "seconds"): 5.0})
    assert calibrate(ASSUMED, DEVICES["h200"], QWEN_7B, tmp_path) == (ASSUMED, [])


def test_a_time_that_no_efficiency_explains_is_said_and_changes_nothing(tmp_path: Path) -> None:
    setting = setting_of(QWEN_7B, 8, tp=4)
    bench_result(tmp_path, setting, "NVIDIA H200", {("update", "seconds"): 1e-3})
    found, notes = calibrate(ASSUMED, DEVICES["h200"], QWEN_7B, tmp_path)
    assert found == ASSUMED
    assert len(notes) == 1
    assert "no matmul_efficiency" in notes[0] or "which no matmul_efficiency gives" in notes[0]


@pytest.mark.parametrize("text", ["", "[]", '{"figures": []}', '{"figures": [{"part": 1}]}', "{"])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench_x.json").write_text(text)
    with pytest.raises(UserError, match=r"bench_x\.json: not a result"):
        calibrate(ASSUMED, DEVICES["h200"], QWEN_7B, tmp_path)


def test_solving_for_an_efficiency() -> None:
    assert solve_efficiency(lambda x: 2 / x, 5.0) == pytest.approx(0.4, rel=1e-3)
    assert solve_efficiency(lambda x: 2 / x, 1.0) is None
