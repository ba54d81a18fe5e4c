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
    "generate": (),
}
"""Offloaded parts that a phase brings in."""
_BUILT = {"policy": ("policy", "optimizer"), "reference": ("reference",), "reward model": ("reward_model",)}
"""Models in the order in which ``Actor`` builds them, and the parts of each, which leave before the next is built."""


def compose(
    setting: Setting,
    static: Mapping[str, int],
    dynamic: Mapping[str, Mapping[str, int]],
    engine: EngineBytes,
    between: int = 0,
) -> tuple[Phase, ...]:
    """``static``: bytes of all parts by item. ``dynamic``: what else each phase of the update has at its peak.

    ``between``: activations that stay alive between updates.
    """
    served = setting.config.rollout.engine == "sglang"
    awake = {"engine weights": engine.weights, "KV cache": engine.kv_cache, "engine workspace": engine.workspace}
    asleep = ({} if engine.sleeps else awake) if served else {"engine weights": engine.weights}
    staged = {
        "engine weights": engine.weights,
        "staging": engine.staging,
        "reshard buckets": engine.buckets,
        "digest": engine.digest,
    }
    stays = {"activations": between}
    phases = [_start(setting, static, asleep), _phase(setting, "generate", static, awake | stays)]
    for name, items in dynamic.items():
        phases.append(_phase(setting, name, static, asleep | dict(items)))
    phases.append(_phase(setting, "publish", static, asleep | staged | stays))
    if setting.config.checkpoint.every:
        # Servers leave only for what has to come back. An embedded engine has no cache while it does not draw.
        away = {item for part in set(setting.config.parallel.offload) - {"reference"} for item in _PARTS[part]}
        engines = awake if served and not away & static.keys() else asleep
        phases.append(_phase(setting, "checkpoint", static, engines | stays))
    return tuple(phases)


def host_bytes(setting: Setting, static: Mapping[str, int], engine: EngineBytes) -> dict[str, int]:
    """Host memory of a rank: parts that wait there (gradients are made anew), and a server's shard that is kept."""
    away = [item for part in setting.config.parallel.offload for item in _PARTS[part] if "gradients" not in item]
    host = {item: static[item] for item in away if static.get(item)}
    if setting.config.rollout.engine == "sglang" and setting.config.rollout.server.keep_weights:
        host["engine weights"] = engine.weights
    return host


def _start(setting: Setting, static: Mapping[str, int], asleep: Mapping[str, int]) -> Phase:
    """The model during whose building most is there.

    DDP copies the parameters into its flat buffer, so that they are there twice until the optimizer is made.
    """
    items = {item for part in _PARTS.values() for item in part}
    built = {item: size for item, size in static.items() if item not in items}
    moments = []
    for model, parts in _BUILT.items():
        built |= {item: static[item] for part in parts for item in _PARTS[part] if item in static}
        parameters, optimizer = static.get(f"{model} parameters", 0), static.get(f"{model} optimizer", 0)
        twice = parameters if setting.config.parallel.use_distributed_optimizer and model != "reference" else 0
        more = dict(asleep)
        if twice > optimizer:
            more["model building"] = twice - optimizer
        moments.append(_phase(setting, "start", built, more, here=parts))
    return max(moments, key=lambda phase: phase.total)


def _phase(
    setting: Setting,
    name: str,
    static: Mapping[str, int],
    more: Mapping[str, int],
    here: tuple[str, ...] | None = None,
) -> Phase:
    """``here``: parts that are in, offloaded or not; those of ``_WHILE`` unless given."""
    here = _WHILE[name.split("/")[0]] if here is None else here
    away = {item for part in set(setting.config.parallel.offload) - set(here) for item in _PARTS[part]}
    live = {item: size for item, size in static.items() if item not in away}
    for item, size in more.items():
        live[item] = live.get(item, 0) + size
    if setting.device == "cuda":
        live["reserve"] = setting.reserve_bytes
    return Phase(name, {item: int(size) for item, size in live.items() if size})
