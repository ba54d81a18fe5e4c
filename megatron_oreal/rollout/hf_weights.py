"""Fill an engine from a Hugging Face checkpoint, for evaluation and tests.

Training never reads weights this way: the planner writes ``weight_buffers()`` from the live Megatron parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_oreal.layout import SafetensorsSource, load_from_hf, load_model_spec
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.engine import Engine


def write_hf_weights(engine: Engine, model_dir: str | Path, version: int) -> None:
    """Copy a checkpoint into this rank's buffers, converting to their dtype, and load it as ``version``.

    Raises ``UserError`` when the checkpoint does not fit its config.json.
    """
    with SafetensorsSource(model_dir) as source:
        for rank, buffers in engine.weight_shards().items():
            load_from_hf(source, engine.layout.shards[rank], buffers)
    engine.load_weights(version)


def load_hf_engine(
    model_dir: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_running_requests: int,
    max_length: int,
) -> EmbeddedEngine:
    """Return an embedded engine that is ready to generate with the weights of ``model_dir``, as version 0."""
    spec = load_model_spec(model_dir)
    engine = EmbeddedEngine(
        spec, dtype=dtype, device=device, max_running_requests=max_running_requests, max_length=max_length
    )
    write_hf_weights(engine, model_dir, version=0)
    return engine
