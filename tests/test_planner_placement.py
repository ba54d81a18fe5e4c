"""Who stands where: against Megatron's own rank groups, committed traffic, and layouts that were tampered with."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.parallel_state import RankGenerator
from planner_cases import QWEN_7B, QWEN_32B, TINY, setting_of

from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import Layout, ModelSpec, load_model_spec
from megatron_oreal.planner import placement_check
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.devices import DEVICES
from megatron_oreal.planner.placement import place
from megatron_oreal.planner.placement_check import check_placement
from megatron_oreal.planner.traffic import engine_layout, policy_layout, quick_traffic, reshard_traffic
from megatron_oreal.planner.types import Setting
from megatron_oreal.rollout.sglang import schedule as schedules

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"


def example(config: str, model: str, world: int) -> Setting:
    return Setting(load_config(EXAMPLES / "configs" / config), load_model_spec(EXAMPLES / "models" / model), world, 8)


@pytest.mark.parametrize(
    ("config", "model", "world"), [("oreal_32b.yaml", "OREAL-32B-SFT", 128), ("oreal_7b.yaml", "OREAL-7B-SFT", 32)]
)
def test_every_element_engine_and_request_of_the_large_configs_is_where_it_should_be(
    config: str, model: str, world: int
) -> None:
    began = time.process_time()
    setting = example(config, model, world)
    check = check_placement(setting)
    assert check.problems == ()
    assert check.ranks == world
    assert check.elements == setting.spec.num_parameters() > 7e9
    assert check.engines * setting.config.rollout.engine_tp == world
    assert check.requests == 1024
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "engine_tp"), [(8, 4, None, 4), (4, 8, 2, 8), (2, 4, 4, 1), (8, 1, None, 2)]
)
def test_other_sizes_of_32b_on_128_ranks_are_sound_too(tp: int, pp: int, vpp: int | None, engine_tp: int) -> None:
    assert check_placement(setting_of(QWEN_32B, 128, tp=tp, pp=pp, vpp=vpp, engine_tp=engine_tp)).problems == ()


@pytest.mark.parametrize("engine_tp", [1, 2, 4, 8])
def test_more_ranks_than_kv_heads_repeat_heads_in_engines_and_not_in_the_trainer(engine_tp: int) -> None:
    """2 KV heads: Megatron cuts inside heads at TP 4 and 8, SGLang repeats them."""
    for tp in (4, 8):
        assert check_placement(setting_of(TINY, 16, tp=tp, pp=2, engine_tp=engine_tp)).problems == ()


def test_tied_embeddings_stand_on_both_ends_of_a_pipeline() -> None:
    tied = replace(TINY, tied_embeddings=True)
    for pp in (1, 2):
        assert check_placement(setting_of(tied, 8, tp=2, pp=pp, engine_tp=2)).problems == ()


def tampered(layout: Layout, change) -> Layout:
    """The layout with the blocks of shard 0 changed by ``change(block)``; None drops one."""
    first = layout.shards[0]
    blocks = tuple(new for block in first.blocks if (new := change(block)) is not None)
    return replace(layout, shards=(replace(first, blocks=blocks), *layout.shards[1:]))


def _shifted(block):
    if block.tensor.endswith("layers.1.mlp.up_proj.weight"):
        (start, stop), *rest = block.source
        return replace(block, source=((start + 1, stop + 1), *rest))
    return block


CHANGES = {
    "a missing block": lambda block: None if block.tensor.endswith("layers.0.self_attn.k_proj.weight") else block,
    "a shifted block": _shifted,
    "q for k": lambda block: (
        replace(block, tensor=block.tensor.replace("k_proj", "v_proj"))
        if "layers.1.self_attn.k" in block.tensor
        else block
    ),
    "a foreign tensor": lambda block: (
        replace(block, tensor="model.other.weight") if block.tensor == "model.embed_tokens.weight" else block
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", ["policy_layout", "engine_layout"])
def test_a_layout_that_is_wrong_in_one_block_is_found(side: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(TINY, 8, tp=2, pp=1, engine_tp=2)
    made = {"policy_layout": policy_layout, "engine_layout": engine_layout}[side](setting)
    assert check_placement(setting).problems == ()
    monkeypatch.setattr(placement_check, side, lambda _: tampered(made, CHANGES[change]))
    problems = check_placement(setting).problems
    assert problems
    assert all(problem.startswith("trainer" if side == "policy_layout" else "engine") for problem in problems)


def test_a_dispatcher_that_forgets_or_repeats_a_request_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(TINY, 4, rollout={"prompts_per_step": 5, "prompt_repeat_k": 3})
    real = schedules._chunks

    def forgetful(prompts, engines):
        chunks = real(prompts, engines)
        chunks[0].popleft()
        return chunks

    monkeypatch.setattr(schedules, "_chunks", forgetful)
    assert any("never sent" in problem for problem in check_placement(setting).problems)


def test_an_unserved_world_draws_without_a_dispatcher() -> None:
    setting = setting_of(TINY, 4, rollout={"engine": "embedded"})
    assert check_placement(setting).problems == ()
    assert [len(engine) for engine in place(setting).engines] == [1] * 4


@pytest.mark.parametrize(("tp", "pp", "world"), [(8, 4, 128), (4, 1, 32), (2, 2, 8), (1, 4, 8), (2, 4, 24)])
def test_groups_are_megatrons(tp: int, pp: int, world: int) -> None:
    placement = place(setting_of(QWEN_32B, world, tp=tp, pp=pp))
    ranks = RankGenerator(tp=tp, ep=1, dp=world // (tp * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    assert [list(group) for group in placement.tp_groups] == ranks.get_ranks("tp")
    for token, key in (("dp", "dp_group"), ("pp", "pp_group"), ("tp", "tp_group")):
        expected = {tuple(group) for group in ranks.get_ranks(token)}
        assert {tuple(placement.describe_rank(rank)[key]) for rank in range(world)} == expected


def test_edges_between_stages_and_nodes_are_counted() -> None:
    inside = place(setting_of(QWEN_32B, 8, tp=2, pp=4))
    assert inside.pipeline_edges == (6, 0)
    between = place(setting_of(QWEN_32B, 128, tp=8, pp=4))
    assert between.pipeline_edges == (96, 96)
    half = place(setting_of(QWEN_32B, 16, tp=2, pp=4))  # stages of 4 ranks: 0 and 1 on the first node
    assert half.pipeline_edges == (12, 4)
    assert (half.stages_cross_nodes(0, 1), half.stages_cross_nodes(1, 2)) == (False, True)


@pytest.mark.parametrize(
    ("tp", "dp", "members", "crosses"), [(8, 16, 1, True), (4, 8, 2, True), (2, 4, 4, False), (1, 8, 8, False)]
)
def test_members_of_a_data_parallel_group_on_one_node(tp: int, dp: int, members: int, crosses: bool) -> None:
    placement = place(setting_of(QWEN_32B, tp * dp, tp=tp))
    assert (placement.dp_members_a_node, placement.dp_crosses_nodes) == (members, crosses)


def test_what_cannot_be_placed_is_refused_and_what_is_slow_is_said() -> None:
    with pytest.raises(UserError, match=r"tensor_model_parallel_size=8 x .* does not divide --world-size 12"):
        place(setting_of(QWEN_32B, 12, tp=8))
    with pytest.raises(UserError, match="--world-size 12 is not a multiple of --ranks-per-node 8"):
        place(setting_of(QWEN_32B, 12, tp=4))
    with pytest.raises(UserError, match=r"rollout\.engine_tp=8 does not divide the 4 ranks a node"):
        place(setting_of(QWEN_32B, 16, tp=8, engine_tp=8, ranks_per_node=4))
    across = place(setting_of(QWEN_32B, 16, tp=8, engine_tp=4, ranks_per_node=4))
    assert across.tp_crosses_nodes
    assert "cross nodes of 4" in across.warnings()[0]
    assert place(setting_of(QWEN_32B, 16, tp=8)).warnings() == []


def test_parameters_of_the_busiest_rank_are_those_of_its_layout() -> None:
    for tp, pp, vpp in ((4, 1, None), (8, 4, None), (2, 4, 2)):
        setting = setting_of(QWEN_32B, 128, tp=tp, pp=pp, vpp=vpp)
        shards = policy_layout(setting).shards
        placement = place(setting)
        found = placement.parameters_of_busiest_rank(QWEN_32B, setting.config.parallel, head=True)
        # norms and small biases are on every rank of a layout, and counted once here
        assert found == pytest.approx(max(shard.num_elements() for shard in shards), rel=1e-3)


# Traffic


def test_traffic_is_that_of_the_committed_plans() -> None:
    assumed, gpu = Assumptions(), DEVICES["h100"]
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / "reshard_plans.json").read_text())["rows"]
    models = {"Qwen2.5-7B": QWEN_7B, "Qwen2.5-32B": QWEN_32B}
    compared = 0
    for row in rows:
        if row["gpu_step"] != 1 or row["make_vocab_size_divisible_by"] != 1 or (row["gpus"] > 32 and row["dp"] > 4):
            continue
        sizes = {key: row[key] for key in ("tp", "pp", "engine_tp")}
        setting = setting_of(models[row["model"]], row["tp"] * row["pp"] * row["dp"], **sizes)
        traffic = reshard_traffic(setting, place(setting), gpu, assumed)
        assert traffic.received_max == row["received_max"]
        assert traffic.sent_max == row["sent_max"]
        assert traffic.cross_node == row["cross_node_total"]
        assert traffic.in_place_max == row["in_place_max"]
        assert traffic.nothing_moves == row["nothing_moves"]
        assert traffic.pairs == row["pairs"]
        assert max(traffic.busiest_local, traffic.busiest_network) <= max(row["received_max"], row["sent_max"])
        assert traffic.busiest_local + traffic.busiest_network >= row["received_max"]
        compared += 1
    assert compared == 5


@pytest.mark.parametrize(
    ("spec", "world", "tp", "pp", "engine_tp"),
    [
        (QWEN_7B, 32, 4, 1, 1),
        (QWEN_7B, 32, 4, 1, 4),
        (QWEN_7B, 32, 2, 2, 4),
        pytest.param(QWEN_32B, 64, 8, 2, 8, marks=pytest.mark.slow),
        pytest.param(QWEN_32B, 64, 4, 4, 8, marks=pytest.mark.slow),
        pytest.param(QWEN_32B, 64, 8, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_the_quick_estimate_of_traffic_is_near_the_plans(
    spec: ModelSpec, world: int, tp: int, pp: int, engine_tp: int
) -> None:
    """Searches rank settings by it: the seconds must be right to a few tenths of a step's hundred."""
    assumed, gpu = Assumptions(), DEVICES["h100"]
    setting = setting_of(spec, world, tp=tp, pp=pp, engine_tp=engine_tp)
    exact = reshard_traffic(setting, place(setting), gpu, assumed)
    quick = quick_traffic(setting, place(setting), gpu, assumed)
    assert abs(exact.seconds - quick.seconds) < 0.5
    assert exact.nothing_moves == quick.nothing_moves


def test_the_busiest_link_is_the_slower_of_both_kinds() -> None:
    assumed, gpu = Assumptions(), DEVICES["h100"]
    setting = setting_of(QWEN_7B, 16, tp=4, pp=2, engine_tp=2)
    traffic = reshard_traffic(setting, place(setting), gpu, assumed)
    local = traffic.busiest_local / (gpu.nvlink * assumed.nvlink_efficiency)
    network = traffic.busiest_network / (gpu.network * assumed.network_efficiency)
    assert traffic.seconds == max(local, network)
    assert traffic.busiest == ("network" if network > local else "inside a node")
