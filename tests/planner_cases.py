"""Models, configs and settings that the planner's tests share: shapes alone, no weights."""

from __future__ import annotations

from typing import Any

from megatron_oreal.config import Config
from megatron_oreal.config_load import parse_config
from megatron_oreal.layout import ModelSpec, RopeSpec
from megatron_oreal.planner.types import GIB, Setting

QWEN_7B = ModelSpec("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))
QWEN_32B = ModelSpec("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, 1e-6, False, True, False, RopeSpec(1e6))
TINY = ModelSpec("qwen2", 4, 64, 128, 8, 2, 8, 512, 4096, 1e-6, False, True, False, RopeSpec(1e4))


def config_of(engine_tp: int = 1, sglang: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A config with sections changed: ``parallel={...}``, ``rollout={...}``."""
    tree: dict[str, Any] = {
        "work_dir": "w",
        "model": {"path": "m", "stop_word": "s"},
        "data": {"train": "t"},
        "rollout": {"engine": "sglang", "engine_tp": engine_tp, "sglang": sglang or {}},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return parse_config(tree)


def setting_of(
    spec: ModelSpec,
    world: int,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    engine_tp: int = 1,
    ranks_per_node: int = 8,
    memory_gib: float = 80.0,
    parallel: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Setting:
    """A setting of these sizes; sequence parallelism goes with TP."""
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "sequence_parallel": tp > 1,
    }
    config = config_of(engine_tp, parallel=sizes | (parallel or {}), **sections)
    return Setting(config, spec, world, min(world, ranks_per_node), device_memory_bytes=int(memory_gib * GIB))
