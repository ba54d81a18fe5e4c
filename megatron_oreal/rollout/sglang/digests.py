"""The digests that compare staging memory with what an engine's workers hold."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_oreal.layout import Digester, ModelSpec, sglang_layout


@lru_cache(maxsize=2)
def shard_digester(spec: ModelSpec, tp: int, device_type: str, dtype: torch.dtype) -> Digester:
    """Compare staged shards ("ranks" 0 .. tp - 1) with engine workers ("ranks" tp .. 2 tp - 1), alike on both sides."""
    layout = sglang_layout(spec, tp=tp, device="cuda" if device_type == "cuda" else "cpu")
    staged, loaded = {i: (i,) for i in range(tp)}, {i: (tp + i,) for i in range(tp)}
    return Digester(layout, staged, layout, loaded, wire_dtype=dtype)
