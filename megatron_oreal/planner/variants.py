"""Settings that differ from one another in a few keys, and how a user writes them down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.layout import sglang_layout
from megatron_oreal.planner.types import Setting

Changes = Mapping[str, Any]
"""Dotted key to value, for example ``{"parallel.pipeline_model_parallel_size": 4}``."""

ON_HOST = "parallel.cpu_offloading_num_layers"
RECOMPUTE: dict[str, Changes] = {
    "none": {
        "parallel.recompute_granularity": None,
        "parallel.recompute_method": None,
        "parallel.recompute_num_layers": None,
        "parallel.recompute_modules": None,
    },
    "selective": {
        "parallel.recompute_granularity": "selective",
        "parallel.recompute_method": None,
        "parallel.recompute_num_layers": None,
        "parallel.recompute_modules": ["mlp"],
        ON_HOST: 0,
    },
    "full": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
        "parallel.recompute_modules": None,
        ON_HOST: 0,
    },
}
"""Selective: the MLP, for fused attention keeps no scores that recomputing it would free. What Megatron excludes goes
with each: activations that wait on the host."""
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
SP = "parallel.sequence_parallel"
BUDGET = "parallel.max_tokens_per_microbatch"
OFFLOAD = "parallel.offload"
ENGINE_TP = "rollout.engine_tp"
MEM_FRACTION = "rollout.sglang.mem_fraction_static"


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; None for an absent argument of SGLang's."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
    return value


def vary(setting: Setting, changes: Changes) -> Setting:
    """The setting with other values. They are not validated: they must be of the right types."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        mine = sections.setdefault(section, {})
        if name.startswith("sglang."):
            mine["sglang"] = dict(setting.config.rollout.sglang) | {name.partition(".")[2]: value}
        else:
            mine[name] = value
    config = setting.config.model_copy(
        update={
            section: getattr(setting.config, section).model_copy(update=values) for section, values in sections.items()
        }
    )
    return replace(setting, config=config)


def differences(setting: Setting, changes: Changes) -> dict[str, Any]:
    """Those of ``changes`` that are not in the setting already."""
    return {key: value for key, value in changes.items() if get(setting.config, key) != value}


def as_overrides(changes: Changes) -> list[str]:
    """``key=value`` as the command line takes it."""
    texts = []
    for key, value in changes.items():
        text = "null" if value is None else json.dumps(value) if isinstance(value, bool | list) else f"{value}"
        texts.append(f"{key}={text.replace(' ', '')}")
    return texts


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide whether a setting can exist at all."""

    tp: int
    pp: int
    vpp: int | None
    engine_tp: int

    @classmethod
    def of(cls, setting: Setting) -> Sizes:
        """Of a setting's config."""
        parallel, rollout = setting.config.parallel, setting.config.rollout
        return cls(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            rollout.engine_tp if rollout.engine == "sglang" else 1,
        )


def trainer_obstacle(setting: Setting, sizes: Sizes) -> str | None:
    """Why the trainer cannot have these sizes, in words that count over many settings; None when it can."""
    spec, world, tp, pp, vpp = setting.spec, setting.world_size, sizes.tp, sizes.pp, sizes.vpp
    parallel, chunks = setting.config.parallel, pp * (vpp or 1)
    ends = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
    checks = (
        (world % (tp * pp) != 0, "TP x PP does not divide the world"),
        (tp > setting.ranks_per_node or setting.ranks_per_node % tp != 0, "tensor parallelism across nodes"),
        (spec.num_heads % tp != 0, "attention heads not divisible by TP"),
        (
            bool(spec.num_kv_heads % tp and tp % spec.num_kv_heads) or bool((spec.q_size + 2 * spec.kv_size) % tp),
            "key-value heads do not go with TP",
        ),
        (spec.ffn_hidden_size % tp != 0, "intermediate size not divisible by TP"),
        (vpp is not None and pp == 1, "virtual stages without pipeline parallelism"),
        (ends == (None, None) and spec.num_layers % chunks != 0, "layers not divisible by the pipeline's stages"),
        (
            parallel.tp_comm_overlap and (tp == 1 or vpp is not None),
            "tp_comm_overlap without sequence parallelism, or with virtual stages",
        ),
    )
    return next((reason for fails, reason in checks if fails), None)


def engine_obstacle(setting: Setting, engine_tp: int) -> str | None:
    """Why an engine cannot have this size; None when it can."""
    spec = setting.spec
    checks = (
        (engine_tp > setting.ranks_per_node or setting.ranks_per_node % engine_tp != 0, "engine across nodes"),
        (spec.num_heads % engine_tp != 0, "attention heads not divisible by engine TP"),
    )
    reason = next((reason for fails, reason in checks if fails), None)
    if reason is None:
        try:
            sglang_layout(replace(spec, num_layers=1), tp=engine_tp)
        except UserError:
            reason = "engine TP refused by SGLang's sizes"
    return reason
