"""Which parts are on the device in which phase of a run (``run.py``, ``actor/actor.py``), and the bytes that makes."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_oreal.planner.engine import EngineBytes
from megatron_oreal.planner.types import Phase, Setting

_PARTS = {
    "policy": ("policy parameters",),
    "optimizer": ("policy gradients", "policy optimizer"),
    "reference": ("reference parameters",),
    "reward_model": ("reward model parameters", "reward model gradients", "reward model optimizer"),
}
"""``parallel.offload``'s names, and the items of each part."""
_WHILE = {
    "reference": ("reference",),
    "reward_model": ("reward_model",),
    "policy": ("policy", "optimizer"),
    "publish": ("policy",),
    "checkpoint": ("policy", "optimizer", "reward_model"),
    "start": tuple(_PARTS),
    "generate": (),
}
"""Offloaded parts that a phase brings in."""


def compose(
    setting: Setting, static: Mapping[str, int], dynamic: Mapping[str, Mapping[str, int]], engine: EngineBytes
) -> tuple[Phase, ...]:
    """``static``: bytes of all parts by item. ``dynamic``: what else each phase of the update has at its peak."""
    served = setting.config.rollout.engine == "sglang"
    awake = {"engine weights": engine.weights, "KV cache": engine.kv_cache, "engine workspace": engine.workspace}
    asleep = ({} if engine.sleeps else awake) if served else {"engine weights": engine.weights}
    staged = {
        "engine weights": engine.weights,
        "staging": engine.staging,
        "reshard buckets": engine.buckets,
        "digest": engine.digest,
    }
    phases = [_phase(setting, "start", static, asleep), _phase(setting, "generate", static, awake)]
    for name, items in dynamic.items():
        phases.append(_phase(setting, name, static, asleep | dict(items)))
    phases.append(_phase(setting, "publish", static, asleep | staged))
    if setting.config.checkpoint.every:
        # Nothing is offloaded: the engines need not leave.
        stays = awake if not setting.config.parallel.offload else asleep
        phases.append(_phase(setting, "checkpoint", static, stays))
    return tuple(phases)


def host_bytes(setting: Setting, static: Mapping[str, int], engine: EngineBytes) -> dict[str, int]:
    """Host memory of a rank: parts that wait there (gradients are made anew), and a server's shard that is kept."""
    away = [item for part in setting.config.parallel.offload for item in _PARTS[part] if "gradients" not in item]
    host = {item: static[item] for item in away if static.get(item)}
    if setting.config.rollout.engine == "sglang" and setting.config.rollout.server.keep_weights:
        host["engine weights"] = engine.weights
    return host


def _phase(setting: Setting, name: str, static: Mapping[str, int], more: Mapping[str, int]) -> Phase:
    offloaded, here = set(setting.config.parallel.offload), set(_WHILE[name.split("/")[0]])
    away = {item for part in offloaded - here for item in _PARTS[part]}
    live = {item: size for item, size in static.items() if item not in away}
    for item, size in more.items():
        live[item] = live.get(item, 0) + size
    if setting.device == "cuda":
        live["reserve"] = setting.reserve_bytes
    return Phase(name, {item: int(size) for item, size in live.items() if size})
