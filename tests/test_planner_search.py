"""What is searched, found and recommended: every winner fits by the real modules, every refusal has its reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml
from planner_cases import QWEN_7B, QWEN_32B, TINY, config_of, setting_of

from megatron_oreal.config_check import check_config
from megatron_oreal.config_load import _apply_override, parse_config
from megatron_oreal.data.lengths import LengthDistribution
from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec
from megatron_oreal.planner import search as searching
from megatron_oreal.planner.assumptions import Assumptions
from megatron_oreal.planner.cost import CostModel, Workload
from megatron_oreal.planner.devices import DEVICES
from megatron_oreal.planner.memory import memory, quick_memory
from megatron_oreal.planner.placement import place
from megatron_oreal.planner.search import Found, fits, nearest_fitting, search
from megatron_oreal.planner.types import GIB, Setting
from megatron_oreal.planner.variants import (
    ENGINE_TP,
    MEM_FRACTION,
    OFFLOAD,
    TP,
    Sizes,
    as_overrides,
    differences,
    engine_obstacle,
    get,
    trainer_obstacle,
    vary,
)

ASSUMED = Assumptions()


def model_of(setting: Setting, device: str = "h100") -> CostModel:
    lengths = LengthDistribution.default(setting.config.rollout.gen_max_new)
    return CostModel(DEVICES[device], ASSUMED, Workload.draw(setting, lengths, ASSUMED))


# Variants


def test_variants_change_what_they_name_and_nothing_else() -> None:
    setting = setting_of(QWEN_7B, 8, sglang={"mem_fraction_static": 0.8, "chunked_prefill_size": 4096})
    changes = {TP: 4, OFFLOAD: ["optimizer"], MEM_FRACTION: 0.5}
    varied = vary(setting, changes)
    assert {key: get(varied.config, key) for key in changes} == changes
    assert varied.config.rollout.sglang["chunked_prefill_size"] == 4096
    assert get(setting.config, MEM_FRACTION) == 0.8
    assert differences(setting, changes | {"rollout.engine_tp": 1}) == changes
    before, after = (each.config.model_dump() for each in (setting, varied))
    assert {key for key in before if before[key] != after[key]} == {"rollout", "parallel"}


def test_overrides_read_back_as_the_variant() -> None:
    setting = setting_of(QWEN_7B, 8)
    changes = {
        TP: 2,
        OFFLOAD: ["optimizer", "reward_model"],
        MEM_FRACTION: 0.45,
        "parallel.sequence_parallel": True,
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
        "parallel.virtual_pipeline_model_parallel_size": None,
    }
    tree = yaml.safe_load(yaml.safe_dump(setting.config.model_dump(mode="json")))
    for text in as_overrides(changes):
        assert " " not in text  # a word of a shell
        _apply_override(tree, text)
    assert parse_config(tree) == vary(setting, changes).config


def test_obstacles_are_exactly_what_the_config_check_refuses() -> None:
    """Every combination of sizes of a model whose numbers divide badly; searches leave out TP across nodes besides."""
    spec = replace(TINY, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=16, ffn_hidden_size=96)
    base = setting_of(spec, 24, ranks_per_node=12, rollout={"gen_max_new": 1000, "gen_max_length": 2000})
    counts = {True: 0, False: 0}
    for tp, pp, vpp, engine_tp in itertools.product(
        (1, 2, 3, 4, 5, 8, 12), (1, 2, 3, 4, 8), (None, 2, 3), (1, 2, 3, 4, 8)
    ):
        sizes = Sizes(tp, pp, vpp, engine_tp)
        setting = vary(base, searching._sizes_changes(base, sizes))
        assert Sizes.of(setting) == sizes
        obstacle = trainer_obstacle(setting, sizes) or engine_obstacle(setting, engine_tp)
        try:
            check_config(setting.config, spec, 24, 12, planned=True)
            refused = False
        except UserError:
            refused = True
        assert (obstacle is not None) == refused, (sizes, obstacle)
        counts[refused] += 1
    assert min(counts.values()) > 30


# Search


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fewer sizes, so that a search takes a second."""

    def apply() -> None:
        monkeypatch.setattr(searching, "POWERS", (1, 4, 8, 16))
        monkeypatch.setattr(searching, "VIRTUAL", (None, 2))

    return apply


def test_every_winner_fits_and_every_setting_is_accounted_for(few: Callable[[], None]) -> None:
    few()
    setting = setting_of(QWEN_7B, 16, tp=8, engine_tp=4, memory_gib=79.1)
    model = model_of(setting)
    result = search(setting, model, top=2)
    assert result.fitting + sum(result.reasons.values()) == result.considered == 4 * 4 * 2 * 4 * 3 * 2 * 4
    assert len(result.best) == 2
    rates = [found.cost.tokens_per_s_per_gpu for found in result.best]
    assert rates == sorted(rates, reverse=True)
    assert len({Sizes.of(found.setting) for found in result.best}) == 2
    for found in result.best:
        assert found.confirmed
        check_config(found.setting.config, QWEN_7B, 16, 8, planned=True)
        assert vary(setting, found.changes) == found.setting
        assert get(found.setting.config, MEM_FRACTION) <= searching.LARGEST_SHARE
    best = result.best[0]
    assert all(fits(best.setting, rank) for rank in memory(best.setting))
    for reason in ("tensor parallelism across nodes", "engine across nodes", "attention heads not divisible by TP"):
        assert result.reasons[reason] > 0, result.reasons
    assert any(reason.startswith("does not fit") for reason in result.reasons)


@pytest.mark.slow
def test_the_winner_is_no_slower_than_any_setting_that_fits(few: Callable[[], None]) -> None:
    few()
    setting = setting_of(QWEN_7B, 8, tp=4, memory_gib=79.1)
    model = model_of(setting)
    best = search(setting, model, top=1).best[0]
    tried = 0
    for tp, engine_tp, share in itertools.product((1, 4), (1, 4), (0.4, 0.6, 0.8)):
        changes = {TP: tp, "parallel.sequence_parallel": tp > 1, "rollout.engine_tp": engine_tp, MEM_FRACTION: share}
        other = vary(setting, changes | {OFFLOAD: ["optimizer", "reward_model", "reference", "policy"]})
        found = quick_memory(other)
        if fits(other, found) and searching.cache_holds_a_response(model, other, found):
            traffic = searching.quick_traffic(other, place(other), model.device, ASSUMED)
            cost = model.step(other, place(other), found, traffic)
            assert cost.tokens_per_s_per_gpu <= best.cost.tokens_per_s_per_gpu * 1.001
            tried += 1
    assert tried >= 3


def test_an_engine_gets_the_largest_share_that_fits_and_is_of_use() -> None:
    setting = setting_of(QWEN_7B, 8, tp=4, memory_gib=79.1, parallel={"recompute_granularity": "selective"})
    model = model_of(setting)
    varied, changes, found = searching._largest_share(setting, model, {})
    share = changes[MEM_FRACTION]
    assert fits(varied, found)
    more = vary(setting, {MEM_FRACTION: share + 0.03})
    useful = model.useful_cache_bytes(varied, place(varied))
    assert not fits(more, quick_memory(more)) or found.phase("generate").live["KV cache"] + 0.03 * 80 * GIB > useful


def test_sizes_whose_fastest_setting_is_refused_are_ranked_by_their_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "POWERS", (1, 4))
    monkeypatch.setattr(searching, "VIRTUAL", (None,))
    setting = setting_of(QWEN_7B, 8, tp=4, memory_gib=79.1)
    model, refused = model_of(setting), set()

    def all_but_the_first(found: Found) -> Found | None:
        sizes = Sizes.of(found.setting)
        if sizes in refused:
            return found
        refused.add(sizes)
        return None

    monkeypatch.setattr(searching, "confirm", lambda found: found)
    ranked = search(setting, model, top=1000).best
    monkeypatch.setattr(searching, "confirm", all_but_the_first)
    result = search(setting, model, top=1000)
    assert len({Sizes.of(found.setting) for found in ranked}) == len(ranked) > 1
    assert {Sizes.of(found.setting) for found in result.best} == {Sizes.of(found.setting) for found in ranked}
    assert not any(one.changes == two.changes for one in ranked for two in result.best)
    assert result.reasons["does not fit by the real modules, though by the closed forms"] == len(ranked)
    assert result.fitting + sum(result.reasons.values()) == result.considered


def test_nothing_that_fits_is_an_empty_result_with_reasons(few: Callable[[], None]) -> None:
    few()
    setting = setting_of(QWEN_7B, 4, tp=4, memory_gib=12)
    result = search(setting, model_of(setting), top=5)
    assert result.best == []
    assert result.fitting == 0
    assert sum(result.reasons.values()) == result.considered


# The nearest setting that fits


def test_the_nearest_setting_fits_with_fewest_changes() -> None:
    setting = setting_of(QWEN_7B, 8, tp=4, engine_tp=4, memory_gib=79.1, sglang={"mem_fraction_static": 0.8})
    assert not fits(setting, quick_memory(setting))
    found = nearest_fitting(setting, model_of(setting))
    assert found is not None
    assert found.confirmed
    assert vary(setting, found.changes) == found.setting
    assert all(fits(found.setting, rank) for rank in memory(found.setting))
    assert set(found.changes) <= {MEM_FRACTION, OFFLOAD, TP, "parallel.sequence_parallel"}


def test_no_single_change_is_enough_where_two_are_recommended() -> None:
    setting = setting_of(QWEN_7B, 8, tp=1, engine_tp=1, memory_gib=79.1, sglang={"mem_fraction_static": 0.85})
    model = model_of(setting)
    found = nearest_fitting(setting, model)
    assert found is not None
    changed = sum(
        any(found.changes.get(k) == v for k, v in value.items()) for axis in searching._axes(setting) for value in axis
    )
    assert changed >= 2
    for axis in searching._axes(setting):
        for change in axis:
            assert searching._try_change(setting, model, change) is None, change


@pytest.mark.parametrize(
    ("spec", "tp", "share", "changed"), [(QWEN_7B, 4, 0.18, MEM_FRACTION), (QWEN_32B, 8, 0.6, ENGINE_TP)]
)
def test_an_engine_without_room_for_a_response_gets_more_memory_or_more_ranks(
    spec: ModelSpec, tp: int, share: float, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has 14.2 GiB of 7B's weights; of 32B's more than leaves room for a cache at any share."""
    parts = ["optimizer", "reward_model", "reference", "policy"]
    setting = setting_of(
        spec,
        64,
        tp=tp,
        engine_tp=1,
        memory_gib=79.1,
        sglang={"mem_fraction_static": share},
        parallel={"offload": parts},
    )
    monkeypatch.setattr(searching, "confirm", lambda found: found)  # the closed forms know this as well
    model = model_of(setting)
    assert not searching.cache_holds_a_response(model, setting, quick_memory(setting))
    found = nearest_fitting(setting, model)
    assert found is not None
    assert len(found.changes) == 1
    assert searching._try_change(setting, model, {changed: 0.4 if changed == MEM_FRACTION else 8}) is not None
    shares = [searching._try_change(setting, model, {MEM_FRACTION: each}) for each in searching.SHARES]
    assert any(shares) == (changed == MEM_FRACTION)


def test_the_selective_recomputation_that_is_tried_frees_most_of_a_layer() -> None:
    setting = setting_of(QWEN_7B, 32, tp=4)
    live = {
        name: quick_memory(vary(setting, change)).phase("policy").live["activations"]
        for name, change in searching.RECOMPUTE.items()
    }
    assert live["full"] < live["selective"] < live["none"] / 2


OPTIONS = {
    "modules": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "host": {"cpu_offloading_num_layers": 2},
    "overlap": {"tp_comm_overlap": True},
    "uneven": {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_tried_is_a_config_that_the_check_takes(name: str) -> None:
    """Also where the config has options that exclude recomputation, pipeline stages or virtual ones."""
    pp = 2 if name == "uneven" else 1
    lengths = {"gen_max_new": 1000, "gen_max_length": 2000}
    setting = setting_of(TINY, 16, tp=2, pp=pp, rollout=lengths, parallel=OPTIONS[name])
    check_config(setting.config, setting.spec, 16, 8, planned=True)
    apart = {OFFLOAD, ENGINE_TP, MEM_FRACTION}
    changes = [change for axis in searching._axes(setting) for change in axis if not apart & change.keys()]
    changes += [a | b for a, b in itertools.combinations(changes, 2)]
    choices = [choice for choice in searching._choices(setting) if not choice[OFFLOAD]]
    sizes = [each for each in searching._all_sizes(setting) if each.engine_tp == 1]
    changes += [searching._sizes_changes(setting, each) | choice for each in sizes for choice in choices]
    tried = 0
    for change in changes:
        varied = vary(setting, change)
        if trainer_obstacle(varied, Sizes.of(varied)) is None:
            check_config(varied.config, varied.spec, 16, 8, planned=True)
            tried += 1
    assert tried > 50


def test_a_device_that_is_too_small_has_no_nearest_setting() -> None:
    setting = setting_of(QWEN_7B, 1, memory_gib=10)
    assert nearest_fitting(setting, model_of(setting)) is None


def test_a_config_of_the_embedded_engine_is_searched_without_engine_sizes(few: Callable[[], None]) -> None:
    few()
    config = config_of(rollout={"engine": "embedded", "sglang": {}})
    setting = replace(setting_of(TINY, 4), config=config)
    result = search(setting, model_of(setting), top=2)
    assert result.best
    assert all("rollout.engine_tp" not in found.changes and MEM_FRACTION not in found.changes for found in result.best)
