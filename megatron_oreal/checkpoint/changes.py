"""What a run was configured with when it was saved, against what it is resumed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_oreal.config import Config
from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec

FIXED_KEYS = {
    "optimizer.wd_on_norms_and_biases": "the optimizer's state is kept by groups of parameters",
    "model.dtype": "the optimizer's state is kept in another form",
    "parallel.use_distributed_optimizer": "the optimizer's state is kept in another form",
    "parallel.optimizer_cpu_offload": "the optimizer's state is kept in another form",
    "parallel.use_precision_aware_optimizer": "the optimizer's state is kept in another form",
}
"""Keys that must be as they were, and why."""
_BUCKET_KEYS = ("parallel.overlap_grad_reduce", "parallel.ddp_bucket_size")
"""Keys that must be too where the optimizer's state was saved bucket by bucket."""
_FREE = ("rollout.sglang", "parallel.tp_comm_overlap_options", "parallel.tp_comm_overlap_cfg")
"""Keys whose values are trees with names of others: compared whole, for what they lack means a default."""
_SILENT = ("work_dir", "device", "checkpoint.", "telemetry.", "sft.", "model.megatron_checkpoint")
"""Keys that say where and how often things are written, or matter only before the first step."""


def record(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """Return what ``run.json`` keeps of a run's config and of its model's shape."""
    return {"config": config.model_dump(mode="json"), "model_shape": asdict(spec)}


def check_changes(saved: Mapping[str, Any], config: Config, spec: ModelSpec, origin: Path) -> str | None:
    """Return one line on the settings that differ from the saved run's, None when none does.

    ``saved``: a ``run.json``; one without a record (written before there was one) has nothing to compare. Raises
    ``UserError`` for another model shape and for ``FIXED_KEYS``.
    """
    if "config" not in saved:
        return None
    shape = dict(_flat(saved["model_shape"]))
    for key, value in _flat(_plain(asdict(spec))):
        if key in shape and shape[key] != value and key != "max_position_embeddings":
            raise UserError(
                f"{origin}: was saved by a model with {key}={shape[key]}, model.path has {value}: resume with the "
                "model that it was started with, or use a new work_dir"
            )
    before, now = (dict(_flat(_plain(tree))) for tree in (saved["config"], config.model_dump(mode="json")))
    changed = [
        key
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key) and key in now and not key.startswith(_SILENT)
    ]
    fixed = dict(FIXED_KEYS)
    if "dp_reshardable" in saved.get("optimizer_formats", {}).values():
        fixed |= dict.fromkeys(_BUCKET_KEYS, "the optimizer's state is kept by buckets")
    for key in changed:
        if key in fixed and key in before:
            raise UserError(
                f"{key}={now[key]}: {origin} was saved with {before[key]}, and {fixed[key]}: set it back, or use "
                "a new work_dir"
            )
    said = [f"{key} {before[key]} -> {now[key]}" for key in changed if key in before]
    return ", ".join(said) or None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _FREE:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree as JSON would give it back: tuples are lists."""
    return {
        key: _plain(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in tree.items()
    }
