"""Hugging Face checkpoints in the engines' fused layout, for evaluation and tests.

Training never reads weights this way: the resharder writes ``weight_buffers()`` from the live Megatron parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout.model_spec import ModelSpec, load_model_spec
from megatron_oreal.rollout.embedded import EmbeddedEngine
from megatron_oreal.rollout.embedded_model import weight_shapes
from megatron_oreal.rollout.engine import Engine, EngineError

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused_hf_weights(model_dir: str | Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield (fused name, tensor in the file's dtype) for every name of ``weight_shapes(spec)``.

    Raises ``UserError`` when the directory has no safetensors, lacks a tensor, or has one of another shape.
    """
    files = _tensor_files(Path(model_dir))
    for name, shape in weight_shapes(spec).items():
        parts = [_read(files, part, Path(model_dir)) for part in _unfused_names(name)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{model_dir}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        yield name, tensor


def write_hf_weights(engine: Engine, model_dir: str | Path, spec: ModelSpec, version: int) -> None:
    """Copy a checkpoint into the engine's buffers, converting to their dtype, and load it as ``version``."""
    buffers = engine.weight_buffers()
    for name, tensor in fused_hf_weights(model_dir, spec):
        if name not in buffers:
            raise EngineError(f"the engine has no weight buffer {name!r}")
        buffers[name].copy_(tensor)
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
    write_hf_weights(engine, model_dir, spec, version=0)
    return engine


def _unfused_names(name: str) -> list[str]:
    for fused, parts in _FUSED.items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return [name]


def _tensor_files(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> file, of a single or a sharded safetensors checkpoint."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return {name: model_dir / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise UserError(f"model directory {str(model_dir)!r} has neither model.safetensors nor {index.name}")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(files: dict[str, Path], name: str, model_dir: Path) -> Tensor:
    if name not in files:
        raise UserError(f"{model_dir}: the checkpoint has no tensor {name!r}")
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)
