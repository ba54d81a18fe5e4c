"""``megatron-oreal plan``: everything that can be known of a run before a GPU is touched."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_oreal.errors import UserError

if TYPE_CHECKING:
    from megatron_oreal.planner.assumptions import Assumptions
    from megatron_oreal.planner.cost import CostModel, StepCost
    from megatron_oreal.planner.devices import Device
    from megatron_oreal.planner.placement import Placement
    from megatron_oreal.planner.placement_check import PlacementCheck
    from megatron_oreal.planner.search import Found, SearchResult
    from megatron_oreal.planner.traffic import ReshardTraffic
    from megatron_oreal.planner.types import RankMemory, Setting

MOST_RANKS = 65536


@dataclass
class Report:
    """All that a plan found."""

    arguments: argparse.Namespace
    shape_dir: Path
    setting: Setting
    device: Device
    assumed: Assumptions
    lengths: str
    placement: Placement
    check: PlacementCheck
    memory: list[RankMemory]
    rank_memory: RankMemory | None
    traffic: ReshardTraffic
    cost: StepCost
    model: CostModel
    nearest: Found | None
    search: SearchResult | None
    warnings: list[str]

    @property
    def worst(self) -> RankMemory:
        """The rank whose peak is highest."""
        return max(self.memory, key=lambda rank: rank.peak.total)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within its device, and the cache holds a response."""
        return self.worst.peak.total <= self.setting.device_memory_bytes and self.cache_is_large_enough

    @property
    def cache_is_large_enough(self) -> bool:
        """Whether the KV cache has room for one response of full length."""
        longest = self.setting.config.rollout.gen_max_length
        return self.model.cache_tokens(self.setting, self.placement, self.worst) >= longest


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 0, or 1 when the run does not fit. Raises ``UserError`` for a mistake (status 2)."""
    _check_numbers(arguments)
    report = make_report(arguments)
    from megatron_oreal.planner.report import as_text
    from megatron_oreal.planner.report_json import as_json

    print(as_json(report) if arguments.json else as_text(report))
    return 0 if report.fits else 1


def _check_numbers(arguments: argparse.Namespace) -> None:
    world = arguments.world_size
    for option, value, most in (
        ("--world-size", world, MOST_RANKS),
        ("--ranks-per-node", arguments.ranks_per_node, MOST_RANKS),
        ("--top", arguments.top, 1000),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{option} {value}: must be between 1 and {most}")
    if arguments.rank is not None and not 0 <= arguments.rank < world:
        raise UserError(f"--rank {arguments.rank} is not one of the ranks 0 to {world - 1}")
    for option, value in (("--gpu-memory-gib", arguments.gpu_memory_gib), ("--network-gbps", arguments.network_gbps)):
        if value is not None and not 1e-3 <= value <= 1e6:  # NaN is neither
            raise UserError(f"{option} {value:g}: must be between 0.001 and 1000000")


def _check_server_numbers(sglang: Mapping[str, Any]) -> None:
    """SGLang's arguments that the plan computes with; SGLang itself would refuse them only when a server starts."""
    share = sglang.get("mem_fraction_static")
    if share is not None and not (isinstance(share, int | float) and 0 < share < 1):
        raise UserError(f"rollout.sglang.mem_fraction_static={share!r}: must be a number between 0 and 1")
    for name in ("max_total_tokens", "chunked_prefill_size", "max_prefill_tokens", "cuda_graph_max_bs"):
        value = sglang.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"rollout.sglang.{name}={value!r}: must be a whole number")


def make_report(arguments: argparse.Namespace) -> Report:
    """Find everything out, mistakes first."""
    # Imported here: torch and Megatron take seconds, and a mistake in the config should not.
    from megatron_oreal.config_load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from megatron_oreal.config_check import check_config
    from megatron_oreal.data.lengths import parse_lengths
    from megatron_oreal.planner.assumptions import Assumptions, parse_assumptions
    from megatron_oreal.planner.calibration import calibrate
    from megatron_oreal.planner.cost import CostModel, Workload
    from megatron_oreal.planner.devices import find_device
    from megatron_oreal.planner.placement import place
    from megatron_oreal.planner.shape import read_shape
    from megatron_oreal.planner.traffic import reshard_traffic
    from megatron_oreal.planner.types import GIB, Setting

    device = find_device(arguments.gpu).with_overrides(arguments.gpu_memory_gib, arguments.network_gbps)
    _check_server_numbers(config.rollout.sglang)
    spec, shape_dir = read_shape(config.model.path, arguments.config, arguments.model_shape)
    per_node = min(arguments.ranks_per_node, arguments.world_size)
    check_config(config, spec, arguments.world_size, per_node, planned=True)
    setting = Setting(
        config,
        spec,
        arguments.world_size,
        per_node,
        implementation=_implementation(config.parallel.transformer_impl, config.model.dtype),
        device_memory_bytes=device.memory_bytes,
    )
    placement = place(setting)
    measured, notes = calibrate(Assumptions(), device, spec, arguments.results)
    assumed = parse_assumptions(measured, arguments.assume)
    setting = replace(setting, reserve_bytes=round(assumed.reserve * GIB))
    rollout = config.rollout
    lengths = parse_lengths(arguments.lengths, min(rollout.gen_max_new, rollout.gen_max_length - 1))
    model = CostModel(device, assumed, Workload.draw(setting, lengths, assumed))
    from megatron_oreal.planner.memory import memory, rank_memory
    from megatron_oreal.planner.placement_check import check_placement

    ranks = memory(setting)
    traffic = reshard_traffic(setting, placement, device, assumed)
    worst = max(ranks, key=lambda rank: rank.peak.total)
    report = Report(
        arguments=arguments,
        shape_dir=shape_dir,
        setting=setting,
        device=device,
        assumed=assumed,
        lengths=str(lengths),
        placement=placement,
        check=check_placement(setting),
        memory=ranks,
        rank_memory=None if arguments.rank is None else rank_memory(setting, arguments.rank),
        traffic=traffic,
        cost=model.step(setting, placement, worst, traffic),
        model=model,
        nearest=None,
        search=None,
        warnings=[*placement.warnings(), *notes, *_warnings(setting)],
    )
    _look_further(report)
    return report


def _look_further(report: Report) -> None:
    from megatron_oreal.planner.search import nearest_fitting, search

    if not report.fits:
        report.nearest = nearest_fitting(report.setting, report.model)
    if report.arguments.search:
        report.search = search(report.setting, report.model, report.arguments.top)


def _implementation(requested: str, dtype: str) -> Literal["transformer_engine", "local"]:
    """What ``actor.specs.choose_implementation`` chooses on a GPU machine with TransformerEngine."""
    return "local" if requested == "local" or dtype == "fp32" else "transformer_engine"


def _warnings(setting: Setting) -> list[str]:
    config, found = setting.config, []
    if config.model.dtype == "fp32":
        found.append("model.dtype=fp32: the cost model knows bf16 rates only; its times are too short")
    if config.device == "cpu":
        found.append("device=cpu in the config: the plan is for GPUs all the same")
    if config.rollout.engine == "embedded":
        found.append(
            "rollout.engine=embedded: the cost model takes it for an engine with CUDA graphs, without them it is slower"
        )
    return found
