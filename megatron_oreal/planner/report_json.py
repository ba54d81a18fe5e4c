"""A plan as one JSON object: sizes in bytes, times in seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_oreal.planner.plan import Report
from megatron_oreal.planner.search import Found, SearchResult
from megatron_oreal.planner.types import RankMemory, Setting
from megatron_oreal.planner.variants import as_overrides


def recompute_text(setting: Setting) -> str:
    """``none``, ``selective (core_attn, mlp)``, ``full (uniform 1)``."""
    parallel = setting.config.parallel
    if parallel.recompute_granularity == "selective":
        return f"selective ({', '.join(parallel.recompute_modules or ['core_attn'])})"
    if parallel.recompute_granularity is None:
        return "none"
    return f"full ({parallel.recompute_method} {parallel.recompute_num_layers})"


def shown(path: Path) -> str:
    """A path as short as the working directory allows."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def as_json(report: Report) -> str:
    """One object; sizes in bytes, times in seconds."""
    setting, args, placement = report.setting, report.arguments, report.placement
    config, spec, device = setting.config, setting.spec, report.device
    tree: dict[str, Any] = {
        "config": args.config,
        "overrides": list(args.overrides),
        "warnings": report.warnings,
        "model": {
            "shape_from": shown(report.shape_dir / "config.json"),
            "family": spec.family,
            "layers": spec.num_layers,
            "hidden": spec.hidden_size,
            "parameters": spec.num_parameters(),
            "dtype": config.model.dtype,
        },
        "gpu": dict(device.__dict__),
        "world": {
            "ranks": setting.world_size,
            "ranks_per_node": setting.ranks_per_node,
            "nodes": placement.num_nodes,
            "tp": placement.grid.tp,
            "pp": placement.grid.pp,
            "vpp": config.parallel.virtual_pipeline_model_parallel_size,
            "dp": placement.grid.dp,
            "engines": len(placement.engines),
            "engine_tp": len(placement.engines[0]),
        },
        "fits": report.fits,
        "memory": {
            "limit": setting.device_memory_bytes,
            "reserve": setting.reserve_bytes,
            "worst_rank": report.worst.rank,
            "peak_phase": report.worst.peak.name,
            "peak": report.worst.peak.total,
            "cache_tokens": report.model.cache_tokens(setting, placement, report.worst),
            "ranks": [_rank_json(rank) for rank in report.memory],
        },
        "nearest": None if report.nearest is None else _found_json(report.nearest),
        "placement": _placement_json(report),
        "reshard": report.traffic.__dict__,
        "step": _step_json(report),
        "assumptions": report.assumed.rows(),
    }
    if report.rank_memory is not None:
        tree["rank"] = placement.describe_rank(args.rank) | {"memory": _rank_json(report.rank_memory)}
    if report.search is not None:
        tree["search"] = _search_json(report.search)
    return json.dumps(tree, indent=1)


def _step_json(report: Report) -> dict[str, Any]:
    cost, update, rollout = report.cost, report.cost.update, report.cost.rollout
    return {
        "seconds": cost.seconds,
        "tokens": cost.tokens,
        "tokens_per_s_per_gpu": cost.tokens_per_s_per_gpu,
        "phases": dict(cost.phases),
        "rollout": {
            "lengths": report.lengths,
            "mean_response": float(rollout.lengths.mean()),
            "longest_response": int(rollout.lengths.max()),
            "finished_s": {str(share): rollout.finished_by(share) for share in (0.5, 0.9, 0.99, 1.0)},
            "idle_share": rollout.idle_share,
            "most_running": rollout.most_running,
            "first_step_s": rollout.first_step_s,
            "last_step_s": rollout.last_step_s,
            "prefill_s": rollout.prefill_s,
            "retracted": rollout.retracted,
            "generated_tokens": rollout.generated_tokens,
        },
        "update": {key: value for key, value in update.__dict__.items() if key != "passes"}
        | {"passes": {name: each.__dict__ for name, each in update.passes.items()}},
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "tp_rank": rank.tp_rank,
        "pp_rank": rank.pp_rank,
        "dp_rank": rank.dp_rank,
        "peak_phase": rank.peak.name,
        "peak": rank.peak.total,
        "static": dict(rank.static),
        "phases": {phase.name: {"total": phase.total, "live": dict(phase.live)} for phase in rank.phases},
        "modelled": list(rank.modelled),
        "host": dict(rank.host),
    }


def _placement_json(report: Report) -> dict[str, Any]:
    placement, check = report.placement, report.check
    edges, crossing = placement.pipeline_edges
    return {
        "tp_crosses_nodes": placement.tp_crosses_nodes,
        "dp_members_a_node": placement.dp_members_a_node,
        "pipeline_edges": edges,
        "pipeline_edges_between_nodes": crossing,
        "engines": [list(engine) for engine in placement.engines],
        "checked": {**check.__dict__, "problems": list(check.problems)},
    }


def _found_json(found: Found) -> dict[str, Any]:
    return {
        "overrides": as_overrides(found.changes),
        "peak": found.memory.peak.total,
        "peak_phase": found.memory.peak.name,
        "step_s": found.cost.seconds,
        "tokens_per_s_per_gpu": found.cost.tokens_per_s_per_gpu,
        "phases": dict(found.cost.phases),
    }


def _search_json(result: SearchResult) -> dict[str, Any]:
    return {
        "considered": result.considered,
        "fitting": result.fitting,
        "best": [_found_json(found) | {"settings": _settings(found)} for found in result.best],
        "fell_out": dict(result.reasons.most_common()),
    }


def _settings(found: Found) -> dict[str, Any]:
    parallel, rollout = found.setting.config.parallel, found.setting.config.rollout
    return {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size,
        "dp": found.setting.dp,
        "engine_tp": rollout.engine_tp,
        "recompute": recompute_text(found.setting),
        "max_tokens_per_microbatch": parallel.max_tokens_per_microbatch,
        "mem_fraction_static": rollout.sglang.get("mem_fraction_static"),
        "offload": list(parallel.offload),
    }
