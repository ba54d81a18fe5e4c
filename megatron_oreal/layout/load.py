"""From a checkpoint to the live parameters of a rank, which reads its own bytes and no others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout.blocks import ShardLayout, to_slices
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.layout.files import is_file, reading
from megatron_oreal.layout.hf import SafetensorsSource, TensorSource, refuse_other_model
from megatron_oreal.layout.megatron_checkpoint import (
    HF_FOLDER,
    MegatronSource,
    is_megatron_checkpoint,
    load_stored_spec,
)
from megatron_oreal.layout.model_spec import ModelSpec, load_model_spec


def open_source(directory: str | Path, spec: ModelSpec) -> SafetensorsSource | MegatronSource:
    """Open a Hugging Face or a ``dist_checkpointing`` directory of a model of this shape; a context manager.

    Raises ``UserError`` when the directory's own config says that it is of another shape (sizes, rope, norm, tying),
    or it holds tensors of another model.
    """
    directory = Path(directory)
    if is_megatron_checkpoint(directory):
        with reading(directory / HF_FOLDER):
            described = (directory / HF_FOLDER).is_dir()
        if described:
            _check_same_model(load_stored_spec(directory), spec, directory)
        return MegatronSource(directory, spec)
    if is_file(directory / "config.json"):
        _check_same_model(load_model_spec(directory), spec, directory)
    source = SafetensorsSource(directory)
    known = hf_tensors(spec)
    for name in source.names():
        if name not in known:
            refuse_other_model(name, spec, directory)
    return source


def _check_same_model(stored: ModelSpec, spec: ModelSpec, directory: Path) -> None:
    stored = replace(stored, max_position_embeddings=spec.max_position_embeddings)
    for field in fields(spec):
        own, other = getattr(spec, field.name), getattr(stored, field.name)
        if own != other:
            raise UserError(f"{directory}: is of another model: {field.name} is {other}, the config's model has {own}")


@torch.no_grad()
def load_from_hf(
    source: TensorSource,
    shard: ShardLayout,
    tensors: Mapping[str, Tensor],
    *,
    missing_ok: Collection[str] = frozenset(),
) -> None:
    """Fill a rank's live parameters in place, reading only the rectangles that the rank holds.

    ``tensors``: every parameter of ``shard`` by its key, any device and float dtype (values are cast). Padding gets
    zeros, and so does what would come from an HF tensor of ``missing_ok`` that the checkpoint does not have
    (``score.weight`` when a reward model starts from a policy). Nothing is written before all were found to fit.

    Raises ``UserError`` naming the file and the tensor when the checkpoint does not fit the shard, ``ValueError`` when
    ``tensors`` does not.
    """
    shard.check_tensors(tensors, "load")
    absent = {name for name, _ in shard.tensors if name in missing_ok and name not in source}
    for name, shape in shard.tensors:
        if name not in absent:
            source.check(name, shape)
    blocks = list(shard.blocks)
    if isinstance(source, SafetensorsSource):  # the files hold tensors by name: from beginning to end, once
        blocks.sort(key=lambda block: (block.tensor, block.source))
    for block in blocks:
        target = tensors[block.param][to_slices(block.dest)]
        if block.tensor in absent:
            target.zero_()
        else:
            target.copy_(source.read(block.tensor, block.source))
    for name, rect in shard.padding:
        tensors[name][to_slices(rect)].zero_()
