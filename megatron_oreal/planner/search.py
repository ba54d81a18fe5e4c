"""Which parallel sizes are fastest of those that fit, and what to change when a config does not fit."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_oreal.errors import UserError
from megatron_oreal.planner.cost import CostModel, StepCost
from megatron_oreal.planner.memory import memory, quick_memory
from megatron_oreal.planner.placement import place
from megatron_oreal.planner.traffic import quick_traffic
from megatron_oreal.planner.types import RankMemory, Setting
from megatron_oreal.planner.variants import (
    BUDGET,
    ENGINE_TP,
    MEM_FRACTION,
    OFFLOAD,
    ON_HOST,
    PP,
    RECOMPUTE,
    SP,
    TP,
    VPP,
    Sizes,
    differences,
    engine_obstacle,
    get,
    trainer_obstacle,
    vary,
)

POWERS = (1, 2, 4, 8, 16)
VIRTUAL = (None, 2, 4)
LARGEST_SHARE = 0.85
"""Of a device's memory for an engine (SGLang's ``mem_fraction_static``); searches take what fits, at most this."""
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""What is tried for a config that does not fit."""
_CACHE = "KV cache"
_MOST_CHANGES = 3
_MOST_TRIES = 3
"""Settings of the same sizes that a search builds before it gives the sizes up."""


@dataclass(frozen=True)
class Found:
    """A setting that fits, what it changes (by config key), and its predicted step."""

    setting: Setting
    changes: dict[str, Any]
    cost: StepCost
    memory: RankMemory
    confirmed: bool = False


@dataclass
class SearchResult:
    """``best``: fastest first, one for each TP, PP, VPP and engine TP. ``considered`` settings, and why the others
    fell out; of sizes whose fastest setting the real modules refuse the next is taken.
    """

    best: list[Found] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    considered: int = 0
    fitting: int = 0


def fits(setting: Setting, found: RankMemory) -> bool:
    """Whether a rank's peak is within the device's memory."""
    return found.peak.total <= setting.device_memory_bytes


def cache_holds_a_response(model: CostModel, setting: Setting, found: RankMemory) -> bool:
    """Whether the engine's KV cache has room for one response of full length; SGLang refuses a request otherwise."""
    rollout = setting.config.rollout
    placement = place(setting)
    return model.cache_tokens(setting, placement, found) >= rollout.gen_max_length


def search(setting: Setting, model: CostModel, top: int) -> SearchResult:
    """Rank every combination of sizes, recompute, token budget and offload; confirm the ``top`` with real modules."""
    result = SearchResult()
    fitting: list[Found] = []
    for sizes in _all_sizes(setting):
        choices = list(_choices(setting))
        result.considered += len(choices)
        sized = vary(setting, _sizes_changes(setting, sizes))
        obstacle = trainer_obstacle(sized, sizes) or engine_obstacle(sized, sizes.engine_tp)
        if obstacle is not None:
            result.reasons[obstacle] += len(choices)
            continue
        for choice in choices:
            found = _try(setting, model, _sizes_changes(setting, sizes) | choice)
            if isinstance(found, str):
                result.reasons[found] += 1
                continue
            fitting.append(found)
    result.fitting = len(fitting)
    tries: Counter[Sizes] = Counter()
    done: set[Sizes] = set()
    for each in sorted(fitting, key=lambda each: -each.cost.tokens_per_s_per_gpu):
        sizes = Sizes.of(each.setting)
        if len(result.best) == top:
            break
        if sizes in done or tries[sizes] == _MOST_TRIES:
            continue
        tries[sizes] += 1
        if confirmed := confirm(each):
            done.add(sizes)
            result.best.append(confirmed)
        else:
            result.reasons["does not fit by the real modules, though by the closed forms"] += 1
            result.fitting -= 1
    return result


def _all_sizes(setting: Setting) -> Iterator[Sizes]:
    served = setting.config.rollout.engine == "sglang"
    for tp, pp, vpp, engine_tp in itertools.product(POWERS, POWERS, VIRTUAL, POWERS if served else (1,)):
        yield Sizes(tp, pp, vpp, engine_tp)


def _choices(setting: Setting) -> Iterator[dict[str, Any]]:
    """Recompute, token budget and offload."""
    longest = setting.config.rollout.gen_max_length
    for (_, recompute), budget, offload in itertools.product(
        RECOMPUTE.items(), (longest, 2 * longest), _offloads(setting)
    ):
        yield {**recompute, BUDGET: budget, OFFLOAD: offload}


def _offloads(setting: Setting) -> list[list[str]]:
    """Sets of offloaded parts, from none to all."""
    order = ["optimizer", "reward_model", "reference", "policy"]
    if not setting.config.model.reward_model:
        order.remove("reward_model")
    return [[], order[:2], order[:3], order] if len(order) == 4 else [[], order[:1], order[:2], order]


def _sizes_changes(setting: Setting, sizes: Sizes) -> dict[str, Any]:
    changes: dict[str, Any] = {
        TP: sizes.tp,
        PP: sizes.pp,
        VPP: sizes.vpp,
        SP: sizes.tp > 1,
        "parallel.num_layers_in_first_pipeline_stage": None,
        "parallel.num_layers_in_last_pipeline_stage": None,
    }
    if sizes.pp > 1:
        changes[ON_HOST] = 0
    if setting.config.rollout.engine == "sglang":
        changes[ENGINE_TP] = sizes.engine_tp
    return changes


def _try(setting: Setting, model: CostModel, changes: dict[str, Any]) -> Found | str:
    """A setting with the largest engine share that fits, and its cost; or why there is none."""
    best = _largest_share(setting, model, changes)
    if isinstance(best, str):
        return best
    varied, changes, found = best
    placement = place(varied)
    cost = model.step(varied, placement, found, quick_traffic(varied, placement, model.device, model.assumed))
    return Found(varied, differences(setting, changes), cost, found)


def _largest_share(
    setting: Setting, model: CostModel, changes: dict[str, Any]
) -> tuple[Setting, dict[str, Any], RankMemory] | str:
    """The largest engine share that fits and is of use; only the KV cache grows with it, byte for byte."""
    if setting.config.rollout.engine != "sglang":
        varied = vary(setting, changes)
        found = quick_memory(varied)
        if not fits(varied, found):
            return f"does not fit: peak in {found.peak.name}"
        return varied, changes, found
    limit = setting.device_memory_bytes
    most = changes | {MEM_FRACTION: LARGEST_SHARE}
    varied = vary(setting, most)
    found = quick_memory(varied)
    surplus = 0
    for phase in found.phases:
        excess = phase.total - limit
        if excess > 0 and phase.live.get(_CACHE, 0) < excess:
            return f"does not fit: peak in {phase.name}"
        surplus = max(surplus, excess)
    placement = place(varied)
    cache = max(phase.live.get(_CACHE, 0) for phase in found.phases)
    surplus = max(surplus, cache - model.useful_cache_bytes(varied, placement))
    if surplus > 0:
        share = math.floor((LARGEST_SHARE - surplus / limit) * 100) / 100
        most = changes | {MEM_FRACTION: share}
        varied = vary(setting, most)
        found = quick_memory(varied) if share > 0 else found
    if not fits(varied, found) or not cache_holds_a_response(model, varied, found):
        return "KV cache smaller than one response"
    return varied, most, found


def confirm(found: Found) -> Found | None:
    """The same with the memory of the real modules; None when that does not fit, or cannot be built."""
    try:
        ranks = memory(found.setting)
    except UserError:
        return None
    worst = max(ranks, key=lambda rank: rank.peak.total)
    if not fits(found.setting, worst):
        return None
    return Found(found.setting, found.changes, found.cost, worst, confirmed=True)


def nearest_fitting(setting: Setting, model: CostModel, limit: int = 12) -> Found | None:
    """The setting that fits with fewest changes; among those of as few the one predicted to be fastest.

    Changed are recompute, token budget, offload, TP (with sequence parallelism), PP, and the engines' TP and share.
    """
    axes = _axes(setting)
    for count in range(1, _MOST_CHANGES + 1):
        found: list[Found] = []
        for chosen in itertools.combinations(axes, count):
            for values in itertools.product(*chosen):
                changes = {key: value for change in values for key, value in change.items()}
                each = _try_change(setting, model, changes)
                if each is not None:
                    found.append(each)
        found.sort(key=lambda each: -each.cost.tokens_per_s_per_gpu)
        for each in found[:limit]:
            if confirmed := confirm(each):
                return confirmed
    return None


def _try_change(setting: Setting, model: CostModel, changes: dict[str, Any]) -> Found | None:
    varied = vary(setting, changes)
    sizes = Sizes.of(varied)
    if trainer_obstacle(varied, sizes) or engine_obstacle(varied, sizes.engine_tp):
        return None
    found = quick_memory(varied)
    if not fits(varied, found):
        return None
    served = varied.config.rollout.engine == "sglang"
    if served and not cache_holds_a_response(model, varied, found):
        return None
    placement = place(varied)
    cost = model.step(varied, placement, found, quick_traffic(varied, placement, model.device, model.assumed))
    return Found(varied, differences(setting, changes), cost, found)


def _axes(setting: Setting) -> Sequence[Sequence[dict[str, Any]]]:
    """What may be changed, each with its values; none leaves everything as it is."""
    config, parallel = setting.config, setting.config.parallel
    longest = config.rollout.gen_max_length
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    now = set(parallel.offload)
    budgets = [{BUDGET: longest}] if parallel.max_tokens_per_microbatch > longest else []
    offloads = [{OFFLOAD: sorted(now | set(each))} for each in _offloads(setting) if set(each) - now]
    stages = {"parallel.num_layers_in_first_pipeline_stage": None, "parallel.num_layers_in_last_pipeline_stage": None}
    axes: list[list[dict[str, Any]]] = [
        [
            dict(RECOMPUTE[name])
            for name in ("selective", "full")
            if parallel.recompute_granularity != "full" and differences(setting, RECOMPUTE[name])
        ],
        budgets,
        offloads,
        [{TP: tp * factor, SP: True} for factor in (2, 4, 8)],
        [{PP: pp * factor, ON_HOST: 0, **stages} for factor in (2, 4)],
    ]
    if config.rollout.engine == "sglang":
        share = get(config, MEM_FRACTION)
        axes.append([{ENGINE_TP: config.rollout.engine_tp * factor} for factor in (2, 4, 8)])
        axes.append([{MEM_FRACTION: each} for each in SHARES if each != share])
    return [axis for axis in axes if axis]
